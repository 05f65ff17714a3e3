"""Memory that this process, or PyTorch on a GPU, holds, and its peak since a moment."""

from pathlib import Path

import torch


def start_peak(device: str) -> int:
    """Begin to measure a peak; returns the bytes that are held now."""
    if device == "cpu":
        # Resets VmHWM; see proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")
        return read_status("VmRSS")
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def read_peak(device: str) -> int:
    """The most bytes that were held since; on a CPU, mapped files included."""
    return read_status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def read_status(field: str) -> int:
    """Bytes of a field of proc_pid_status(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
