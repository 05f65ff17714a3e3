"""Time and peak memory of loading one LLaVA: original layouts with AnyLLaVA, transformers' layout with transformers.

    python -m benchmarks.loading [--size mid] [--rounds 5] [--dtype bfloat16] [--device cpu]

One set of random weights is written in every layout, in bfloat16; of 7 or 13 billion only in transformers'. "mid" has
1.0 billion (CLIP-L/14-336, Llama 12x2048). Each loading is a process of its own, the loaders take turns, and all files
are read once before the first round, so that disks do not count. Weights may stay mapped files until they are used, so
the time ends when every page of every weight was touched. Memory is the peak of what a process allocates itself
(RssAnon), above what it had before; mapped files are not counted, for no loader.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration

from .peak_memory import read_status
from .report import render_table
from .timing import PEER, Row, build_parser, compare, default_dtype, run_apart

LOADERS = {
    PEER: ("transformers", "transformers' own class, its own layout"),
    "transformers-ours": ("transformers", "AnyLLaVA, transformers' layout"),
    "any_llava": ("any_llava", "AnyLLaVA, its own layout"),
    "original": ("original", "AnyLLaVA, original layout, safetensors"),
    "original-bin": ("original-bin", "AnyLLaVA, original layout, two .bin shards"),
}
"""Name to folder and description."""
SMALL_FILES = (PEER, "transformers-ours")
"""The loaders that need one folder of weights only."""
LOADED_MODELS = {
    # Layers and width of the language model, and the loaders.
    "tiny": (2, 256, SMALL_FILES),
    "mid": (12, 2048, tuple(LOADERS)),
    "7b": (32, 4096, SMALL_FILES),
    "13b": (40, 5120, SMALL_FILES),
}


def build_config(layers: int, hidden_size: int) -> PreTrainedConfig:
    """A LLaVA in the shape of the published ones: with their tower, which its configuration names."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336
    )
    vision.projection_dim = 768
    vision.patch_size = 14
    vision.name_or_path = "openai/clip-vit-large-patch14-336"
    text = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=hidden_size // 128,
        vocab_size=32064,
    )
    return AnyLlavaConfig(vision, text, image_token_id=32000, dtype=torch.bfloat16)


def write_layouts(folder: Path, *, layers: int, hidden_size: int, loaders: tuple[str, ...]) -> None:
    """Write the same model in every layout that the loaders read."""
    config = build_config(layers, hidden_size)
    with torch.device("meta"):
        model = AnyLlavaForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        # Norms near 0 would be those of a delta.
        parameter.data.fill_(0.01 if parameter.ndim > 1 else 1.0)
    folders = {LOADERS[loader][0] for loader in loaders}
    for layout in folders & {"any_llava", "original", "transformers"}:
        model.save_pretrained(folder / layout, layout=layout)
    if "original-bin" in folders:
        split_to_bin(folder / "original", folder / "original-bin")


def split_to_bin(source: Path, target: Path) -> None:
    from safetensors.torch import load_file

    target.mkdir()
    shutil.copy(source / "config.json", target)
    weights = load_file(source / "model.safetensors")
    weight_map = {}
    for shard in range(2):
        part = dict(list(weights.items())[shard::2])
        filename = f"pytorch_model-{shard + 1:05}-of-00002.bin"
        torch.save({key: value.clone() for key, value in part.items()}, target / filename)
        weight_map |= dict.fromkeys(part, filename)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load_once(loader: str, folder: Path, *, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Load in this process; returns seconds on the wall and peak bytes."""
    is_peer = loader == PEER
    model_class = LlavaForConditionalGeneration if is_peer else AnyLlavaForConditionalGeneration
    placement = {} if device == "cpu" else {"device_map": device}
    # The CUDA context takes longer than loading.
    torch.zeros(1, device=device)
    before = peak = read_status("RssAnon")
    is_done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.005):
            peak = max(peak, read_status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = model_class.from_pretrained(folder / LOADERS[loader][0], dtype=dtype, **placement)
    for parameter in model.parameters():
        parameter.data.view(-1)[::1024].sum()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    assert model.dtype == dtype
    # Weights are read in 16 bits and written in the dtype of the model.
    num_bytes = sum(2 * parameter.numel() + parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "peak": max(peak, read_status("RssAnon")) - before, "bytes": num_bytes}


def measure(device: str, size: str, rounds: int, *, dtype: torch.dtype | None = None) -> list[Row]:
    """Rows as `benchmarks.timing` describes them: seconds and peak memory of each of our loaders."""
    dtype = dtype or default_dtype(device)
    layers, hidden_size, loaders = LOADED_MODELS[size]
    results: dict[str, list[dict[str, float]]] = {loader: [] for loader in loaders}
    with tempfile.TemporaryDirectory() as name:
        write_layouts(Path(name), layers=layers, hidden_size=hidden_size, loaders=loaders)
        for path in Path(name).rglob("*.*"):
            if path.is_file():
                path.read_bytes()
        arguments = ("--dtype", str(dtype).removeprefix("torch."), "--device", device)
        for _ in range(rounds):
            for loader in loaders:
                results[loader].append(run_apart("benchmarks.loading", "--measure", loader, name, *arguments))
    rows = []
    for field, unit in (("seconds", "s"), ("peak", "MB")):
        runs = {loader: [run[field] for run in results[loader]] for loader in loaders}
        for loader in loaders[1:]:
            title = f"{'loading' if unit == 's' else 'peak memory'}, {LOADERS[loader][1]}"
            work = {"bytes": results[loader][0]["bytes"]} if unit == "s" else {}
            rows.append(compare(title, runs[loader], runs[PEER], unit=unit, peer_name=LOADERS[PEER][1], **work))
    return rows


def main() -> None:
    parser = build_parser(__doc__, rounds=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="the files are bfloat16")
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.measure:
        loader, folder = arguments.measure
        print(json.dumps(load_once(loader, Path(folder), dtype=dtype, device=arguments.device)))
        return
    print(render_table(measure(arguments.device, arguments.size, arguments.rounds, dtype=dtype)))


if __name__ == "__main__":
    main()
