"""Precision of a model that answers: the best dtype, or else fewer bits, for which the memory that is free is enough.

Nearly every original checkpoint is float16, which a CPU computes as float32: twice the bytes of the files. Where that
does not fit, bfloat16 may, on a CPU with units for it, or int8; on a GPU 4 bits.
"""

import importlib.util
import re
from typing import NamedTuple

import torch
from transformers.utils import logging

from modeling_llava.acceleration.devices import count_free_bytes, format_bytes, is_slow_on_processor
from modeling_llava.acceleration.quantization import ON_GPU, ON_PROCESSOR, check_quantization
from modeling_llava.configuration_llava import AnyLlavaConfig

from .generation_memory import choose_dtype, count_weight_bytes, predict_generation, predict_loading

logger = logging.get_logger(__name__)

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


def choose_precision(
    config: AnyLlavaConfig,
    device: torch.device,
    *,
    name: str,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    memory: int | None = None,
) -> Precision:
    """The precision that somebody chose, or the first that fits; one line says so where it is not the usual one.

    Args:
        config: Configuration of the model.
        device: Device on which it will answer.
        name: Its folder or Hub id, for messages.
        dtype: Overrules the choice, and so does `quantization`.
        memory: Bytes that the model and an answer about one picture may take; what is free by default.

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
        needs[precision] = _estimate(config, precision, free=free)
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
    if usual.dtype == torch.float32 and not is_slow_on_processor(torch.bfloat16):
        precisions.append(Precision(torch.bfloat16, None))
    if torch.backends.quantized.engine != "none":
        precisions.append(Precision(torch.float32, ON_PROCESSOR))
    return precisions


def _estimate(config: AnyLlavaConfig, precision: Precision, *, free: int) -> int:
    """Bytes of a model and of an answer about one picture; of the weights alone where they are far below `free`."""
    weights = count_weight_bytes(config, dtype=precision.dtype, quantization=precision.quantization)
    if 2 * weights + 2 * HEADROOM <= free:
        return weights
    settings = {"dtype": precision.dtype, "quantization": precision.quantization}
    try:
        predicted = predict_generation(config, **settings).total
    except ValueError:  # a mixture of experts: its operations depend on its data
        predicted = weights * 5 // 4
    if precision.quantization in (None, ON_PROCESSOR):
        predicted = max(predicted, predict_loading(config, **settings, num_threads=torch.get_num_threads()))
    return predicted + HEADROOM


def _describe(needs: dict[Precision, int]) -> str:
    return ", ".join(f"{precision} takes {format_bytes(size)}" for precision, size in needs.items())
