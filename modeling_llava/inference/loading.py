"""Loading a LLaVA for answering: in the best precision for which the memory is enough, and fast on its device.

Nearly every original checkpoint is float16, which a CPU computes as float32: twice the bytes of the files. Where that
does not fit, bfloat16 may, on a CPU with units for it, or int8; on a GPU 4 bits.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_llava.acceleration.cpu_layers import pack_linear_layers, use_cpu_attention
from modeling_llava.acceleration.devices import count_free_bytes, format_bytes, is_slow_on_cpu
from modeling_llava.acceleration.fused_layers import fuse_norms, fuse_projections
from modeling_llava.acceleration.quantization import ON_CPU, ON_GPU, check_quantization
from modeling_llava.checkpoints.shared_values import check_pair
from modeling_llava.configuration_llava import AnyLlavaConfig
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from processing_llava.original.file_checks import in_one_line
from processing_llava.original.original_folder import EMBEDDED_NAME, find_installed
from processing_llava.processing_llava import AnyLlavaProcessor

from .generation_memory import (
    build_without_memory,
    count_weight_bytes,
    predict_generation,
    predict_loading,
    read_config,
)

logger = logging.get_logger(__name__)

EMBEDDED_MODEL = find_installed(EMBEDDED_NAME)
"""The small LLaVA that ships in this package."""


@in_one_line()
def load_for_inference(
    name: str = EMBEDDED_MODEL,
    *,
    template: str | None = None,
    base_model: str | None = None,
    vision_tower: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    memory: int | str | None = None,
    visual_tokens: int | None = None,
) -> tuple[AnyLlavaForConditionalGeneration, AnyLlavaProcessor]:
    """Load a LLaVA of any layout and its processor, for answering; of transformers' own layout too, in our class.

    The model is prepared for its device and does nothing but answer: to train it or to save it, load it with
    `AutoModelForVision2Seq.from_pretrained`.

    Args:
        name: Folder or Hub id.
        template: Name of a conversation format to use instead of the one stored with the model.
        base_model: Folder or Hub id of the language model, for a LoRA, projector or delta that does not name its own.
        vision_tower: Folder or Hub id of the tower, instead of the one that an original folder names.
        device: Name of the device; the first GPU by default, or the CPU where there is none.
        dtype: "float32", "bfloat16" or "float16". By default the dtype of the checkpoint, or float32 where a CPU is
            slow in it, if that fits; else bfloat16 on a CPU with units for it, int8, or 4 bits on a GPU.
        quantization: "int4", "fp8" or "nf4" on a GPU, "int8" on a CPU, for the language model.
        memory: Bytes, or a text such as "8GiB", that the model and an answer about one picture may take; what is free
            by default.
        visual_tokens: Most tokens of an image, instead of the number stored with the model; see `AnyLlavaConfig`.

    Raises:
        ValueError: if there is no such model or template, the model or device cannot run what was chosen, or nothing
            fits into the memory.
    """
    name = find_installed(name)
    base = {} if base_model is None else {"base_model": find_installed(base_model)}
    base |= {} if vision_tower is None else {"vision_tower": vision_tower}
    parts = dict(base)
    base |= {} if visual_tokens is None else {"visual_tokens": visual_tokens}
    chosen = {} if template is None else {"template": template}
    device = find_device(device)
    memory = parse_memory(memory) if isinstance(memory, str) else memory
    try:
        processor = AnyLlavaProcessor.from_pretrained(name, **chosen, **base)
        config = read_config(name, **base)
        precision = choose_precision(
            config,
            device,
            name=name,
            dtype=dtype,
            quantization=quantization,
            memory=memory,
            check=lambda: AnyLlavaForConditionalGeneration.check_files(name, config, **parts),
        )
        settings = {"dtype": precision.dtype}
        if precision.quantization is not None:
            placement = {} if device.type == "cpu" else {"device_map": device}
            settings = {"quantization": precision.quantization} | placement
        model = AnyLlavaForConditionalGeneration.from_pretrained(name, **base, **settings)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        adapter = Path(name, "adapter_config.json")
        if adapter.is_file():
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            reason = f"it is an adapter of {base!r}, to be found from {str(Path.cwd())!r} or on the Hub ({reason})"
        raise ValueError(f"got model {name!r}; expected a folder or a Hub id of a LLaVA: {reason}") from error
    check_pair(model, processor)
    # Before the model moves: a Space of ZeroGPU cannot compute on its GPU while it loads.
    prepare_for_answering(model, device)
    if precision.quantization is None and device.type != "cpu":
        model = model.to(device)
    return model.eval(), processor


def prepare_for_answering(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """Make a LLaVA answer faster, in place (BENCHMARKS.md, Decoding); afterwards it can only answer.

    Its results change by rounding alone. On a CPU, its weights are packed, and it has attention functions of its own.
    On a GPU, its norms are fused, and so are its projections, unless they are quantized or have an adapter.

    Args:
        model: The model.
        device: Device on which it will answer; its own by default.
    """
    device = model.device if device is None else device
    if device.type == "cpu":
        pack_linear_layers(model)
        use_cpu_attention(model.base_model.language_model)
        use_cpu_attention(model.base_model.vision_tower)
        return
    language_model = model.base_model.language_model
    fuse_norms(language_model)
    if not (getattr(model, "is_quantized", False) or model._hf_peft_config_loaded):
        fuse_projections(language_model)


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; the first GPU by default, or the CPU where there is none.

    Raises:
        ValueError: if this machine does not have it.
    """
    num_gpus = torch.cuda.device_count()
    try:
        found = torch.device(device or ("cuda" if num_gpus else "cpu"))
    except RuntimeError:
        found = None
    if found is None or (found.type == "cuda" and (found.index or 0) >= num_gpus):
        raise ValueError(
            f"got device={str(device)!r}; expected cpu, or cuda:N below the {num_gpus} GPUs of this machine: leave it "
            "out for the fastest"
        )
    return found


