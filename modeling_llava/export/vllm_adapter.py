"""`llava export ADAPTER --for vllm`: an adapter as the two folders that vLLM serves, OUT/base and OUT/adapter.

What is surprising: vLLM adds LoRA matrices to a language model and refuses an adapter with anything else (vLLM 0.32,
lora/peft_helper.py). `llava train` trains the projector beside them. What an adapter brings whole therefore moves into
a copy of its base, where nothing else changes; the matrices stay as they are. Adapters that share a base share
OUT/base only if they brought the same projector.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoProcessor

from modeling_llava.checkpoints.original_adapters import (
    PEFT_PREFIX,
    build_without_weights,
    check_adapter_weights,
    has_original_names,
    import_peft,
    read_adapter,
    read_adapter_config,
)
from modeling_llava.checkpoints.weight_files import Weight
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.records.training_record import RECORD_FILE
from processing_llava.original.file_checks import read_json
from processing_llava.original.original_folder import OriginalFolder, find_installed, resolve_beside

from .adapter_repository import ADAPTER_FILES, CONFIG_FILE
from .export_settings import Exported
from .merged_adapter import load_4_bits, load_16_bits, read_base_bits
from .model_repository import SHARD_SIZE

_TAKEN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "runtime_config",
}  # fmt: skip
"""Fields of PEFT's LoraConfig that vLLM reads, or that say how the matrices were made. Others keep their default."""
_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the weights of the base as they were."""
_LANGUAGE_MODEL = "model.language_model."
_MATRICES = (".lora_A.weight", ".lora_B.weight")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank (vLLM 0.32, config/lora.py)."""


def export_for_vllm(source: Path, out: Path, *, base_model: str | None = None) -> Exported:
    """Write the base with what an adapter trained whole, and the rest as a LoRA alone.

    Args:
        source: Folder of an adapter of PEFT.
        out: Folder to write; must be new or empty. Nothing of it stays if something is wrong.
        base_model: Folder or Hub id of the base, instead of the one that the adapter names.

    Raises:
        ValueError: naming what vLLM does not take.
    """
    name = str(source)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"got {out}, which holds files; expected a new or empty folder")
    if read_json(name, CONFIG_FILE, {}) is None:
        raise ValueError(
            f"got {name!r} without {CONFIG_FILE}; expected an adapter of PEFT: a model for vLLM is what `llava export "
            "--layout any_llava` writes"
        )
    config, weights = read_adapter_config(name, {}), read_adapter(name, {})
    if OriginalFolder.find(name) is not None or has_original_names(weights):
        raise ValueError(f"got {name!r}, a LoRA of the original LLaVA; expected one of PEFT: `llava merge` takes both")
    _refuse_fields(config, f"{name}/{CONFIG_FILE}")
    matrices, parts = _sort_weights(weights, name)
    bits = read_base_bits(read_json(name, RECORD_FILE, {}) or {})
    load = load_4_bits if bits == 4 else load_16_bits
    named = config.base_model_name_or_path
    if not base_model and not named:
        raise ValueError(f"got {name}/{CONFIG_FILE} that names no base; expected a base: give --base-model")
    base = find_installed(base_model) if base_model else resolve_beside(name, named)
    model = load(AnyLlavaForConditionalGeneration, base)
    check_adapter_weights(build_without_weights(model), config, weights, name)
    if bits == 4:
        # The adapter corrects the rounding of its base too.
        model = model.dequantize()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, part in parts.items():
            parameters[key].copy_(part.data[...])
    processor = AutoProcessor.from_pretrained(source)
    out.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(out / "base", layout="any_llava", max_shard_size=SHARD_SIZE)
        processor.save_pretrained(out / "base")
        _write_adapter(source, out / "adapter", matrices)
    except BaseException:
        shutil.rmtree(out)
        raise
    needed = max([config.r, *config.rank_pattern.values()])
    rank = next((rank for rank in _RANKS if rank >= needed), needed)
    command = (
        f"vllm serve {out / 'base'} --tokenizer-mode any_llava --enable-lora --max-lora-rank {rank} "
        f"--lora-modules NAME={out / 'adapter'}"
    )
    return Exported(folder=out, kind="base and adapter for vLLM", layout="any_llava", notices=[command])


def _refuse_fields(config: Any, where: str) -> None:
    """Refuse what vLLM refuses, computes otherwise, or was not looked at.

    Raises:
        ValueError: naming the field.
    """
    peft = import_peft()
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"got peft_type={config.peft_type!s} in {where}; expected LORA, the one kind that vLLM takes")
    default = peft.LoraConfig()
    for name in (field.name for field in fields(default)):
        value = getattr(config, name)
        is_taken = value in _STARTS if name == "init_lora_weights" else name in _TAKEN
        if not is_taken and value != getattr(default, name):
            raise ValueError(
                f"got {name}={value!r} in {where}, which vLLM does not take; expected its default: make one model of "
                "adapter and base with `llava merge`"
            )


def _sort_weights(weights: dict[str, Weight], name: str) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """The matrices of the language model, and the weights that were trained whole outside of it.

    Raises:
        ValueError: naming a weight that is neither.
    """
    matrices = {key: weight for key, weight in weights.items() if key.endswith(_MATRICES)}
    parts = {key: weight for key, weight in weights.items() if key not in matrices}
    for key in weights:
        is_of_language_model = key.startswith(_LANGUAGE_MODEL)
        if is_of_language_model != (key in matrices) or not key.startswith("model."):
            raise ValueError(
                f"got {key} in {name}/{ADAPTER_FILES[1]}; expected LoRA matrices in {_LANGUAGE_MODEL}, and elsewhere "
                "weights that were trained whole: make one model of adapter and base with `llava merge`"
            )
    return matrices, parts


def _write_adapter(source: Path, out: Path, matrices: dict[str, Weight]) -> None:
    out.mkdir()
    tensors = {f"{PEFT_PREFIX}{key}": weight.data[...].contiguous() for key, weight in matrices.items()}
    save_file(tensors, out / ADAPTER_FILES[1], metadata={"format": "pt"})
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"modules_to_save": None, "base_model_name_or_path": "../base"}
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
