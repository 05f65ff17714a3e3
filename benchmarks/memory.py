"""Peak memory while generating, beside weights and cache, and what `llava doctor` predicts.

    python -m benchmarks.memory [--device cpu] [--size mid]

A checkpoint in transformers' layout is loaded by each class in a process of its own, which answers about a picture of
576 tokens. On a CPU, memory is the peak of what the process holds (VmHWM), mapped files included, above what it held
before loading, when a tiny model had already answered: libraries do not count. On a GPU it is the peak of what PyTorch
allocates there.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.generation_memory import predict_generation, read_config

from .models import (
    IMAGE_TOKEN_ID,
    NUM_IMAGE_TOKENS,
    SIZES,
    TILE_SIZE,
    build_config,
    build_model,
    build_peer,
)
from .peak_memory import read_peak, start_peak
from .report import render_table
from .timing import Row, compare, default_dtype, prepare, release_memory, run_apart

CLASSES = {"ours": AnyLlavaForConditionalGeneration, "peer": LlavaForConditionalGeneration}
NUM_TEXT_TOKENS = 64
NUM_NEW_TOKENS = {"tiny": 8, "mid": 64, "7b": 256, "13b": 256}


def answer(model: PreTrainedModel, *, num_new_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (1, NUM_TEXT_TOKENS), generator=generator)
    input_ids = torch.cat([torch.full((1, NUM_IMAGE_TOKENS), IMAGE_TOKEN_ID), text], dim=1).to(model.device)
    pixel_values = torch.randn(1, 3, TILE_SIZE, TILE_SIZE, generator=generator).to(model.device, model.dtype)
    output_ids = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=pixel_values,
        max_new_tokens=num_new_tokens,
        min_new_tokens=num_new_tokens,
        do_sample=False,
    )
    assert output_ids.shape[1] == input_ids.shape[1] + num_new_tokens


def measure_peak(kind: str, folder: Path, *, device: str, num_new_tokens: int) -> int:
    """Bytes that loading a checkpoint and answering takes in this process."""
    dtype = default_dtype(device)
    tiny = build_model(build_config("tiny"), device=device, dtype=dtype)
    for model in (tiny, build_peer(tiny)):
        answer(model, num_new_tokens=2)
    del model, tiny
    release_memory()
    before = start_peak(device)
    placement = {} if device == "cpu" else {"device_map": device}
    model = CLASSES[kind].from_pretrained(folder, dtype=dtype, **placement).eval()
    answer(model, num_new_tokens=num_new_tokens)
    return read_peak(device) - before


def measure(device: str, size: str, rounds: int) -> list[Row]:
    """The row of `benchmarks.timing`, with `weights_and_cache` and `predicted` in MB. One round tells all."""
    num_new_tokens = NUM_NEW_TOKENS[size]
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(build_config(size), device=device, dtype=default_dtype(device))
        model.save_pretrained(folder, layout="transformers")
        del model
        release_memory()
        arguments = ("--device", device, "--new-tokens", str(num_new_tokens))
        peaks = {
            kind: run_apart("benchmarks.memory", "--measure", kind, folder, *arguments)["peak"] for kind in CLASSES
        }
        predicted = predict_generation(
            read_config(folder),
            dtype=default_dtype(device),
            num_text_tokens=NUM_TEXT_TOKENS,
            num_new_tokens=num_new_tokens,
        )
    weights_and_cache = (predicted.weights + predicted.cache) / 1e6
    return [
        compare(
            f"peak while generating {num_new_tokens} tokens",
            [peaks["ours"]],
            [peaks["peer"]],
            unit="MB",
            weights_and_cache=weights_and_cache,
            predicted=predicted.total / 1e6,
            note=f"weights and cache {weights_and_cache:,.0f} MB, predicted peak {predicted.total / 1e6:,.0f} MB",
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="mid", choices=tuple(SIZES))
    parser.add_argument("--new-tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare(arguments.device)
    if arguments.measure:
        kind, folder = arguments.measure
        peak = measure_peak(kind, Path(folder), device=arguments.device, num_new_tokens=arguments.new_tokens)
        print(json.dumps({"peak": peak}))
        return
    print(render_table(measure(arguments.device, arguments.size, 1)))


if __name__ == "__main__":
    main()
