"""What a device is: whether it is slow with 16-bit floats, and how much memory it has left.

transformers gives a model the dtype that its checkpoint was stored in. A CPU without units for 16-bit floats takes
several times longer with them than with 32-bit ones (a prefill on AVX2: six times), for the same answers.
"""

import os
from typing import Any

import torch

DTYPE_SETTINGS = ("dtype", "torch_dtype", "device_map", "quantization_config")
"""Arguments of `from_pretrained` that settle floats or device; "auto" is a choice, too."""


def is_slow_on_processor(dtype: torch.dtype | str | None) -> bool:
    """Whether this machine's processor computes these floats more slowly than float32.

    bfloat16 has units in processors with AVX512_BF16 or AMX. float16 counts as slow on all: those units do not compute
    it, and where others do, it is no faster than float32.

    Args:
        dtype: Also as config.json writes it. None, where it does not say, is not slow.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return name == "float16"


def with_default_dtype(settings: dict[str, Any], *, stored: torch.dtype | str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`, with float32 where nobody chose and the model will run on a slow processor."""
    is_chosen = any(settings.get(name) is not None for name in DTYPE_SETTINGS)
    if is_chosen or torch.accelerator.is_available() or not is_slow_on_processor(stored):
        return settings
    return settings | {"dtype": torch.float32}


def count_free_bytes(device: torch.device) -> int:
    """Memory that a new model can use. sysconf knows no better than free pages outside Linux."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def format_bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
