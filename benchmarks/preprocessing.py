"""Images per second from pictures to `pixel_values`: transformers' backends and ours, in one run.

    python -m benchmarks.preprocessing [--images 8] [--rounds 5] [--threads 2]

The pictures are the photographs of the tests, enlarged to common sizes, as tiles of 336 pixels. Seconds are CPU time
on one thread, whatever the device; the backends take turns, and each round prepares the same batch.
Differences are those of 8-bit levels against our Pillow backend, which the tests compare with the original LLaVA bit
for bit. Transformers picks other tiles for some sizes; those pictures are left out of its differences. The torchvision
backend is measured where torchvision is installed. From JPEG files, most of the time goes into decoding, which is
Pillow's for all. For a prompt with one image, transformers tokenizes a text of placeholders; AnyLLaVA writes ids.
"""

import argparse
import io
import time
from itertools import cycle
from typing import Any

from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.utils import is_torchvision_available

from processing_llava import AnyLlavaImageProcessor, AnyLlavaImageProcessorPil
from processing_llava.original.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from processing_llava.prompt_ids import encode_prompt
from processing_llava.prompts import render_prompt
from processing_llava.templates import load_template

from .models import GOLDENS
from .report import render_table
from .timing import Row, compare, interleave, prepare

PICTURE_SIZES = [(1024, 768), (768, 1024), (640, 480), (480, 640), (1280, 720), (500, 375), (800, 800), (1600, 1200)]
"""(width, height) in pixels."""
NUM_IMAGES = {"tiny": 2, "mid": len(PICTURE_SIZES), "7b": len(PICTURE_SIZES), "13b": len(PICTURE_SIZES)}
TILE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MODES = ("square", "pad", "anyres")
PILLOW = "transformers, PIL"
TORCHVISION = "transformers, torchvision"
EXACT = "AnyLLaVA, pil"
FAST = "AnyLLaVA, torch"


def build_backends(mode: str) -> dict[str, Any]:
    """The image processors of one mode by name."""
    ours = {"image_aspect_ratio": mode, "image_grid_pinpoints": PINPOINTS if mode == "anyres" else None}
    theirs = {"image_grid_pinpoints": PINPOINTS} if mode == "anyres" else {"do_pad": mode == "pad"}
    backends = {PILLOW: (LlavaNextImageProcessorPil if mode == "anyres" else LlavaImageProcessorPil)(**TILE, **theirs)}
    if is_torchvision_available():
        from transformers import LlavaImageProcessor, LlavaNextImageProcessor

        torchvision_class = LlavaNextImageProcessor if mode == "anyres" else LlavaImageProcessor
        backends[TORCHVISION] = torchvision_class(**TILE, **theirs)
    backends[EXACT] = AnyLlavaImageProcessorPil(**TILE, **ours)
    backends[FAST] = AnyLlavaImageProcessor(**TILE, **ours)
    return backends


