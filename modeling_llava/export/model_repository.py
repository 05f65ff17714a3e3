"""The folder of a model or adapter: weights, processor, card, and what its training left.

What is surprising: a model is written in transformers' own layout wherever that one can express it, since every
engine reads it; only the others get our layout, with the code to load them. Paths of this machine, which
configurations and records keep, are cut to their last part.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, ProcessorMixin

import hub_cards
from modeling_llava.auto import AutoModelForVision2Seq
from modeling_llava.checkpoints.layouts import write_transformers_config
from modeling_llava.checkpoints.original_adapters import PROJECTOR, check_adapter_file
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.records.figures import add_source
from modeling_llava.records.run_files import carry_files, read_run_files
from modeling_llava.records.yaml_fields import build
from processing_llava import AnyLlavaProcessor
from processing_llava.original.original_folder import find_adapter_base, find_installed, find_layout, read_json

from .card_facts import CardFacts
from .export_settings import Exported, ExportSettings
from .model_card import (
    HUB_RESULTS_FILE,
    ModelDescription,
    assemble_card,
    read_kept_card,
    write_data_summary,
    write_hub_results,
    write_model_card,
)
from .remote_code import write_remote_code
from .repository_check import cut_paths
from .transformers_processor import build_transformers_processor, changes_ids, save_transformers_processor

APACHE_LICENSE = Path(hub_cards.__file__).parent / "LICENSE-apache-2.0"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SENTENCEPIECE_FILE = "tokenizer.model"
"""llama.cpp's converter reads no other file of a SentencePiece tokenizer, and transformers does not write it."""
SHARD_SIZE = "5GB"
OTHER_IDS = (
    "transformers' processor gives the text after a picture other ids than the model was trained on, as in all "
    "published LLaVAs of this layout; --layout any_llava keeps them"
)


def export_model(source: Path, out: Path, settings: ExportSettings) -> Exported:
    """Write a model of any layout.

    Raises:
        ValueError: if the layout cannot express it, or something for the card is missing.
    """
    model = AnyLlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    processor = AutoProcessor.from_pretrained(source)
    layout = settings.layout or find_widest_layout(model.config)
    has_code = layout == "any_llava" if settings.with_code is None else settings.with_code
    if has_code and layout != "any_llava":
        raise ValueError(f"got code for the layout {layout!r}; expected the layout 'any_llava', which needs it")
    model.save_pretrained(out, layout=layout, max_shard_size=SHARD_SIZE)
    has_other_ids = save_processor(processor, out, layout=layout, config=model.config)
    if (source / SENTENCEPIECE_FILE).is_file():
        shutil.copyfile(source / SENTENCEPIECE_FILE, out / SENTENCEPIECE_FILE)
    if has_code:
        write_remote_code(out)
    notices = _add_card(
        source,
        out,
        settings,
        layout=layout,
        prompt=write_prompt(processor),
        features=_describe_model(model),
        has_code=has_code,
        has_other_ids=has_other_ids,
    )
    return Exported(folder=out, kind="model", layout=layout, notices=[OTHER_IDS] * has_other_ids + notices)


def find_widest_layout(config: PreTrainedConfig) -> str:
    """transformers' own layout if it can express the model, else ours."""
    try:
        write_transformers_config(config)
    except ValueError:
        return "any_llava"
    return "transformers"


def save_processor(processor: ProcessorMixin, out: Path, *, layout: str, config: PreTrainedConfig) -> bool:
    """Write the processor that fits a layout; tells whether it makes other ids of a prompt than ours.

    Raises:
        ValueError: if it is transformers' own, for another layout than that.
    """
    if not isinstance(processor, AnyLlavaProcessor):
        if layout != "transformers":
            raise ValueError(
                f"got layout {layout!r} for a model whose processor is transformers' {type(processor).__name__}; "
                "expected layout 'transformers'"
            )
        save_transformers_processor(processor, out)
        return False
    if layout != "transformers":
        processor.save_pretrained(out)
        return False
    theirs = build_transformers_processor(processor, write_transformers_config(config))
    save_transformers_processor(theirs, out)
    return changes_ids(processor, theirs)


