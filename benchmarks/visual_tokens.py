"""Fewer image tokens: the accuracy that they cost, and the time that they save.

    python -m benchmarks.visual_tokens [--samples N] [--out DIR] [--questions FILE] [--model DIR] [--size mid]

Accuracy is that of the embedded model (or `--model`) on held-out questions, at 100, 50, 25 and 12 % of the tokens of
an image. They are chosen by DivPrune, as `visual_tokens` does, and by three baselines that a method has to beat:
random features (seed 0), one of each block of neighbours (strided), and the mean of each block (pooled).
`--questions` is `tests/heldout/questions.json` or the `heldout.json` of build_data; `--samples` takes at most so many
of each task.

Time is that of random weights of `--size`: choosing features, and prefill of an image of 576 tokens and 64 tokens of
text. On a CPU, seconds are CPU time on one thread. Beside both stands what is published for
LLaVA-1.5-7B. Writes results.json and visual_tokens.png to `--out`; what it prints is a section of BENCHMARKS.md:

    python -m benchmarks.visual_tokens > benchmarks/results/visual-tokens.md
"""

import datetime
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference, prepare_for_answering
from modeling_llava.tiny_llava.evaluate import evaluate
from modeling_llava.visual_tokens import choose_features
from processing_llava import AnyLlavaProcessor

from .models import IMAGE_TOKEN_ID, NUM_IMAGE_TOKENS, NUM_TEXT_TOKENS, build_config, build_model
from .roofline import describe_hardware
from .timing import build_parser, default_dtype, interleave, prepare

QUESTIONS = Path(__file__).parents[1] / "tests" / "heldout" / "questions.json"
BLOCKS = {"100 %": (1, 1), "50 %": (1, 2), "25 %": (2, 2), "12 %": (2, 4)}
"""Rows and columns of the block of features of which one is left."""
TOTALS = MEAN, ALL = "mean of tasks", "all questions"

PUBLISHED_SCORES = {
    "DivPrune": {192: 98.0, 128: 96.9, 64: 94.8},
    "VisionZip": {192: 97.9, 128: 96.8, 64: 93.2},
    "FastV": {192: 89.6, 128: 84.4, 64: 75.6},
}
"""LLaVA-1.5-7B by tokens of 576: % of its mean score on nine benchmarks. MMTok (arXiv:2508.18264), table 1; where
papers differ, the lower figure."""
PUBLISHED_TASKS = {
    "GQA": (61.9, 57.8), "MMBench": (64.7, 59.3), "MME": (1862, 1674), "POPE": (85.9, 85.6), "SQA": (69.5, 68.1),
    "VQAv2": (78.5, 74.1), "TextVQA": (58.2, 54.7), "MMMU": (36.3, 35.6), "SEED": (58.6, 55.1),
}  # fmt: skip
"""LLaVA-1.5-7B with all 576 tokens, and with 64 chosen by DivPrune; same table."""
GROUNDING = "RefCOCO at 128 tokens: FastV keeps 18.6 %, SparseVLM 12.8 %, VisionZip 8.1 % (arXiv:2602.02951)"
"""Figures of other methods; DivPrune is not reported there."""

# N features of one image · D text width
Choice = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]
"""Features `[N, D]` of a square image and the block of which one is left -> those that are left."""


