"""`llava merge`: an adapter and its base become one model, whose logits are compared with theirs.

What is surprising: an adapter that was trained on a 4-bit base corrects the rounding of that base too. It is merged
into the 4-bit weights written out as 16 bits, not into the weights they were rounded from.
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from modeling_llava.acceleration.quantization import four_bit_config
from modeling_llava.auto import AutoModelForVision2Seq
from modeling_llava.checkpoints.adapter_config import read_adapter_config, write_out_patterns
from modeling_llava.checkpoints.original_adapters import (
    check_adapter_weights,
    has_original_names,
    list_modules,
    needs_our_class,
    read_adapter,
)
from modeling_llava.checkpoints.weight_files import has_model
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.records.training_record import RECORD_FILE
from processing_llava.original.file_checks import read_json
from processing_llava.original.original_folder import OriginalFolder, find_installed, resolve_beside

MAX_RELATIVE_DIFFERENCE = 0.1
"""Share of the largest logit. Rounding to 16 bits stays far below; an adapter of another base does not."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """How the merged model differs from base and adapter side by side, on one question about one picture."""

    base_bits: int
    positions: int
    largest_logit: float
    largest_difference: float
    same_greedy_tokens: int
    """Positions where greedy decoding chooses the same token."""

    def __str__(self) -> str:
        return (
            f"{self.base_bits}-bit base; logits before and after differ by at most {self.largest_difference:.2g} "
            f"(largest logit {self.largest_logit:.4g}); the greedy token is the same at "
            f"{self.same_greedy_tokens} of {self.positions} positions"
        )


def merge_adapter(
    adapter: str, out: Path, *, base_model: str | None = None, base_bits: int | None = None
) -> MergeReport:
    """Merge an adapter into its base, and save the model with its processor.

    Args:
        adapter: Folder or Hub id: an adapter of PEFT, or a LoRA folder of the original LLaVA.
        out: Folder to write.
        base_model: Folder or Hub id of the base, instead of the one that the adapter names.
        base_bits: 4 if the adapter was trained on a 4-bit base, else 16. Default: what the training record says.

    Raises:
        ValueError: if the adapter cannot be used, or the merged model computes something else.
    """
    if base_bits not in (None, 4, 16):
        raise ValueError(f"got {base_bits} bits; expected 4 or 16")
    try:
        record = read_json(adapter, RECORD_FILE, {}) or {}
        if base_bits is None:
            base_bits = read_base_bits(record)
        before, merged, processor = _merge(adapter, base_model=base_model, base_bits=base_bits)
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split("\n")[:2])
        named = (read_json(adapter, "adapter_config.json", {}) or {}).get("base_model_name_or_path")
        raise ValueError(
            f"got adapter {adapter!r} and base {base_model or named!r}, looked for from {str(Path.cwd())!r}, which "
            f"cannot be put together: {reason}; expected a folder or Hub id of each, made for each other: give "
            "base_model, if its own is somewhere else"
        ) from error
    report = compare(before, _compute_logits(merged, processor), base_bits=base_bits)
    merged.save_pretrained(out)
    processor.save_pretrained(out)
    if record:
        text = json.dumps(record | {"merged": asdict(report)}, indent=1) + "\n"
        (out / RECORD_FILE).write_text(text, encoding="utf-8")
    return report


def read_base_bits(record: dict[str, Any]) -> int:
    """Bits of the base that a run trained its adapter on, by its training record."""
    return 4 if record.get("recipe", {}).get("stage") == "qlora" else 16


def compare(before: torch.Tensor, after: torch.Tensor, *, base_bits: int) -> MergeReport:
    """How two sets of logits `[L, vocabulary]` differ.

    Raises:
        ValueError: if it is more than rounding.
    """
    report = MergeReport(
        base_bits=base_bits,
        positions=len(before),
        largest_logit=before.abs().max().item(),
        largest_difference=(before - after).abs().max().item(),
        same_greedy_tokens=int((before.argmax(-1) == after.argmax(-1)).sum()),
    )
    if not report.largest_difference <= MAX_RELATIVE_DIFFERENCE * report.largest_logit:
        raise ValueError(f"got a merged model that computes something else: {report}; expected the same logits")
    return report


def _merge(
    adapter: str, *, base_model: str | None, base_bits: int
) -> tuple[torch.Tensor, PreTrainedModel, ProcessorMixin]:
    """Logits of base and adapter side by side, the merged model, and its processor."""
    base = {} if base_model is None else {"base_model": base_model}
    weights = {} if read_json(adapter, "adapter_config.json", {}) is None else read_adapter(adapter, {})
    is_original = OriginalFolder.find(adapter, **base) is not None
    if is_original and not weights and has_model(adapter, {}) and base_model is None:
        raise ValueError(f"got {adapter!r}, which is a complete model without an adapter; expected an adapter")
    if is_original or has_original_names(weights):
        processor = AutoProcessor.from_pretrained(adapter, **base)
        apart = AutoModelForVision2Seq.from_pretrained(adapter, dtype="auto", merge_adapter=False, **base)
        merged = AutoModelForVision2Seq.from_pretrained(adapter, dtype="auto", **base)
        return _compute_logits(apart, processor), merged, processor

    from peft import PeftModel

    processor = AutoProcessor.from_pretrained(adapter)
    config = read_adapter_config(adapter, {})
    base_model = find_installed(base_model) if base_model else resolve_beside(adapter, config.base_model_name_or_path)
    # transformers' own class, which "auto" takes for its layout, has another name for our projector; PEFT would leave
    # the trained one out without an error (peft 0.21, peft_model.py).
    is_ours = needs_our_class(adapter, {})
    model_class = AnyLlavaForConditionalGeneration if is_ours else AutoModelForVision2Seq
    load = load_4_bits if base_bits == 4 else load_16_bits
    model = load(model_class, base_model)
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    check_adapter_weights(skeleton, config, weights, adapter)
    write_out_patterns(list_modules(model), config, adapter)
    model = PeftModel.from_pretrained(model, adapter, config=copy.deepcopy(config))
    before = _compute_logits(model, processor)
    if base_bits == 4:
        model = load(model_class, base_model).dequantize()
        model = PeftModel.from_pretrained(model, adapter, config=config)
    merged = model.merge_and_unload(safe_merge=True)
    if is_ours:
        merged.checkpoint_layout = "any_llava"  # the layout that fits the processor, whatever the base had
    return before, merged, processor


def load_16_bits(model_class: type, base_model: str) -> PreTrainedModel:
    return model_class.from_pretrained(base_model, dtype="auto")


def load_4_bits(model_class: type, base_model: str) -> PreTrainedModel:
    return model_class.from_pretrained(base_model, dtype=torch.bfloat16, quantization_config=four_bit_config())


def _compute_logits(model: torch.nn.Module, processor: ProcessorMixin) -> torch.Tensor:
    """Logits `[L, vocabulary]` of one question about one picture."""
    with torch.no_grad():
        return model.eval()(**_example(processor).to(model.device, model.dtype)).logits[0].float()


def _example(processor: ProcessorMixin) -> BatchFeature:
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(levels)}, {"type": "text", "text": "Describe the image."}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
