"""Everything that the benchmarks measure, in one run.

    python -m benchmarks [--device cpu] [--size mid] [--only NAME[:CHOICE],...] [--rounds 3] [--out runs/benchmarks]

Each part of `PARTS` is a file with `measure(device, size, rounds)`, which gives rows as `timing.Row` describes them
(none where its peer is not installed), and a command of its own. Ours and the peer take turns within a part. Results
are written after every row to results.json, for `python -m benchmarks.report`, with the limits of the device and, at
the end, plots. A part that fails is named there, keeps the rows that it gave, and does not stop the others; the
command then ends with status 1. A choice makes a part shorter: `decoding:1` decodes batches of 1 only,
`captioning:8` gives the peer batches of 8 at once, and `training:lora` trains adapters only.
"""

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .report import draw, render_table
from .roofline import describe_hardware, measure_limits
from .timing import build_parser, prepare, release_memory

PARTS = (
    "start",
    "loading",
    "preprocessing",
    "decoding",
    "llama_cpp",
    "chat",
    "captioning",
    "memory",
    "training",
    "small_machine",
)
CHOICES = {"decoding": "batches", "captioning": "peer_batch_sizes", "training": "stages"}
"""Parts that can be told to measure less, and the argument of `measure` that says so."""
PACKAGES = ("anyllava", "torch", "torchvision", "transformers", "trl", "pillow", "llama_cpp_python")


def describe_run(device: str, *, size: str, rounds: int) -> dict[str, Any]:
    """Date, machine and versions; nothing is measured yet."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip(),
        "device": device,
        "size": size,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "hardware": describe_hardware(device),
        "versions": {"python": platform.python_version(), **installed},
        "limits": {},
        "parts": {},
        "failed": {},
    }


def write_results(results: dict[str, Any], folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def choose_parts(text: str | None) -> dict[str, dict[str, Any]]:
    """The parts that a list of names, separated by commas, means, with the arguments that their choices are.

    Raises:
        ValueError: naming those that there are.
    """
    if text is None:
        return {part: {} for part in PARTS}
    parts: dict[str, dict[str, Any]] = {}
    for item in text.split(","):
        name, _, choice = item.partition(":")
        if name not in PARTS or (choice and name not in CHOICES):
            raise ValueError(
                f"got --only {text}; expected some of {','.join(PARTS)}, with a choice behind {', '.join(CHOICES)}"
            )
        settings = parts.setdefault(name, {})
        if choice:
            settings[CHOICES[name]] = (*settings.get(CHOICES[name], ()), int(choice) if choice.isdecimal() else choice)
    return parts


def main() -> None:
    parser = build_parser(__doc__)
    parser.prog = "python -m benchmarks"
    parser.add_argument("--only", metavar="NAME[:CHOICE],...", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"got --rounds {arguments.rounds}; expected at least 1")
    try:
        parts = choose_parts(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    device, size, rounds = arguments.device, arguments.size, arguments.rounds
    prepare(device)
    results = describe_run(device, size=size, rounds=rounds)
    results["limits"] = measure_limits(device)
    for part, settings in parts.items():
        try:
            for row in import_module(f"benchmarks.{part}").measure(device, size, rounds, **settings):
                results["parts"].setdefault(part, []).append(row)
                write_results(results, arguments.out)
        except Exception as error:
            traceback.print_exc()
            results["failed"][part] = f"{type(error).__name__}: {error}".split("\n")[0]
        if part in results["parts"]:
            table = render_table(results["parts"][part], limits=results["limits"], device=device)
            print(table, end="\n\n", flush=True)
        release_memory()
    write_results(results, arguments.out)
    draw(results, arguments.out)
    print(f"{arguments.out}/results.json; failed: {', '.join(results['failed']) or 'none'}")
    sys.exit(1 if results["failed"] else 0)


if __name__ == "__main__":
    main()
