"""Peak memory while generating, beside weights and KV cache, and what `llava doctor` predicts.

    python -m benchmarks.memory [--device cpu] [--size mid]

A checkpoint in transformers' layout is loaded by each class in a process of its own, which answers about a picture of
576 tokens. On a CPU, memory is the peak of what the process holds while it answers (VmHWM), mapped files included,
above what it held before loading, when a tiny model had already answered: libraries do not count. For every class,
glibc is told to give back what is freed (MALLOC_TRIM_THRESHOLD_), of which it keeps tens of megabytes otherwise. On a
GPU memory is the peak of what PyTorch allocates there. `benchmarks.loading` measures loading.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.inference.generation_memory import predict_generation, read_config
from modeling_llava.inference.loading import prepare_for_answering

from .models import (
    IMAGE_TOKEN_ID,
    NUM_IMAGE_TOKENS,
    NUM_TEXT_TOKENS,
    TILE_SIZE,
    build_config,
    build_model,
    build_peer,
)
from .peak_memory import read_peak, start_peak
from .report import render_table
from .timing import Row, build_parser, compare, default_dtype, prepare, release_memory, run_apart

KINDS = {"cpu": ("peer", "ours", "int8"), "cuda": ("peer", "ours")}
GIVING_BACK = {"MALLOC_TRIM_THRESHOLD_": str(2**20)}
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


def load(kind: str, folder: Path, *, device: str) -> PreTrainedModel:
    """A model of this name in `KINDS`, in evaluation mode."""
    if kind == "int8":
        model = AnyLlavaForConditionalGeneration.from_pretrained(folder, quantization="int8")
    else:
        model_class = LlavaForConditionalGeneration if kind == "peer" else AnyLlavaForConditionalGeneration
        placement = {} if device == "cpu" else {"device_map": device}
        model = model_class.from_pretrained(folder, dtype=default_dtype(device), **placement)
    if kind != "peer":
        prepare_for_answering(model)
    return model.eval()


def measure_peak(kind: str, folder: Path, *, device: str, num_new_tokens: int) -> int:
    """Bytes that a loaded checkpoint takes in this process while it answers."""
    dtype = default_dtype(device)
    tiny = build_model(build_config("tiny"), device=device, dtype=dtype)
    peer = build_peer(tiny)
    prepare_for_answering(tiny)
    for model in (tiny, peer):
        answer(model, num_new_tokens=2)
    del model, tiny, peer
    release_memory()
    before = start_peak(device)
    model = load(kind, folder, device=device)
    start_peak(device)
    answer(model, num_new_tokens=num_new_tokens)
    return read_peak(device) - before


def measure(device: str, size: str, rounds: int) -> list[Row]:
    """Rows as `benchmarks.timing` describes them, with `weights_and_cache` and `predicted` in MB, of one round."""
    num_new_tokens = NUM_NEW_TOKENS[size]
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(build_config(size), device=device, dtype=default_dtype(device))
        model.save_pretrained(folder, layout="transformers")
        del model
        release_memory()
        arguments = ("--device", device, "--new-tokens", str(num_new_tokens))
        run = partial(run_apart, "benchmarks.memory", environment=GIVING_BACK)
        peaks = {kind: run("--measure", kind, folder, *arguments)["peak"] for kind in KINDS[device]}
        predict = partial(
            predict_generation,
            read_config(folder),
            dtype=default_dtype(device),
            num_text_tokens=NUM_TEXT_TOKENS,
            num_new_tokens=num_new_tokens,
        )
        predicted = {kind: predict(quantization="int8" if kind == "int8" else None) for kind in KINDS[device][1:]}
    rows = []
    for kind, memory in predicted.items():
        weights_and_cache = (memory.weights + memory.cache) / 1e6
        rows.append(
            compare(
                f"peak while generating {num_new_tokens} tokens{', int8' if kind == 'int8' else ''}",
                [peaks[kind]],
                [peaks["peer"]],
                unit="MB",
                weights_and_cache=weights_and_cache,
                predicted=memory.total / 1e6,
                note=f"weights and cache {weights_and_cache:,.0f} MB, predicted peak {memory.total / 1e6:,.0f} MB",
            )
        )
    return rows


def main() -> None:
    parser = build_parser(__doc__, rounds=None)
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
