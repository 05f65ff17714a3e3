"""Images per second from pictures to `pixel_values`: transformers' backends and ours, in one run.

    python -m benchmarks.preprocessing [--images 8] [--rounds 5] [--threads 2]

The pictures are the photographs of the tests, enlarged to common sizes. Seconds are those of the processor on one
thread, so that other work on the machine does not count; the backends take turns, and each round prepares the same
batch. Differences are those of 8-bit levels against our Pillow backend, which the tests compare with the original
LLaVA bit for bit. Transformers picks other tiles for some sizes; those pictures are left out of its differences.
The torchvision backend is measured where torchvision is installed.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.utils import is_torchvision_available

from processing_llava import AnyLlavaImageProcessor, AnyLlavaImageProcessorPil
from processing_llava.conversation_templates import load_template
from processing_llava.prompts import encode_prompt, render_prompt
from processing_llava.sentencepiece_tokenizer import load_sentencepiece_tokenizer

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
SIZES = [(1024, 768), (768, 1024), (640, 480), (480, 640), (1280, 720), (500, 375), (800, 800), (1600, 1200)]
"""(width, height) in pixels."""
TILE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MODES = ("square", "pad", "anyres")
PEER = "transformers, PIL"
EXACT = "AnyLLaVA, pil"


def build_backends(mode: str) -> dict[str, Any]:
    """The image processors of one mode by name."""
    ours = {"image_aspect_ratio": mode, "image_grid_pinpoints": PINPOINTS if mode == "anyres" else None}
    theirs = {"image_grid_pinpoints": PINPOINTS} if mode == "anyres" else {"do_pad": mode == "pad"}
    backends = {PEER: (LlavaNextImageProcessorPil if mode == "anyres" else LlavaImageProcessorPil)(**TILE, **theirs)}
    if is_torchvision_available():
        from transformers import LlavaImageProcessor, LlavaNextImageProcessor

        torchvision_class = LlavaNextImageProcessor if mode == "anyres" else LlavaImageProcessor
        backends["transformers, torchvision"] = torchvision_class(**TILE, **theirs)
    backends[EXACT] = AnyLlavaImageProcessorPil(**TILE, **ours)
    backends["AnyLLaVA, torch"] = AnyLlavaImageProcessor(**TILE, **ours)
    return backends


def make_pictures(num_images: int) -> list[Image.Image]:
    names = sorted(path for path in (GOLDENS / "images").glob("*.png") if "tiny" not in path.name)
    pictures = []
    for number in range(num_images):
        with Image.open(names[number % len(names)]) as image:
            pictures.append(image.convert("RGB").resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC))
    return pictures


def encode_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(jobs: dict[str, Callable[[], Any]], *, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each job in each round; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = clock()
            job()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def find_difference(mode: str, backend: Any, exact: Any, pictures: list[Image.Image]) -> tuple[int, float]:
    """The largest difference in levels, and the share of levels that differ at all."""
    largest, num_different, num_levels = 0, 0, 0
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    for picture in pictures:
        levels, expected = (processor(picture, **options)["pixel_values"] for processor in (backend, exact))
        if levels.shape == expected.shape:
            difference = (levels.float() - expected.float()).abs().round()
            largest = max(largest, int(difference.max()))
            num_different += int((difference > 0).sum())
            num_levels += difference.numel()
    return largest, num_different / num_levels


def print_table(title: str, seconds: dict[str, list[float]], *, num_images: int, notes: dict[str, str]) -> None:
    last = "levels that differ: largest (share)" if notes else ""
    print(f"\n| {title} | images/s | ratio | {last} |\n|---|---|---|---|")
    peer = statistics.median(seconds[PEER])
    for name, runs in seconds.items():
        median = statistics.median(runs)
        spread = f"{num_images / median:.0f} ({num_images / max(runs):.0f} to {num_images / min(runs):.0f})"
        print(f"| {name} | {spread} | {peer / median:.2f} | {notes.get(name, '')} |")


def compare_images(pictures: list[Image.Image], *, rounds: int, threads: int) -> None:
    files = [encode_jpeg(picture) for picture in pictures]
    for mode in MODES:
        backends = build_backends(mode)
        jobs = {
            name: lambda backend=backend: backend(pictures, return_tensors="pt") for name, backend in backends.items()
        }
        differences = {
            name: find_difference(mode, backend, backends[EXACT], pictures) for name, backend in backends.items()
        }
        notes = {name: f"{largest} ({share:.2%})" for name, (largest, share) in differences.items()}
        print_table(mode, measure(jobs, rounds=rounds, clock=time.thread_time), num_images=len(pictures), notes=notes)

    backends = build_backends("pad")
    fast = backends["AnyLLaVA, torch"]

    def open_and_prepare() -> None:
        backends[PEER]([Image.open(io.BytesIO(file)) for file in files], return_tensors="pt")

    jobs = {PEER: open_and_prepare, "AnyLLaVA, torch": lambda: fast(files, return_tensors="pt")}
    seconds = measure(jobs, rounds=rounds, clock=time.thread_time)
    print_table("pad, from JPEG files", seconds, num_images=len(files), notes={})
    if threads > 1:
        threaded = build_backends("pad")["AnyLLaVA, torch"]
        threaded.num_threads = threads
        jobs[f"AnyLLaVA, torch, {threads} threads"] = lambda: threaded(files, return_tensors="pt")
        seconds = measure(jobs, rounds=rounds, clock=time.perf_counter)
        print_table("pad, from JPEG files, by the clock on the wall", seconds, num_images=len(files), notes={})


def compare_prompts(*, rounds: int) -> None:
    """Ids of a prompt with one image: the expanded text tokenised, as transformers does, and image ids written."""
    tokenizer = load_sentencepiece_tokenizer(GOLDENS)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    content = [{"type": "image"}, {"type": "text", "text": "What is unusual about this image?"}]
    prompt = render_prompt([{"role": "user", "content": content}], load_template("vicuna_v1"))
    print("\n| tokens of an image | expanded text, ms | ids, ms | ratio |\n|---|---|---|---|")
    for num_tokens in (576, 2880):
        image = {"image_token": "<image>", "image_token_id": image_id, "num_image_tokens": [num_tokens]}
        expanded = prompt.replace("<image>", "<image>" * num_tokens)
        jobs = {
            "text": lambda expanded=expanded: [tokenizer(expanded) for _ in range(20)],
            "ids": lambda image=image: [encode_prompt(prompt, tokenizer, **image) for _ in range(20)],
        }
        seconds = measure(jobs, rounds=rounds, clock=time.thread_time)
        text, ids = (statistics.median(seconds[name]) / 20 * 1000 for name in jobs)
        print(f"| {num_tokens} | {text:.2f} | {ids:.2f} | {text / ids:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=len(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="also measure so many, by the clock on the wall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare_images(make_pictures(arguments.images), rounds=arguments.rounds, threads=arguments.threads)
    compare_prompts(rounds=arguments.rounds)


if __name__ == "__main__":
    main()