def write_prompt(processor: ProcessorMixin) -> str:
    """One conversation in the model's format."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    return str(processor.apply_chat_template([question, answer]))


def _describe_model(model: AnyLlavaForConditionalGeneration) -> dict[str, Any]:
    config = model.config
    return {
        "parameters": add_source(model.num_parameters(), "model.safetensors"),
        "vision tower": f"`{config.vision_config.model_type}`",
        "projector": f"`{config.projector_type}`",
        "language model": f"`{config.text_config.model_type}`",
        "side of a tile in pixels": add_source(config.vision_config.image_size, "config.json"),
        "features of a tile": add_source(config.patches_per_side**2 + config.num_prefix_tokens, "config.json"),
    }


def export_adapter(source: Path, out: Path, settings: ExportSettings) -> Exported:
    """Copy an adapter of PEFT, whose base model is one on the Hub.

    Raises:
        ValueError: if a file, the base model, or something for the card is missing, or the base has other names.
    """
    for name in ADAPTER_FILES:
        if not (source / name).is_file():
            raise ValueError(f"got {source} without {name}; expected an adapter of PEFT, in safetensors")
        shutil.copyfile(source / name, out / name)
    processor = AutoProcessor.from_pretrained(source)
    processor.save_pretrained(out)
    config = json.loads((out / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    base = _find_base(source, config, settings)
    _refuse_other_names(config, base)
    _check_adapter(source, base)
    config["base_model_name_or_path"] = base
    (out / ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    notices = _add_card(
        source,
        out,
        replace(settings, facts=replace(settings.facts, base_model=[base])),
        layout="adapter",
        prompt=write_prompt(processor),
        features={
            "rank": add_source(config["r"], ADAPTER_FILES[0]),
            "alpha": add_source(config["lora_alpha"], ADAPTER_FILES[0]),
            "dropout": add_source(config["lora_dropout"], ADAPTER_FILES[0]),
            "trained as a whole": ", ".join(f"`{name}`" for name in config["modules_to_save"] or ()) or "nothing",
        },
    )
    return Exported(folder=out, kind="adapter", notices=notices)


def _find_base(source: Path, config: dict[str, Any], settings: ExportSettings) -> str:
    """Hub id of the model under an adapter."""
    if settings.facts.base_model:
        return settings.facts.base_model[0]
    stages = read_run_files(source).stages
    base = stages[-1]["base_model"] if stages else config["base_model_name_or_path"]
    if base is None or Path(find_installed(base)).exists():
        raise ValueError(
            f"got an adapter of {config['base_model_name_or_path']!r}, which is no model on the Hub; expected one: "
            "push the base model and give its id as --base-model"
        )
    return base


def _refuse_other_names(config: dict[str, Any], base: str) -> None:
    """Refuse a base in transformers' layout, which calls the projector otherwise: PEFT would leave the trained one out
    with a warning. A base that cannot be read from here is taken as it is.

    Raises:
        ValueError: naming the base.
    """
    try:
        found = read_json(base, "config.json", {})
    except OSError:
        return
    is_built_in = found is not None and find_layout(found) == "transformers"
    if is_built_in and PROJECTOR in (config["modules_to_save"] or ()):
        raise ValueError(
            f"got an adapter with a projector for {base}, whose layout 'transformers' has another name for it; "
            "expected a base in our layout: push the base with --layout any_llava, or push what `llava merge` makes"
        )


def _check_adapter(source: Path, base: str) -> None:
    """Refuse an adapter that does not fit the base that it was trained on; one that cannot be read from here is taken
    as it is.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    local = find_adapter_base(str(source), {}) or base
    try:
        config = AutoConfig.from_pretrained(local)
    except OSError:
        return
    with torch.device("meta"):
        model = AutoModelForVision2Seq.from_config(config)
    check_adapter_file(model, str(source))


def _add_card(source: Path, out: Path, settings: ExportSettings, **details: Any) -> list[str]:
    """Put the files of the training, card, summary of the data and licence into the folder; returns notices."""
    carry_files(source, out)
    _cut_paths(out)
    run, facts = read_run_files(out), settings.facts
    card = read_kept_card(source / "README.md") if settings.keep_card else None
    if card is not None:
        bases = card.data.base_model
        bases = [bases] if isinstance(bases, str) else bases
        kept = vars(facts) | {"license": card.data.license, "base_model": bases}
        facts = build(CardFacts, kept, where=str(source / "README.md"))
    model = ModelDescription(
        repo_id=settings.repo_id,
        facts=facts,
        run=run,
        base_models=facts.base_model or ([run.base_model] if run.base_model else []),
        data=settings.data or facts.data_entries or run.data_entries,
        **details,
    )
    text = write_model_card(model)
    if card is not None:
        text = assemble_card(card.data, card.text, layout=model.layout, repo_id=model.repo_id)
    (out / "README.md").write_text(text, encoding="utf-8")
    if model.data:
        (out / "TRAINING_DATA_SUMMARY.md").write_text(write_data_summary(model), encoding="utf-8")
    hub_results = write_hub_results(model)
    if hub_results:
        (out / HUB_RESULTS_FILE).parent.mkdir()
        (out / HUB_RESULTS_FILE).write_text(hub_results, encoding="utf-8")
    if facts.license == "apache-2.0" and not any(out.glob("LICENSE*")):
        shutil.copyfile(APACHE_LICENSE, out / "LICENSE")
    if not any(out.glob("LICENSE*")):
        return [
            f"the text of {facts.license} is missing: put it into {source} as LICENSE",
            *model.conflicts,
        ]
    return model.conflicts


def _cut_paths(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        if path.name == "tokenizer.json":  # its pieces can look like paths
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        cut = _cut(content)
        if cut != content:
            path.write_text(json.dumps(cut, indent=2) + "\n", encoding="utf-8")


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value]
    return cut_paths(value) if isinstance(value, str) else value
