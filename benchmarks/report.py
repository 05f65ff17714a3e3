"""BENCHMARKS.md from files of results: tables, plots and what they mean.

    python -m benchmarks.report [benchmarks/results/mid-cpu.json ...] [--out BENCHMARKS.md]

Without names, it takes every file of benchmarks/results. It begins with the rows that are quoted elsewhere, and with
those where ours is behind. What a work is and how it is measured is said once, in the docstring of its file in
benchmarks/, which is quoted here. Tables that single commands have printed are kept as they are, in the .md files of
benchmarks/results.
"""

import argparse
import ast
import json
import textwrap
from pathlib import Path
from typing import Any

from .roofline import find_share
from .timing import Row

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
# fmt: off
FIELDS = {
    "date", "command", "device", "size", "rounds", "threads", "hardware", "versions", "limits", "parts", "failed",
}
# fmt: on
HEADLINES = {
    (
        "chat",
        "turn 2 to the first token",
        "transformers",
    ): "the second question about a picture, until an answer begins",
    ("captioning", "batch captioning, 32 mixed requests", "transformers, batches of 1"): "many requests at once",
    ("preprocessing", "pad, AnyLLaVA, torch", "transformers, PIL"): "pictures to tensors",
    ("decoding", "decode, batch 1, float32", "transformers, compiled"): "one answer, token by token",
    ("training", "training LoRA, checkpointing", "TRL SFTTrainer as it comes"): (
        "LoRA training, both with gradient checkpointing"
    ),
}
"""Part, name and peer of the rows that are quoted, and what they are to somebody who never saw the benchmark."""
INTRODUCTION = """\
## How to read it

Written by `python -m benchmarks.report` from the files of benchmarks/results; `python -m benchmarks --help` makes such
a file. Ours and the peer take turns in one run, with the same weights. A ratio says how many times better ours is;
its spread is that of the rounds. The limit is the least time in which this device could move the bytes and compute
the operations of the work, at the bandwidth of a copy and the rate of a product of matrices measured in the same run.
"""