def make_pictures(num_images: int) -> list[Image.Image]:
    names = sorted(path for path in (GOLDENS / "images").glob("*.png") if "tiny" not in path.name)
    pictures = []
    for _, name, size in zip(range(num_images), cycle(names), cycle(PICTURE_SIZES)):
        with Image.open(name) as image:
            pictures.append(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    return pictures


def encode_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def cpu_seconds(device: str) -> float:
    """CPU time of this thread, on which pictures are prepared wherever the model is."""
    return time.thread_time()


def describe_difference(backend: Any, exact: Any, pictures: list[Image.Image]) -> str:
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
    if not num_levels:
        return "other tiles for every picture"
    return f"largest difference {largest} levels, in {num_different / num_levels:.2%}"


def compare_images(pictures: list[Image.Image], *, rounds: int) -> list[Row]:
    """Rows of each of our backends beside each of transformers', from pictures in memory."""
    rows = []
    for mode in MODES:
        backends = build_backends(mode)
        jobs = {
            name: lambda backend=backend: backend(pictures, return_tensors="pt") for name, backend in backends.items()
        }
        seconds = interleave(jobs, rounds=rounds, device="cpu", clock=cpu_seconds)
        prepared = backends[EXACT](pictures, return_tensors="pt")["pixel_values"]
        num_bytes = sum(3 * picture.width * picture.height for picture in pictures) + prepared.nbytes
        notes = {name: describe_difference(backend, backends[EXACT], pictures) for name, backend in backends.items()}
        for ours in (EXACT, FAST):
            for peer in (name for name in (PILLOW, TORCHVISION) if name in backends):
                rows.append(
                    compare(
                        f"{mode}, {ours}",
                        seconds[ours],
                        seconds[peer],
                        unit="images/s",
                        amount=len(pictures),
                        peer_name=peer,
                        note=f"{notes[ours]}; {peer}: {notes[peer]}",
                        bytes=num_bytes / len(pictures),
                    )
                )
    return rows


def compare_files(pictures: list[Image.Image], *, rounds: int, threads: int) -> list[Row]:
    """Rows from JPEG files; several threads are timed by the wall clock."""
    files = [encode_jpeg(picture) for picture in pictures]
    backends, threaded = build_backends("pad"), build_backends("pad")[FAST]
    threaded.num_threads = threads

    def open_and_prepare() -> None:
        backends[PILLOW]([Image.open(io.BytesIO(file)) for file in files], return_tensors="pt")

    jobs = {"ours": lambda: backends[FAST](files, return_tensors="pt"), "peer": open_and_prepare}
    names = {"unit": "images/s", "amount": len(files), "peer_name": PILLOW}
    seconds = interleave(jobs, rounds=rounds, device="cpu", clock=cpu_seconds)
    rows = [compare(f"pad, from JPEG files, {FAST}", seconds["ours"], seconds["peer"], **names)]
    if threads > 1:
        jobs["ours"] = lambda: threaded(files, return_tensors="pt")
        seconds = interleave(jobs, rounds=rounds, device="cpu", clock=lambda device: time.perf_counter())
        title = f"pad, from JPEG files, {FAST}, {threads} threads, on the wall"
        rows.append(compare(title, seconds["ours"], seconds["peer"], **names))
    return rows


def compare_prompts(*, rounds: int) -> list[Row]:
    """Rows of prompts with one image: transformers tokenizes the expanded text, and ours writes image ids."""
    tokenizer = load_sentencepiece_tokenizer(GOLDENS)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    content = [{"type": "image"}, {"type": "text", "text": "What is unusual about this image?"}]
    prompt = render_prompt([{"role": "user", "content": content}], load_template("vicuna_v1"))
    rows = []
    for num_tokens in (576, 2880):
        image = {"image_token": "<image>", "image_token_id": image_id, "num_image_tokens": [num_tokens]}
        expanded = prompt.replace("<image>", "<image>" * num_tokens)
        jobs = {
            "ours": lambda image=image: [encode_prompt(prompt, tokenizer, **image) for _ in range(20)],
            "peer": lambda expanded=expanded: [tokenizer(expanded) for _ in range(20)],
        }
        seconds = interleave(jobs, rounds=rounds, device="cpu", clock=cpu_seconds)
        title = f"prompts with an image of {num_tokens} tokens"
        rows.append(compare(title, seconds["ours"], seconds["peer"], unit="prompts/s", amount=20))
    return rows


def measure(device: str, size: str, rounds: int, *, num_images: int | None = None, threads: int = 1) -> list[Row]:
    """Rows of images and prompts, as `benchmarks.timing` describes them."""
    prepare("cpu")
    pictures = make_pictures(num_images or NUM_IMAGES[size])
    return [
        *compare_images(pictures, rounds=rounds),
        *compare_files(pictures, rounds=rounds, threads=threads),
        *compare_prompts(rounds=rounds),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=len(PICTURE_SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="also measure so many, by the wall clock")
    arguments = parser.parse_args()
    rows = measure("cpu", "mid", arguments.rounds, num_images=arguments.images, threads=arguments.threads)
    print(render_table(rows))


if __name__ == "__main__":
    main()
