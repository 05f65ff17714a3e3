"""What a device can do: compute in 16 bits or only in 32, and hold so many more bytes.

transformers loads a model in the dtype of its checkpoint, since `dtype="auto"` is its default (transformers 5.23,
modeling_utils.py). A CPU without units for that dtype is slower with it than with float32.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch

DTYPE_SETTINGS = ("dtype", "torch_dtype", "device_map", "quantization_config")
"""Arguments of `from_pretrained` that settle dtype or device; "auto" is a choice, too."""


def is_slow_on_cpu(dtype: torch.dtype | str | None) -> bool:
    """Whether the CPU of this machine computes a dtype more slowly than float32.

    CPUs with AVX512_BF16 or AMX have units for bfloat16. float16 counts as slow on all of them.

    Args:
        dtype: Also as config.json writes it. None, where it does not say, is not slow.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return name == "float16"


def with_default_dtype(settings: dict[str, Any], *, stored: torch.dtype | str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`, with float32 where nobody chose and the CPU is slow in the stored dtype."""
    is_chosen = any(settings.get(name) is not None for name in DTYPE_SETTINGS)
    if is_chosen or torch.accelerator.is_available() or not is_slow_on_cpu(stored):
        return settings
    return settings | {"dtype": torch.float32}


def count_free_bytes(device: torch.device) -> int:
    """Memory that a new model can use; outside Linux only the free pages of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def release_mapped(tensors: Iterable[torch.Tensor]) -> None:
    """Give back the memory that tensors of mapped files take, once they were read for the last time.

    Linux counts the pages of a mapped file to the process that read them until the file is closed, and a file of a
    checkpoint stays open for as long as one of its tensors is in use. What a tensor holds is read again if need be.

    Args:
        tensors: Those of memory that is no file, and those of other systems, stay as they are. None may have been
            written to.
    """
    if not sys.platform.startswith("linux"):
        return
    files = _list_mapped_files()
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        # The pages that hold nothing else.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end and any(first <= start and end <= last for first, last in files):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _list_mapped_files() -> list[tuple[int, int]]:
    """First and last address of each file that is mapped into this process."""
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0":
                first, last = addresses.split("-")
                found.append((int(first, 16), int(last, 16)))
    return found


def format_bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
