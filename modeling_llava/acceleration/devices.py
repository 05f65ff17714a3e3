"""What a device can do: compute in 16 bits or only in 32, and hold so many more bytes.

transformers loads a model in the dtype of its checkpoint, since `dtype="auto"` is its default (transformers 5.23,
modeling_utils.py). A CPU without units for that dtype is slower with it than with float32.
"""

import contextlib
import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
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
    """Memory that a new model can use, within the limits of a container; outside Linux only the free pages of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return min([int(fields["MemAvailable"].split()[0]) * 1024, *_list_cgroup_bytes()])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _list_cgroup_bytes(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What is left of each memory limit around this process: Docker, Kubernetes and systemd set them as cgroups.

    Args:
        root: Where cgroups are mounted: version 2, or version 1 with a folder of its own for memory.
        process: What the kernel says of the process.
    """
    found = []
    for line in process.read_text().splitlines() if process.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folder = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A container may see its own cgroup as the root, under a path of its host.
        inner = folder / path.lstrip("/")
        for group in {folder, inner, *inner.parents} - set(folder.parents):
            limit, usage, stat = group / names[0], group / names[1], group / "memory.stat"
            if not (limit.exists() and usage.exists() and stat.exists()) or limit.read_text().strip() == "max":
                continue
            # The kernel drops pages of files that were not used lately before it refuses memory.
            pages = dict(line.split() for line in stat.read_text().splitlines())
            found.append(int(limit.read_text()) - int(usage.read_text()) + int(pages.get(names[2], 0)))
    return found


def release_mapped(tensors: Iterable[torch.Tensor]) -> None:
    """Give back the memory that tensors of mapped files take, once they were read for the last time.

    Linux counts the pages of a mapped file to the process that read them until the file is closed, and a file of a
    checkpoint stays open for as long as one of its tensors is in use. What a tensor holds is read again if need be.

    Args:
        tensors: Those of memory that is no file, and those of other systems, stay as they are. None may have been
            written to.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in _select_mapped(tensors):
        # The pages that hold nothing else.
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def copy_mapped(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors of mapped files memory of their own, in place."""
    for tensor in _select_mapped(tensors):
        stored, tensor.data = tensor.data, tensor.data.clone()
        release_mapped([stored])


@contextlib.contextmanager
def returning_memory() -> Iterator[None]:
    """Have blocks above 1 MiB go back to the system when they are freed.

    glibc keeps what is below a threshold, which grows to 32 MiB by itself (mallopt(3)): a model of 1 billion weights
    that were converted one by one took 30 % more memory than it has. Who set MALLOC_TRIM_THRESHOLD_ or
    MALLOC_MMAP_THRESHOLD_ has chosen, and setting it here would undo that.
    """
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ)
    if platform.libc_ver()[0] != "glibc" or chosen:
        yield
        return
    mallopt, m_mmap_threshold = ctypes.CDLL(None).mallopt, -3
    mallopt(m_mmap_threshold, 2**20)
    try:
        yield
    finally:
        mallopt(m_mmap_threshold, 2**25)


def _select_mapped(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those that lie in mapped files; none on other systems than Linux."""
    files = _list_mapped_files() if sys.platform.startswith("linux") else []

    def is_mapped(tensor: torch.Tensor) -> bool:
        if tensor.layout != torch.strided:  # a packed one, without an address
            return False
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(first <= start and end <= last for first, last in files)

    return [tensor for tensor in tensors if is_mapped(tensor)]


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
