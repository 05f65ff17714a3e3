"""A model as a repository: weights, processor, card, what its training left, and the code to load it where needed.

What is surprising: a model is written in transformers' own layout wherever that one can express it, since every
engine reads it; only the others get our layout, with the code to load them. transformers' processors tokenise the
whole prompt at once (transformers 5.23, processing_utils.py). With a SentencePiece tokenizer the text after an image
then begins with other pieces than the original LLaVA's. `_changes_ids` finds out, and the card and a notice say it.

The code is for those who load a repository with `trust_remote_code=True` and without this package. Both packages lie
flat side by side in it, because transformers looks for such code in one folder and follows relative imports of one dot
(transformers 5.23, dynamic_module_utils.py). The two mixins that read the layouts of other code are left empty, which
halves what a stranger has to read before trusting it; so are lists of arguments, results and errors, which the package
has.
"""

import json
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
    SiglipImageProcessorPil,
)

import hub_cards
import processing_llava
from modeling_llava.checkpoints.layouts import write_transformers_config
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.records.figures import add_source
from modeling_llava.records.training_record import CARRIED_FILES, carry_files, read_run_files
from modeling_llava.records.yaml_fields import build
from processing_llava import AnyLlavaProcessor
from processing_llava.transformers_versions import FIRST, LAST

from .export_settings import CardFacts, Exported, ExportSettings
from .model_card import (
    HUB_RESULTS_FILE,
    ModelDescription,
    assemble_card,
    read_kept_card,
    write_data_summary,
    write_hub_results,
    write_model_card,
)
from .repository_check import cut_paths_in_files, find_language_problems, find_missing

APACHE_LICENSE = Path(hub_cards.__file__).parent / "LICENSE-apache-2.0"
SENTENCEPIECE_FILE = "tokenizer.model"
"""llama.cpp's converter reads no other file of a SentencePiece tokenizer, and transformers does not write it."""
SUMMARY_FILE = "TRAINING_DATA_SUMMARY.md"
SHARD_SIZE = "5GB"
OTHER_IDS = (
    "transformers' processor gives the text after a picture other ids than the model was trained on, as in all "
    "published LLaVAs of this layout; --layout any_llava keeps them"
)
_REPLACED = (
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "adapter_config.json",
    "adapter_model.safetensors", "config.json", "generation_config.json", "preprocessor_config.json",
    SENTENCEPIECE_FILE, SUMMARY_FILE, "results/*.json", HUB_RESULTS_FILE.as_posix(), *CARRIED_FILES,
)  # fmt: skip
"""Files that one export of a model or adapter holds and another one may lack."""
_IMAGE_FIELDS = (
    "size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "do_normalize", "do_rescale",
    "rescale_factor", "do_convert_rgb",
)  # fmt: skip
_BASE_MODEL_RELATIONS = ("adapter", "finetune", "merge", "quantized")
# fmt: off
_PIPELINE_TAGS = frozenset({
    "any-to-any", "audio-classification", "audio-text-to-text", "audio-to-audio", "automatic-speech-recognition",
    "depth-estimation", "document-question-answering", "feature-extraction", "fill-mask", "graph-ml",
    "image-classification", "image-feature-extraction", "image-segmentation", "image-text-to-image",
    "image-text-to-text", "image-text-to-video", "image-to-3d", "image-to-image", "image-to-text", "image-to-video",
    "keypoint-detection", "mask-generation", "multiple-choice", "object-detection", "other", "question-answering",
    "reinforcement-learning", "robotics", "sentence-similarity", "summarization", "table-question-answering",
    "table-to-text", "tabular-classification", "tabular-regression", "tabular-to-text", "text-classification",
    "text-generation", "text-ranking", "text-retrieval", "text-to-3d", "text-to-audio", "text-to-image",
    "text-to-speech", "text-to-video", "time-series-forecasting", "token-classification", "translation",
    "unconditional-image-generation", "video-classification", "video-text-to-text", "video-to-video",
    "visual-document-retrieval", "visual-question-answering", "voice-activity-detection", "zero-shot-classification",
    "zero-shot-image-classification", "zero-shot-object-detection",
})
"""Tasks of the Hub: https://huggingface.co/tasks."""
# fmt: on


