"""How every benchmark measures: its options, jobs that take turns, their seconds, and the rows of results.

On a CPU, seconds are CPU time on one thread, so that other work on the machine does not count. On a GPU they are wall
clock time, from an idle device to an idle device: the time in which the host starts kernels counts too.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

PEER = "transformers"
SIZES = ("tiny", "mid", "7b", "13b")
"""Sizes of models; each benchmark says which they are."""
TIME_UNITS = {"s": 1.0, "ms": 1e-3}
"""Units of time, in seconds; any other unit is an amount a second, where larger is better."""

Row = dict[str, Any]
"""One figure of ours beside one of a peer.

    name        of the work, e.g. "decode, batch 8"
    ours, peer  medians in `unit`
    unit        "s", "ms", "MB" (smaller is better), or an amount a second, "tokens/s" (larger is better)
    ratio       how many times better ours is
    spread      smallest and largest ratio of the rounds
    peer_name   who the peer is
    bytes, operations
                optional: what the work must move and compute at least: the whole work where `unit` is a time, one
                token, image or row where it is an amount a second.
    dtype       optional: of the arithmetic, e.g. "float32"
    note        optional: what else there is to say
"""


def build_parser(description: str, *, rounds: int | None = 3) -> argparse.ArgumentParser:
    """The options that benchmarks share; `rounds` is None for a benchmark without rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="mid", choices=SIZES)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def prepare(device: str) -> None:
    """Set the number of threads, or find the GPU; called once before anything is measured."""
    if device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit(f"got --device {device} on a machine without GPU; expected --device cpu")


def default_dtype(device: str) -> torch.dtype:
    """The dtype of both sides: float32 on a CPU, since most have no units for 16 bits."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def clock(device: str) -> float:
    """The time in seconds, when the device has done all its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(jobs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Results of each job in each round. All jobs run in every round; a first round does not count."""
    values: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            value = job()
            if number:
                values[name].append(value)
    return values


def interleave(
    jobs: dict[str, Callable[[], Any]], *, rounds: int, device: str, clock: Callable[[str], float] = clock
) -> dict[str, list[float]]:
    """Seconds of each job in each round, by `take_turns`."""

    def measure(job: Callable[[], Any]) -> float:
        start = clock(device)
        job()
        return clock(device) - start

    return take_turns({name: partial(measure, job) for name, job in jobs.items()}, rounds)


def compare(
    name: str,
    ours: list[float],
    peer: list[float],
    *,
    unit: str = "s",
    amount: float | None = None,
    peer_name: str = PEER,
    **extras: Any,
) -> Row:
    """The row of two lists of seconds, or of bytes, one of each round.

    Args:
        name: Name of the work.
        ours: Values of our side.
        peer: Values of the other side.
        unit: Unit of the figures that are printed.
        amount: Tokens, images or rows of one job, where the unit is an amount a second.
        peer_name: Name of the other side.
        **extras: Further fields of the row: bytes, operations, dtype, note.
    """
    ratios = sorted(theirs / own for own, theirs in zip(ours, peer, strict=True))

    def convert(values: list[float]) -> float:
        median = statistics.median(values)
        if amount is not None:
            return amount / median
        return median / 1e6 if unit == "MB" else median / TIME_UNITS[unit]

    return {
        "name": name,
        "ours": convert(ours),
        "peer": convert(peer),
        "ratio": statistics.median(peer) / statistics.median(ours),
        "spread": [ratios[0], ratios[-1]],
        "unit": unit,
        "peer_name": peer_name,
        **extras,
    }


def run_apart(module: str, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a module in a process of its own; returns the JSON object that it prints last.

    Args:
        environment: Variables beside those of this process.

    Raises:
        RuntimeError: with what it wrote, if it fails.
    """
    variables = os.environ | (environment or {})
    run = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=variables)
    if run.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def release_memory() -> None:
    """Give back what models that are gone have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
