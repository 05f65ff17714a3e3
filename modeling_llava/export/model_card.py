"""README.md and TRAINING_DATA_SUMMARY.md of a model or adapter, from the files of its training and stated facts."""

import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CardData,
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from modeling_llava.records.figures import build_environment
from modeling_llava.records.training_record import DATA_KINDS, NOT_STATED, DataEntry, RunFiles

from .export_settings import CardFacts
from .repository_check import Part, find_conflicts

PREPARED_MARK = "<!-- Prepared by anyllava"
"""Beginning of a card that `llava export` wrote: its folder is ready to go up."""
PIPELINE_TAG = "image-text-to-text"
HUB_RESULTS_FILE = Path(".eval_results") / "anyllava.yaml"
"""Where the Hub looks for results: on the page of the model, and in the leaderboard of a benchmark."""
RECIPE_SETTINGS = (
    "template", "image_aspect_ratio", "tokens_per_batch", "images_per_batch", "projector_learning_rate",
    "vision_tower_learning_rate", "muon_learning_rate",
)  # fmt: skip
"""Settings of a recipe that decide the result, beside those of the Trainer; paths stay out."""
MODALITY_RANGES = ((1_000_000, "less than 1 million"), (1_000_000_000, "1 million to 1 billion"))
"""Ranges of the number of pictures in the template of the EU AI Act, by their upper ends."""


@dataclass(kw_only=True)
class ModelDescription:
    """Everything that a card of a model or adapter is written from.

    Raises:
        ValueError: if licence or base model are missing.
    """

    repo_id: str
    layout: str
    """"any_llava", "original", "transformers" or "adapter"."""
    facts: CardFacts
    run: RunFiles
    base_models: list[str]
    data: list[DataEntry]
    prompt: str
    """One conversation as the model reads it."""
    features: dict[str, Any]
    """Values of its configuration, by the name that a reader gives them; numbers know their file."""
    has_code: bool = False
    has_other_ids: bool = False
    """Whether transformers' processor tokenises differently from ours."""
    conflicts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        license_id = self.facts.require_license()
        if not self.base_models:
            raise ValueError(
                "got no base model on the Hub; expected the id of the model it was made from: give --base-model"
            )
        licenses = self.facts.base_licenses
        parts = [Part(name=name, kind="base model", license=licenses.get(name)) for name in self.base_models]
        parts += [Part(name=entry.name, kind="data", license=entry.license) for entry in self.data]
        self.conflicts = find_conflicts(license_id, parts)

    @property
    def title(self) -> str:
        return self.facts.choose_title(self.repo_id)


def write_model_card(model: ModelDescription) -> str:
    """The text of README.md."""
    template = build_environment().get_template("adapter.md.jinja" if model.layout == "adapter" else "model.md.jinja")
    body = template.render(
        model=model, facts=model.facts, run=model.run, not_stated=NOT_STATED, recipe_settings=RECIPE_SETTINGS
    )
    return assemble_card(_metadata(model), body, layout=model.layout, repo_id=model.repo_id)


def assemble_card(metadata: CardData, body: str, *, layout: str, repo_id: str) -> str:
    """Metadata, the mark of a prepared folder with the repository that it is for, and the text."""
    mark = f"{PREPARED_MARK} {version('anyllava')}, layout {layout}, for {repo_id} -->"
    return f"---\n{metadata.to_yaml()}\n---\n\n{mark}\n{body}"


def read_kept_card(path: Path) -> ModelCard:
    """A card as somebody wrote it.

    Raises:
        ValueError: if there is none, or its metadata lack what the folder is checked against.
    """
    if not path.is_file():
        raise ValueError(f"got no {path} to keep; expected one, or a card to be written: leave out --keep-card")
    card = ModelCard.load(path)
    if not card.data.license or not card.data.base_model:
        raise ValueError(f"got {path} without license or base_model; expected both in its metadata: add them")
    return card


def write_data_summary(model: ModelDescription) -> str:
    """The text of TRAINING_DATA_SUMMARY.md, after the template of Article 53(1)(d) of the EU AI Act."""
    num_images = [entry.images for entry in model.data]
    ranges = None
    if num_images and None not in num_images:
        total = sum(num_images)
        ranges = next((name for end, name in MODALITY_RANGES if total < end), "more than 1 billion")
    return (
        build_environment()
        .get_template("training_data_summary.md.jinja")
        .render(model=model, facts=model.facts, kinds=DATA_KINDS, image_range=ranges or NOT_STATED, missing=NOT_STATED)
    )


def write_hub_results(model: ModelDescription) -> str:
    """The text of `HUB_RESULTS_FILE`: figures of benchmarks that have a task on the Hub; empty without any."""
    entries = [
        EvalResultEntry(
            dataset_id=result.dataset,
            task_id=result.task_id,
            value=float(result.value),
            source_url=_link(model, result.value.source),
            source_name=result.value.source,
            notes=f"{result.metric} on {result.split}, n={result.n}, seed {result.seed}, commit {result.commit}",
        )
        for result in model.run.results
        if result.task_id is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


def _link(model: ModelDescription, source: str) -> str:
    return f"https://huggingface.co/{model.repo_id}/blob/main/{source}"


def _metadata(model: ModelDescription) -> ModelCardData:
    facts, run = model.facts, model.run
    is_adapter = model.layout == "adapter"
    tags = ["llava", "vision", *(["any_llava"] if model.layout != "transformers" else []), *facts.tags]
    extra = {}
    if run.emissions is not None:
        extra["co2_eq_emissions"] = {
            "emissions": round(1000 * run.emissions["emissions"], 3),
            "source": "codecarbon, emissions.csv",
            "training_type": "fine-tuning",
            "geographical_location": run.emissions["country_name"],
            "hardware_used": run.emissions["gpu_model"] or run.emissions["cpu_model"],
        }
    results = _eval_results(model)
    return ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        language=facts.language,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=model.base_models,
        base_model_relation="adapter" if is_adapter else "finetune",
        datasets=list(dict.fromkeys(facts.datasets + run.hub_datasets)) or None,
        metrics=sorted({result.metric for result in run.results}) or None,
        tags=[*tags, *(["custom_code"] if model.has_code else []), *(["lora"] if is_adapter else [])],
        eval_results=results or None,
        model_name=model.title if results else None,
        **extra,
    )


def _eval_results(model: ModelDescription) -> list[EvalResult]:
    measured = [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=result.dataset,
            dataset_name=result.benchmark,
            # Figures of one dataset, split and configuration are merged under the source of the first
            # (huggingface_hub 2.4, repocard_data.py).
            dataset_config=f"{result.benchmark}, {result.value.source}",
            dataset_split=result.split,
            metric_type=result.metric,
            metric_value=float(result.value),
            source_name=result.value.source,
            source_url=_link(model, result.value.source),
        )
        for result in model.run.results
    ]
    published = [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=re.sub(r"\W+", "-", benchmark.lower()).strip("-"),
            dataset_name=benchmark,
            metric_type="score",
            metric_value=float(value),
            source_name="published by the authors",
            source_url=figures.source,
        )
        for figures in model.facts.published_figures
        for benchmark, value in figures.values.items()
    ]
    return measured + published