def write_model_repository(source: Path, out: Path, settings: ExportSettings) -> Exported:
    """Write a model of any layout.

    Raises:
        ValueError: if the layout cannot express it, or something for the card is missing.
    """
    model = AnyLlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    processor = AutoProcessor.from_pretrained(source)
    layout = settings.layout or _find_widest_layout(model.config)
    has_code = layout == "any_llava" if settings.with_code is None else settings.with_code
    if has_code and layout != "any_llava":
        raise ValueError(f"got code for the layout {layout!r}; expected the layout 'any_llava', which needs it")
    model.save_pretrained(out, layout=layout, max_shard_size=SHARD_SIZE)
    has_other_ids = _save_processor(processor, out, layout=layout, config=model.config)
    if (source / SENTENCEPIECE_FILE).is_file():
        shutil.copyfile(source / SENTENCEPIECE_FILE, out / SENTENCEPIECE_FILE)
    if has_code:
        write_remote_code(out)
    notices = add_card(
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


def find_model_problems(folder: Path, metadata: dict[str, Any] | None) -> Iterator[str]:
    """Files that loading needs, and what is wrong with the metadata."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    needed = [*shards, "config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"]
    yield from find_missing(folder, needed)
    if metadata is not None:
        yield from find_model_metadata_problems(metadata)


def find_model_metadata_problems(metadata: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the metadata of a model or adapter."""
    if metadata.get("pipeline_tag") not in _PIPELINE_TAGS:
        yield f"pipeline_tag is {metadata.get('pipeline_tag')!r}, which the Hub does not know"
    if not metadata.get("library_name"):
        yield "library_name is missing"
    if not metadata.get("base_model"):
        yield "base_model is missing"
    if metadata.get("base_model_relation") not in _BASE_MODEL_RELATIONS:
        relation = metadata.get("base_model_relation")
        yield f"base_model_relation is {relation!r}; it can be {', '.join(_BASE_MODEL_RELATIONS)}"
    yield from find_language_problems(metadata)
    for entry in metadata.get("model-index") or []:
        for result in entry["results"]:
            if not (result.get("source") or {}).get("url"):
                yield f"model-index has a figure of {result['dataset']['name']} without its source"


def list_replaced_files() -> list[str]:
    """Patterns of files that an earlier push of a model or adapter may have left."""
    return [*_REPLACED, *(f"{name}.py" for name in collect_modules())]


def add_card(source: Path, out: Path, settings: ExportSettings, **details: Any) -> list[str]:
    """Put the files of the training, card, summary of the data and licence into the folder; returns notices."""
    carry_files(source, out)
    cut_paths_in_files(out)
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
        (out / SUMMARY_FILE).write_text(write_data_summary(model), encoding="utf-8")
    hub_results = write_hub_results(model)
    if hub_results:
        (out / HUB_RESULTS_FILE).parent.mkdir()
        (out / HUB_RESULTS_FILE).write_text(hub_results, encoding="utf-8")
    if facts.license == "apache-2.0" and not any(out.glob("LICENSE*")):
        shutil.copyfile(APACHE_LICENSE, out / "LICENSE")
    if not any(out.glob("LICENSE*")):
        return [f"the text of {facts.license} is missing: put it into {source} as LICENSE", *model.conflicts]
    return model.conflicts


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


def _find_widest_layout(config: PreTrainedConfig) -> str:
    """transformers' own layout if it can express the model, else ours."""
    try:
        write_transformers_config(config)
    except ValueError:
        return "any_llava"
    return "transformers"


def _save_processor(processor: ProcessorMixin, out: Path, *, layout: str, config: PreTrainedConfig) -> bool:
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
    return _changes_ids(processor, theirs)


def build_transformers_processor(processor: AnyLlavaProcessor, config: PreTrainedConfig) -> ProcessorMixin:
    """The processor of transformers that prepares the same pixels.

    Args:
        processor: Ours.
        config: What `write_transformers_config` made of the model's configuration.
    """
    ours = processor.image_processor
    fields = {name: getattr(ours, name) for name in _IMAGE_FIELDS}
    is_tiled = isinstance(config, LlavaNextConfig)
    if is_tiled:
        image_processor = LlavaNextImageProcessorPil(**fields, image_grid_pinpoints=ours.image_grid_pinpoints)
    elif ours.image_aspect_ratio == "pad":
        image_processor = LlavaImageProcessorPil(**fields, do_pad=True)
    elif ours.do_center_crop:
        image_processor = CLIPImageProcessorPil(**fields)
    else:
        image_processor = SiglipImageProcessorPil(**fields)
    drops_class_token = config.vision_feature_select_strategy == "default"
    return (LlavaNextProcessor if is_tiled else LlavaProcessor)(
        image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=1 if drops_class_token else processor.num_prefix_tokens,
    )


def save_transformers_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Save it, with preprocessor_config.json beside, which engines on transformers 4 read."""
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def _changes_ids(ours: AnyLlavaProcessor, theirs: ProcessorMixin) -> bool:
    """Whether the two make other ids of one question about one picture."""
    picture = Image.new("RGB", (64, 48))
    question = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    ids = [
        processor.apply_chat_template(
            question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"].tolist()
        for processor in (ours, theirs)
    ]
    return ids[0] != ids[1]


# The code that a repository carries.

PACKAGES = (Path(__file__).parents[1], Path(processing_llava.__file__).parent)
ENTRY_MODULES = ("modeling_llava", "processing_llava")
"""Everything else is found by following their imports."""
_MODEL = "modeling_llava.AnyLlavaForConditionalGeneration"
_PROCESSOR = {
    "AutoImageProcessor": "image_processing_llava.AnyLlavaImageProcessorPil",
    "AutoProcessor": "processing_llava.AnyLlavaProcessor",
}
AUTO_MAP = _PROCESSOR | {
    "AutoConfig": "configuration_llava.AnyLlavaConfig",
    "AutoModel": "modeling_llava.AnyLlavaModel",
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
}
SEAMS = {
    "checkpoint_mixin": (
        'class CheckpointMixin:\n    """Empty: the package reads and writes the layouts of other code here."""\n'
    ),
    "original_processor": (
        "from transformers.processing_utils import ProcessorMixin\n\n\n"
        "class OriginalProcessorMixin(ProcessorMixin):\n"
        '    """Empty: the package reads folders of the original LLaVA here."""\n'
    ),
}
# What follows the first paragraph of a docstring is for readers of the package.
_PARAGRAPHS = re.compile(r'^( *)"""((?:(?!.*""").+\n)+)\n(?:(?!.*""").*\n)*?\1"""$', flags=re.MULTILINE)
_SIBLING = re.compile(r"^from (?:\.|(?:modeling|processing)_llava\.)(?:\w+\.)*(\w+) import", flags=re.MULTILINE)


def write_remote_code(folder: Path) -> None:
    """Put the code beside a saved model and processor, and name it in their configurations."""
    first, last = (".".join(map(str, tested)) for tested in (FIRST, LAST))
    header = f"# AnyLLaVA {version('anyllava')}, Apache-2.0; by `llava export`, for transformers {first} to {last}.\n"
    for name, text in collect_modules().items():
        (folder / f"{name}.py").write_text(header + text, encoding="utf-8")
    _add_auto_map(folder / "config.json", AUTO_MAP)
    _add_auto_map(folder / "processor_config.json", _PROCESSOR)


def collect_modules() -> dict[str, str]:
    """The text of every module of the bundle by name, importing nothing but siblings and installed libraries."""
    modules: dict[str, str] = {}
    waiting = list(ENTRY_MODULES)
    while waiting:
        name = waiting.pop()
        if name in modules:
            continue
        text = SEAMS.get(name) or _PARAGRAPHS.sub(r'\1"""\2\1"""', _read_module(name))
        waiting += _SIBLING.findall(text)
        modules[name] = _SIBLING.sub(r"from .\1 import", text)
    return modules


def _read_module(name: str) -> str:
    return next(path.read_text(encoding="utf-8") for path in (p / f"{name}.py" for p in PACKAGES) if path.is_file())


def _add_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["auto_map"] = auto_map
    if "image_processor" in fields:
        fields["image_processor"]["auto_map"] = auto_map
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
