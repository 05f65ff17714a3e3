"""Time and peak memory of loading one LLaVA: original layouts with AnyLLaVA, transformers' layout with transformers.

    python -m benchmarks.loading [--layers 12] [--hidden-size 2048] [--rounds 5] [--dtype float32]

One set of random weights is written in every layout. Each loading is a process of its own, the loaders take turns, and
all files are read once before the first round, so that disks do not count. Weights may stay mapped files until they
are used, so the time ends when every page of every weight was touched. Memory is the peak of what a process allocates
itself (RssAnon), above what it had before; mapped files are not counted, for no loader.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

LOADERS = {
    "transformers": ("transformers", "transformers' own class, its own layout"),
    "transformers-ours": ("transformers", "AnyLLaVA, transformers' layout"),
    "any_llava": ("any_llava", "AnyLLaVA, its own layout"),
    "original": ("original", "AnyLLaVA, original layout, safetensors"),
    "original-bin": ("original-bin", "AnyLLaVA, original layout, two .bin shards"),
}
"""Name to folder and description."""


def write_layouts(folder: Path, *, layers: int, hidden_size: int) -> int:
    """Write the same model in every layout; returns the bytes of its weights."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336
    )
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
    config = AnyLlavaConfig(vision, text, image_token_id=32000, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = AnyLlavaForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    for layout in ("any_llava", "original", "transformers"):
        model.save_pretrained(folder / layout, layout=layout)
    split_to_bin(folder / "original", folder / "original-bin")
    return sum(parameter.nbytes for parameter in model.parameters())


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


def own_memory() -> int:
    """Bytes that this process has allocated and touched."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(loader: str, folder: Path, dtype: torch.dtype) -> None:
    """Load once in this process and print seconds and peak bytes as JSON."""
    from transformers import LlavaForConditionalGeneration

    import modeling_llava

    is_peer = loader == "transformers"
    model_class = LlavaForConditionalGeneration if is_peer else modeling_llava.AnyLlavaForConditionalGeneration
    before = peak = own_memory()
    is_done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.005):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = model_class.from_pretrained(folder / LOADERS[loader][0], dtype=dtype)
    for parameter in model.parameters():
        parameter.data.view(-1)[::1024].sum()
    seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    assert model.dtype == dtype
    print(json.dumps({"seconds": seconds, "peak": max(peak, own_memory()) - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="the files are bfloat16")
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]), dtype)
        return
    with tempfile.TemporaryDirectory() as name:
        num_bytes = write_layouts(Path(name), layers=arguments.layers, hidden_size=arguments.hidden_size)
        for path in Path(name).rglob("*.*"):
            if path.is_file():
                path.read_bytes()
        results: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
        for _ in range(arguments.rounds):
            for loader in LOADERS:
                command = [sys.executable, "-m", "benchmarks.loading", "--measure", loader, name]
                command += ["--dtype", arguments.dtype]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results[loader].append(json.loads(output.splitlines()[-1]))
    num_bytes = num_bytes * dtype.itemsize // 2
    print(f"{num_bytes / 1e9:.2f} GB in {arguments.dtype}, {arguments.rounds} rounds, median (smallest to largest)\n")
    print("| loader | seconds | ratio | peak memory / weights |")
    print("|---|---|---|---|")
    peer = statistics.median(run["seconds"] for run in results["transformers"])
    for loader, runs in results.items():
        seconds = sorted(run["seconds"] for run in runs)
        median = statistics.median(seconds)
        peak = max(run["peak"] for run in runs) / num_bytes
        spread = f"{median:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        print(f"| {LOADERS[loader][1]} | {spread} | {peer / median:.2f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