# What a model is loaded in.

HEADROOM = 2**29
"""Bytes beside what is predicted: what allocators lose, and work space inside single operations."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", flags=re.IGNORECASE)


class Precision(NamedTuple):
    """What a model is loaded in."""

    dtype: torch.dtype
    """Dtype of the weights, or of those that are not quantized."""
    quantization: str | None

    def __str__(self) -> str:
        return self.quantization or str(self.dtype).removeprefix("torch.")


def parse_memory(text: str) -> int:
    """Bytes of a size as people write it, such as "8GiB", "7.5 GB" or "9000000000".

    Raises:
        ValueError: if it is no size above 0.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"got memory={text!r}; expected a size such as 8GiB")
    number, prefix, is_binary = found.groups()
    power = 0 if prefix is None else "KMGT".index(prefix.upper()) + 1
    return int(float(number) * (1024 if is_binary else 1000) ** power)


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its name.

    Raises:
        ValueError: if no model computes in it.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = known.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"got dtype={str(dtype)!r}; expected one of {', '.join(known)}")
    return found


def choose_dtype(config: AnyLlavaConfig, device: torch.device, *, quantization: str | None = None) -> torch.dtype:
    """The dtype in which `load_for_inference` loads a model, or the part of it that is not quantized."""
    if quantization is not None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if config.dtype is None or (device.type == "cpu" and is_slow_on_cpu(config.dtype)):
        return torch.float32
    return config.dtype


def choose_precision(
    config: AnyLlavaConfig,
    device: torch.device,
    *,
    name: str,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    memory: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Precision:
    """The precision that somebody chose, or the first that fits; one line says so where it is not the usual one.

    Args:
        config: Configuration of the model.
        device: Device on which it will answer.
        name: Its folder or Hub id, for messages.
        dtype: Overrules the choice, and so does `quantization`.
        memory: Bytes that the model and an answer about one picture may take; what is free by default.
        check: Compares the configuration with the files, before it is believed that it does not fit.

    Raises:
        ValueError: if nothing fits, with the bytes that each takes, or the device cannot run what was chosen.
    """
    if dtype is not None and quantization is not None:
        raise ValueError(f"got dtype={dtype!r} and quantization={quantization!r}; expected one of them")
    if dtype is not None:
        return Precision(read_dtype(dtype), None)
    if quantization is not None:
        check_quantization(quantization, device)
        return Precision(choose_dtype(config, device, quantization=quantization), quantization)
    free = count_free_bytes(device) if memory is None else memory
    needs: dict[Precision, int] = {}
    for precision in _list_precisions(config, device):
        needs[precision] = _estimate(config, precision, free=free, check=check if not needs else lambda: None)
        if needs[precision] <= free:
            if len(needs) > 1:
                logger.warning(
                    f"{name} is loaded in {precision}: {_describe(needs)}, and {format_bytes(free)} are free; dtype "
                    "and quantization choose otherwise"
                )
            return precision
    raise ValueError(
        f"got {format_bytes(free)} of memory on {device} for {name}; expected more, since {_describe(needs)}: close "
        "other programs, or take a smaller model; dtype or quantization load it all the same"
    )


def _list_precisions(config: AnyLlavaConfig, device: torch.device) -> list[Precision]:
    """What the device runs, the best first."""
    usual = Precision(choose_dtype(config, device), None)
    if device.type != "cpu":
        names = [key for key in ("int4", "nf4") if importlib.util.find_spec(ON_GPU[key][0]) is not None]
        return [usual, *(Precision(choose_dtype(config, device, quantization=key), key) for key in names)]
    precisions = [usual]
    if usual.dtype == torch.float32 and not is_slow_on_cpu(torch.bfloat16):
        precisions.append(Precision(torch.bfloat16, None))
    if torch.backends.quantized.engine != "none":
        precisions.append(Precision(torch.float32, ON_CPU))
    return precisions


def _estimate(config: AnyLlavaConfig, precision: Precision, *, free: int, check: Callable[[], None]) -> int:
    """Bytes of a model and of an answer about one picture; of the weights alone where they are far below `free`."""
    model = build_without_memory(config, precision.dtype)
    weights = count_weight_bytes(model, precision.quantization)
    if 2 * weights + 2 * HEADROOM <= free:
        return weights
    check()
    settings = {"dtype": precision.dtype, "quantization": precision.quantization, "model": model}
    try:
        predicted = predict_generation(config, **settings).total
    except ValueError:  # a mixture of experts: its operations depend on its data
        predicted = weights * 5 // 4
    if precision.quantization in (None, ON_CPU):
        predicted = max(predicted, predict_loading(config, **settings, num_threads=torch.get_num_threads()))
    return predicted + HEADROOM


def _describe(needs: dict[Precision, int]) -> str:
    return ", ".join(f"{precision} takes {format_bytes(size)}" for precision, size in needs.items())