def read_results(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: naming what it lacks.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or not set(results) >= FIELDS:
        raise ValueError(
            f"got {path}; expected an object with {', '.join(sorted(FIELDS))}: write it with `python -m benchmarks`"
        )
    return results


def render_table(rows: list[Row], *, limits: dict | None = None, device: str = "cpu") -> str:
    """A Markdown table; with limits, also the share of them that is reached."""
    header = ["work", "unit", "ours", "peer", "ratio", *(["of the limit"] if limits else []), "peer is", "note"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        low, high = row["spread"]
        cells = [row["name"], row["unit"], _format(row["ours"]), _format(row["peer"])]
        cells.append(f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})")
        if limits:
            share = find_share(row, limits, device=device)
            cells.append("" if share is None else f"{share:.0%}")
        lines.append(f"| {' | '.join([*cells, row['peer_name'], row.get('note', '')])} |")
    return "\n".join(lines)


def _format(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def render_run(results: dict[str, Any]) -> str:
    """The section of one results file."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    limits = "; ".join(
        f"{dtype} {limit['bytes_per_second'] / 1e9:.0f} GB/s and {limit['operations_per_second'] / 1e12:.2f} TFLOP/s"
        for dtype, limit in results["limits"].items()
    )
    facts = (
        f"{results['date']}, {results['hardware']}, {results['threads']} threads of PyTorch, "
        f"{results['rounds']} rounds; {versions}. `{results['command']}`. Limits: {limits}."
    )
    title = f"## {results['size']} on {results['device']}"
    if "--only" in results["command"]:
        title += f": {', '.join(results['parts'])}"
    sections = [title, textwrap.fill(facts, 119, break_on_hyphens=False)]
    for part, rows in results["parts"].items():
        table = render_table(rows, limits=results["limits"], device=results["device"])
        sections += [f"### {part.capitalize()}", table]
    sections += [f"{part} failed: {message}" for part, message in results["failed"].items()]
    return "\n\n".join(sections) + "\n"


def render_headlines(runs: list[dict[str, Any]]) -> str:
    """The rows of `HEADLINES`, each of the newest run that has it, and the works in which the peer is better."""
    header = ["what", "ours", "the peer's", "ratio", "peer", "row below", "machine"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for (part, name, peer), meaning in HEADLINES.items():
        found = [
            (results["date"], row, results)
            for results in runs
            for row in results["parts"].get(part, [])
            if (row["name"], row["peer_name"]) == (name, peer)
        ]
        if not found:
            continue
        _, row, results = max(found, key=lambda item: item[0])
        cells = [meaning, *(f"{_format(row[side])} {row['unit']}" for side in ("ours", "peer")), f"{row['ratio']:.1f}"]
        machine = f"{results['size']} on {results['device']}: {results['hardware']}"
        lines.append(f"| {' | '.join([*cells, peer, f'{part}: {name}', machine])} |")
    behind = [
        f"{row['name']} ({row['peer_name']}) {row['ratio']:.2f}"
        for results in runs
        for rows in results["parts"].values()
        for row in rows
        if row["ratio"] < 1 and f"{row['ratio']:.2f}" != "1.00"
    ]
    sections = ["# Benchmarks", "\n".join(lines)]
    if behind:
        sections.append(textwrap.fill(f"The peer is better in: {'; '.join(behind)}.", 119, break_on_hyphens=False))
    return "\n\n".join(sections) + "\n"


def render_explanations(parts: list[str]) -> str:
    """What each part is: its docstring, without the command."""
    sections = ["## What is measured"]
    for part in parts:
        docstring = ast.get_docstring(ast.parse((FOLDER / f"{part}.py").read_text(encoding="utf-8")))
        paragraphs = [paragraph for paragraph in docstring.split("\n\n") if not paragraph.startswith("    ")]
        sections += [f"### {part.capitalize()}: how", *paragraphs]
    return "\n\n".join(sections) + "\n"


def render(files: list[Path], *, tables: list[Path]) -> str:
    """The whole of BENCHMARKS.md."""
    runs = [read_results(path) for path in files]
    parts = list(dict.fromkeys(part for results in runs for part in results["parts"]))
    sections = [render_headlines(runs), INTRODUCTION, *(render_run(results) for results in runs)]
    sections += [path.read_text(encoding="utf-8") for path in tables]
    return "\n".join([*sections, render_explanations(parts)])


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Ratios and shares of the limit as pictures; returns their paths."""
    # Not pyplot: it keeps figures, and looks for a screen.
    from matplotlib.figure import Figure

    rows = [row for rows in results["parts"].values() for row in rows]
    shares = [(row, find_share(row, results["limits"], device=results["device"])) for row in rows]
    plots = {
        "ratios": ("times better than the peer", [(_label(row), row["ratio"], row["spread"]) for row in rows], 1.0),
        "limits": (
            "share of what the device can do at most",
            [(_label(row), share, [share, share]) for row, share in shares if share is not None],
            1.0,
        ),
    }
    paths = []
    for name, (title, bars, mark) in plots.items():
        if not bars:
            continue
        figure = Figure(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
        axes = figure.subplots()
        labels, values, spreads = zip(*reversed(bars))
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(values, spreads)],
            [max(0.0, high - value) for value, (_, high) in zip(values, spreads)],
        ]
        axes.barh(range(len(bars)), values, xerr=errors, color="#4477aa", ecolor="#222222")
        axes.set_yticks(range(len(bars)), labels, fontsize=8)
        axes.axvline(mark, color="#222222", linewidth=0.8)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=100)
    return paths


def _label(row: Row) -> str:
    return f"{row['name']} ({row['peer_name']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="of results; all of benchmarks/results by default")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "BENCHMARKS.md")
    arguments = parser.parse_args()
    files = arguments.files or sorted(RESULTS.glob("*.json"))
    arguments.out.write_text(render(files, tables=sorted(RESULTS.glob("*.md"))), encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
