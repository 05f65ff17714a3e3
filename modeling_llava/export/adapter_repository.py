"""An adapter as a repository: PEFT's two files, the processor, and a card beside those of its training.

What is surprising: an adapter names its base, and only a base that has our names for the projector fits it. Both are
looked at before anything goes up, as far as the base can be read from here.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from modeling_llava.auto import AutoModelForVision2Seq
from modeling_llava.checkpoints.original_adapters import PROJECTOR, check_adapter_file
from modeling_llava.records.figures import add_source
from modeling_llava.records.training_record import read_run_files
from processing_llava.original.file_checks import read_json
from processing_llava.original.original_folder import find_adapter_base, find_installed, find_layout

from .export_settings import Exported, ExportSettings
from .model_repository import add_card, find_model_metadata_problems, write_prompt
from .repository_check import find_missing

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = (CONFIG_FILE, "adapter_model.safetensors")


def write_adapter_repository(source: Path, out: Path, settings: ExportSettings) -> Exported:
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
    config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    base = _choose_base(source, config, settings)
    _refuse_other_layout(config, base)
    _refuse_other_shapes(source, base)
    config["base_model_name_or_path"] = base
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    notices = add_card(
        source,
        out,
        replace(settings, facts=replace(settings.facts, base_model=[base])),
        layout="adapter",
        prompt=write_prompt(processor),
        features={
            "rank": add_source(config["r"], CONFIG_FILE),
            "alpha": add_source(config["lora_alpha"], CONFIG_FILE),
            "dropout": add_source(config["lora_dropout"], CONFIG_FILE),
            "trained as a whole": ", ".join(f"`{name}`" for name in config["modules_to_save"] or ()) or "nothing",
        },
    )
    return Exported(folder=out, kind="adapter", notices=notices)


def find_adapter_problems(folder: Path, metadata: dict[str, Any] | None) -> Iterator[str]:
    """Files that loading needs, and what is wrong with the metadata, which name the same base as PEFT's file."""
    yield from find_missing(folder, [*ADAPTER_FILES, "processor_config.json"])
    if metadata is None:
        return
    yield from find_model_metadata_problems(metadata)
    if metadata.get("base_model_relation") != "adapter":
        yield f"base_model_relation is {metadata.get('base_model_relation')!r} for an adapter"
    path = folder / CONFIG_FILE
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else None
    if metadata.get("base_model") not in (base, [base]):
        yield f"base_model is {metadata.get('base_model')!r}, and {CONFIG_FILE} says {base!r}"


def _choose_base(source: Path, config: dict[str, Any], settings: ExportSettings) -> str:
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


def _refuse_other_layout(config: dict[str, Any], base: str) -> None:
    """Refuse a base in transformers' layout, which has another name for the projector: PEFT would leave the trained
    one out without an error (peft 0.21, peft_model.py). A base that cannot be read from here is taken as it is.

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


def _refuse_other_shapes(source: Path, base: str) -> None:
    """Refuse an adapter that does not fit the base that it was trained on; one that cannot be read from here is taken
    as it is.

    Raises:
        ValueError: naming file, weight and shapes.
    """
    local = find_adapter_base(str(source), {}) or base
    try:
        config = AutoConfig.from_pretrained(local, trust_remote_code=False)
    except OSError:
        return
    with torch.device("meta"):
        model = AutoModelForVision2Seq.from_config(config)
    check_adapter_file(model, str(source))