def choose_diversely(features_ND: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    (kept,) = choose_features([features_ND], len(features_ND) // (block[0] * block[1]))
    return features_ND[kept]


def choose_randomly(features_ND: torch.Tensor, block: tuple[int, int], *, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(len(features_ND), generator=generator)
    return features_ND[order[: len(order) // (block[0] * block[1])].sort().values.to(features_ND.device)]


def choose_strided(features_ND: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    side = round(len(features_ND) ** 0.5)
    grid = features_ND.unflatten(0, (side, side))
    # The middle of each block, not its corner.
    return grid[block[0] // 2 :: block[0], block[1] // 2 :: block[1]].flatten(0, 1)


def pool(features_ND: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    side = round(len(features_ND) ** 0.5)
    blocks = features_ND.reshape(side // block[0], block[0], side // block[1], block[1], -1)
    return blocks.mean((1, 3)).flatten(0, 1)


def build_choices() -> dict[str, Choice]:
    return {
        "DivPrune": choose_diversely,
        "random": partial(choose_randomly, generator=torch.Generator().manual_seed(0)),
        "strided": choose_strided,
        "pooled": pool,
    }


def measure_accuracy(
    model: PreTrainedModel, processor: AnyLlavaProcessor, questions: Path, *, samples: int | None
) -> dict[str, dict[str, dict[str, float]]]:
    """`{"25 %": {"random": {task: accuracy, ..., "all questions": ..., "mean of tasks": ...}}}`."""
    num_features = model.config.patches_per_side**2
    results: dict[str, dict[str, dict[str, float]]] = {}
    for share, block in BLOCKS.items():
        results[share] = {}
        for name, choose in build_choices().items():
            if block == (1, 1) and results[share]:
                results[share][name] = results[share]["DivPrune"]
                continue
            model.config.visual_tokens = processor.visual_tokens = num_features // (block[0] * block[1])
            # In place of the model's own choice, so that all go the same way.
            model.model.keep_features = lambda images, choose=choose, block=block: [
                choose(features_ND, block) for features_ND in images
            ]
            scores, _ = evaluate(model, processor, questions, limit=samples)
            del model.model.keep_features
            accuracies = {task: score["accuracy"] for task, score in sorted(scores.items())}
            num_right, num_asked = (sum(score[key] for score in scores.values()) for key in ("correct", "total"))
            results[share][name] = {
                **accuracies,
                MEAN: statistics.mean(accuracies.values()),
                ALL: num_right / num_asked,
            }
            print(f"{share} by {name}: {num_right} of {num_asked} right", file=sys.stderr)
    model.config.visual_tokens = processor.visual_tokens = None
    return results


def measure_time(size: str, device: str, *, rounds: int) -> dict[str, dict[str, Any]]:
    """`{"25 %": {"tokens": 144, "choose": seconds, "prefill": seconds, "ratio": ..., "spread": [...]}}`."""
    model = build_model(build_config(size), device=device, dtype=default_dtype(device))
    prepare_for_answering(model)
    width = model.config.text_config.hidden_size
    features_ND = torch.randn(NUM_IMAGE_TOKENS, width, device=device, dtype=model.dtype)
    jobs: dict[str, Callable[[], Any]] = {}
    for share, block in BLOCKS.items():
        num_kept = NUM_IMAGE_TOKENS // (block[0] * block[1])
        jobs[f"choose {share}"] = partial(choose_features, [features_ND], num_kept)
        jobs[f"prefill {share}"] = partial(_prefill, model, features_ND[:num_kept])
    with torch.inference_mode():
        seconds = interleave(jobs, rounds=rounds, device=device)
    results = {}
    for share, block in BLOCKS.items():
        ratios = sorted(full / fewer for full, fewer in zip(seconds["prefill 100 %"], seconds[f"prefill {share}"]))
        results[share] = {
            "tokens": NUM_IMAGE_TOKENS // (block[0] * block[1]),
            "choose": statistics.median(seconds[f"choose {share}"]),
            "prefill": statistics.median(seconds[f"prefill {share}"]),
            "ratio": statistics.median(ratios),
            "spread": [ratios[0], ratios[-1]],
        }
    return results


def _prefill(model: PreTrainedModel, features_ND: torch.Tensor) -> None:
    image = torch.full((len(features_ND),), IMAGE_TOKEN_ID)
    input_ids = torch.cat([image, torch.arange(3, 3 + NUM_TEXT_TOKENS)])[None].to(model.device)
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features_ND])}
    model(input_ids=input_ids, mm_encoder_outputs=encoded, logits_to_keep=1, use_cache=True)


def print_section(results: dict[str, Any]) -> None:
    accuracy, times, settings = results["accuracy"], results["times"], results["settings"]
    methods = accuracy["100 %"]
    print("## Fewer image tokens\n")
    chosen = "all" if settings["samples"] is None else f"at most {settings['samples']} of each task"
    print(f"{results['date']}, {settings['device']}, {results['hardware']}, {results['versions']}.")
    print(f"Questions: {settings['questions']}, {chosen}, put to {settings['model']}.")
    print(f"Times: random weights of size {settings['size']}, median of {settings['rounds']} rounds.")
    print(f"\n| accuracy | {' | '.join(BLOCKS)} |")
    print("|---|" + "---|" * len(BLOCKS))
    for name, scores in methods.items():
        # Single tasks of the baselines stand in results.json.
        for task in scores if name == "DivPrune" else TOTALS:
            cells = [f"{accuracy[share][name][task]:.1%}" for share in BLOCKS]
            print(f"| {name}, {task} | {' | '.join(cells)} |")
    print("\n| tokens of 576 | choosing, ms | prefill, ms | ratio | published for LLaVA-1.5-7B: % of its mean score |")
    print("|---|---|---|---|---|")
    for share, row in times.items():
        spread = f"{row['ratio']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})"
        print(f"| {row['tokens']} ({share}) | {row['choose'] * 1e3:.1f} | {row['prefill'] * 1e3:.0f} | {spread} | |")
    for num_tokens in PUBLISHED_SCORES["DivPrune"]:
        published = ", ".join(f"{name} {scores[num_tokens]}" for name, scores in PUBLISHED_SCORES.items())
        print(f"| {num_tokens} ({num_tokens / 576:.0%}) | | | | {published} |")
    print("\nLLaVA-1.5-7B with all 576 and with 64 tokens by DivPrune (arXiv:2508.18264): ", end="")
    print(", ".join(f"{task} {full} and {fewer}" for task, (full, fewer) in PUBLISHED_TASKS.items()))
    print(GROUNDING)


def plot(accuracy: dict[str, Any], times: dict[str, Any], path: Path) -> None:
    """Accuracy as a share of that with all tokens, and prefill, over the share of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares = [100 / (rows * columns) for rows, columns in BLOCKS.values()]
    for name, full in accuracy["100 %"].items():
        kept = [100 * accuracy[share][name][MEAN] / full[MEAN] for share in BLOCKS]
        left.plot(shares, kept, marker="o", label=f"measured, {name}")
    for name, scores in PUBLISHED_SCORES.items():
        places = [100 * num_tokens / NUM_IMAGE_TOKENS for num_tokens in scores]
        left.plot(places, list(scores.values()), marker="x", linestyle="--", label=f"LLaVA-1.5-7B, {name}, published")
    left.set_ylabel("% of the mean score with all tokens")
    left.legend(fontsize=8)
    right.plot(shares, [row["ratio"] for row in times.values()], marker="o")
    right.set_ylabel("times as fast: prefill of an image and 64 tokens of text")
    for axes in (left, right):
        axes.set_xlabel("% of the tokens of an image")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = build_parser(__doc__, rounds=5)
    parser.add_argument("--samples", type=int, help="at most so many questions of each task; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/visual_tokens"))
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder of a model whose images are one tile")
    arguments = parser.parse_args()
    prepare(arguments.device)
    model, processor = load_for_inference(arguments.model, device=arguments.device)
    accuracy = measure_accuracy(model, processor, arguments.questions, samples=arguments.samples)
    times = measure_time(arguments.size, arguments.device, rounds=arguments.rounds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("samples", "size", "device", "rounds")}
    # Where files lie on this machine is no part of a result.
    settings |= {name: "/".join(Path(getattr(arguments, name)).parts[-2:]) for name in ("questions", "model")}
    results = {
        "date": datetime.date.today().isoformat(),
        "hardware": describe_hardware(arguments.device),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "settings": settings,
        "accuracy": accuracy,
        "times": times,
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(accuracy, times, arguments.out / "visual_tokens.png")
    print_section(results)


if __name__ == "__main__":
    main()
