"""The limits of the device, measured in the same run, and the share of them that a row of results reaches.

The least time for some work is that of moving its bytes at the bandwidth of a large copy, or that of its operations
at the rate of a large product of matrices, whichever is longer. What is surprising: a share can be above 1. A copy
reads and writes, which is slower than only reading; and what fits into the cache of a CPU is not read from memory.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_llava.acceleration.cpu_layers import PackedLinear

from .timing import TIME_UNITS, Row, default_dtype, interleave

DTYPES = (torch.float32, torch.bfloat16)
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}

Limits = dict[str, dict[str, float]]
"""`{"float32": {"bytes_per_second": ..., "operations_per_second": ...}, "bfloat16": ...}`; a multiplication and the
addition after it are two operations."""


def describe_hardware(device: str) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu = f"{os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), {memory:.0f} GiB"
    if device == "cpu":
        return cpu
    return f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB, beside {cpu}"


def measure_limits(device: str) -> Limits:
    """The best of three rounds: other work on the machine can only slow the device down."""
    limits = {}
    for dtype in DTYPES:
        source = torch.ones(COPIED_BYTES[device] // dtype.itemsize, dtype=dtype, device=device)
        target = torch.empty_like(source)
        size = MATRIX_SIZE[device]
        # Random elements: equal ones take less power, with which a GPU runs faster than at work.
        matrix = torch.randn(size, size, dtype=dtype, device=device)
        multiply = partial(torch.mm, matrix)
        if device == "cpu":
            # The product that ours runs on a CPU; torch.mm alone may be below the limit.
            multiply = PackedLinear(nn.Linear(size, size, bias=False, dtype=dtype))
        jobs = {"copy": partial(target.copy_, source), "multiply": partial(multiply, matrix)}
        seconds = {name: min(times) for name, times in interleave(jobs, rounds=3, device=device).items()}
        limits[str(dtype).removeprefix("torch.")] = {
            "bytes_per_second": 2 * source.nbytes / seconds["copy"],
            "operations_per_second": 2 * size**3 / seconds["multiply"],
        }
    return limits


def count_operations(job: Callable[[], Any]) -> int:
    """Multiplications and additions of matrices and attention in a job, which is run.

    Causal attention counts as half of its square; on a GPU, whose kernels PyTorch counts itself, as the whole.
    """
    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
        torch.ops.mkldnn._linear_pointwise: _count_packed_product,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        job()
    return counter.get_total_flops()


def _count_packed_product(inputs_LI: torch.Size, weight_OI: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * inputs_LI.numel() * weight_OI[0]


def _count_attention(
    query_BHLD: torch.Size,
    key_BHLD: torch.Size,
    value_BHLD: torch.Size,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> int:
    """Operations of the kernel of a CPU, which PyTorch does not count (torch 2.13, utils/flop_counter.py).

    The arguments are shapes instead of tensors.
    """
    *rows, num_queries, width = query_BHLD
    products = 2 * math.prod(rows) * num_queries * key_BHLD[-2] * (width + value_BHLD[-1])
    return products // 2 if is_causal else products


def _count_attention_backward(
    gradient_BHLD: torch.Size,
    query_BHLD: torch.Size,
    key_BHLD: torch.Size,
    value_BHLD: torch.Size,
    output_BHLD: torch.Size,
    logsumexp_BHL: torch.Size,
    dropout_p: float,
    is_causal: bool,
    **kwargs: Any,
) -> int:
    """Operations of the backward pass: five products where forward has two.

    They are the scores again, and the gradients of values, scores, queries and keys.
    """
    return _count_attention(query_BHLD, key_BHLD, value_BHLD, dropout_p, is_causal) * 5 // 2


def count_weights(*modules: nn.Module) -> int:
    """Bytes of the weights of modules, which a job reads at least once."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def find_share(row: Row, limits: Limits, *, device: str) -> float | None:
    """Least time by time taken; None for a row that names neither bytes nor operations."""
    if "bytes" not in row and "operations" not in row:
        return None
    limit = limits[row.get("dtype", str(default_dtype(device)).removeprefix("torch."))]
    least = max(
        row.get("bytes", 0) / limit["bytes_per_second"], row.get("operations", 0) / limit["operations_per_second"]
    )
    taken = row["ours"] * TIME_UNITS[row["unit"]] if row["unit"] in TIME_UNITS else 1 / row["ours"]
    return least / taken
