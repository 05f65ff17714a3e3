"""Images that strangers send: `python -m tests.processing_llava.hostile_images` prints what each costs, as JSON.

Every image is loaded in a process of its own, forked from one that has imported everything, so that its memory is its
own. Time is that of the processor: other work on the machine does not count.
"""

import io
import json
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, before: bytes = b"", pixels: bytes | None = None) -> bytes:
    """Black, with other chunks in front of the pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + width) * height)) if pixels is None else pixels
    end = png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + end


def jpeg(*, segments: bytes = b"", scans: int = 0) -> bytes:
    """A progressive JPEG with other segments at its start, or its last scan again and again."""
    data = encode(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:2] + segments + data[2:-2] + last * scans + data[-2:]


def gif(*, blocks: bytes = b"", num_frames: int = 1) -> bytes:
    """An animation with other blocks in front of its first picture."""
    frames = [Image.new("L", (64, 64), level % 256) for level in range(num_frames)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    start = 13 + (3 << ((data[10] & 7) + 1)) * (data[10] >> 7)
    return data[:start] + blocks + data[start:]


def run_length_bmp(side: int) -> bytes:
    """Two bytes for each row: nothing in it."""
    start = 14 + 40 + 4 * 256
    rows = b"\0\0" * side + b"\0\1"
    header = struct.pack("<LLLHHLLLLLL", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<LLL", start + len(rows), 0, start) + header + bytes(4 * 256) + rows


def exif_that_points_at_itself(size: int) -> bytes:
    """Each entry is the whole block."""
    num_entries = (size - 14) // 12
    entries = b"".join(
        struct.pack("<HHLL", number, 1, size - 8, 8) for number in range(0x8000, 0x8000 + min(num_entries, 0x7000))
    )
    block = b"II*\0" + struct.pack("<LH", 8, len(entries) // 12) + entries + bytes(4)
    return block + bytes(size - len(block))


def exif_segments(block: bytes) -> bytes:
    """Pillow joins them."""
    parts = [block[start : start + 65_000] for start in range(0, len(block), 65_000)]
    return b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts)


def grey_with_alpha_palette() -> Image.Image:
    image = Image.new("P", (1000, 1000))
    image.putpalette(bytes(range(256)) * 3)
    image.info["transparency"] = bytes(range(256))
    return image


TRUNCATED = encode(Image.effect_noise((512, 512), 80), "JPEG")
HANDLED: dict[str, Callable[[], bytes]] = {
    "1 x 1": lambda: png(1, 1),
    "500 frames": lambda: gif(num_frames=500),
    "16 bits": lambda: encode(Image.new("I;16", (1000, 1000), 30_000)),
    "CMYK JPEG": lambda: encode(Image.new("CMYK", (1000, 1000), (9, 99, 9, 9)), "JPEG"),
    "palette with transparency": lambda: encode(grey_with_alpha_palette()),
    "EXIF of 5 MB in a JPEG": lambda: jpeg(segments=exif_segments(exif_that_points_at_itself(5_000_000))),
    "EXIF of 5 MB in a PNG": lambda: png(8, 8, before=png_chunk(b"eXIf", exif_that_points_at_itself(5_000_000))),
    "compressed texts": lambda: png(8, 8, before=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))) * 9000),
    "7900 x 400": lambda: encode(Image.new("L", (7900, 400))),
    "compressed profile": lambda: png(8, 8, before=png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
}
REFUSED: dict[str, Callable[[], bytes]] = {
    "1 x 6000": lambda: png(1, 6000),
    "6000 x 1": lambda: png(6000, 1),
    "13000 x 13000, header": lambda: png(13_000, 13_000, pixels=b""),
    "169 megapixels in 164 KB": lambda: png(13_000, 13_000),
    "WebP of 268 megapixels": lambda: b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xfe\xff\xff\x0f" + bytes(8),
    "truncated": lambda: TRUNCATED[: len(TRUNCATED) // 2],
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + b"0 0 moveto\n" * 1000,
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": lambda: b"%PDF-1.7\n" + bytes(1000),
    "zero bytes": lambda: b"",
    "text": lambda: b"just some text",
    "BMP of 64 megapixels in 17 KB": lambda: run_length_bmp(8000),
    "5000 frames": lambda: gif(num_frames=5000),
    "empty chunks": lambda: png(8, 8, before=png_chunk(b"abCd", b"") * 10**6),
    "empty pixel chunks": lambda: png(8, 8, before=png_chunk(b"IDAT", b"") * 10**6),
    "empty segments": lambda: jpeg(segments=b"\xff\xe5\x00\x02" * 10**6),
    "filling bytes": lambda: jpeg(segments=b"\xff" * 10**7),
    "junk": lambda: jpeg(segments=b"a" * 10**7),
    "scans": lambda: jpeg(scans=10**5),
    "comments": lambda: gif(blocks=b"!\xfe" + b"\x01a" * 10**6 + b"\0"),
    "extensions": lambda: gif(blocks=b"!\xff\x01a\0" * 10**6),
    "WebP chunks": lambda: b"RIFF" + struct.pack("<L", 8 * 10**6 + 4) + b"WEBP" + b"abcd\0\0\0\0" * 10**6,
}


def prepare(data: bytes, *, backend: str, image_aspect_ratio: str) -> tuple[int, ...]:
    """The shape of what a model gets."""
    from processing_llava.processing_llava import IMAGE_BACKENDS

    pinpoints = [[336, 672], [672, 336], [672, 672]] if image_aspect_ratio == "anyres" else None
    processor = IMAGE_BACKENDS[backend](image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=pinpoints)
    return tuple(processor(data)["pixel_values"].shape)


def load(data: bytes) -> tuple[int, int]:
    from processing_llava.image_loading import load_image

    return load_image(data).size


def measure(data: bytes, work: Callable[[bytes], object] = load) -> dict[str, object]:
    """Seconds and bytes that an image takes, and how it ends."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before, start = read_memory("VmRSS"), time.process_time()
        try:
            outcome = str(work(data))
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        seconds, num_bytes = time.process_time() - start, read_memory("VmHWM") - before
        os.write(writer, json.dumps({"seconds": seconds, "bytes": num_bytes, "outcome": outcome}).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as results:
        result = results.read()
    os.waitpid(child, 0)
    return json.loads(result)


PREPARED = {
    f"{backend} {mode}": partial(prepare, backend=backend, image_aspect_ratio=mode)
    for backend in ("pil", "torch")
    for mode in ("pad", "square", "anyres")
}
"""Whatever can be loaded can be prepared."""


def read_memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    # Imports, and with them the plugins of Pillow, are no cost of an image.
    torch.set_num_threads(1)
    for work in (load, *PREPARED.values()):
        work(png(400, 400))
    Image.init()
    results = {name: measure(build()) for name, build in {**HANDLED, **REFUSED}.items()}
    for name, build in HANDLED.items():
        results |= {f"{name}, {kind}": measure(build(), work) for kind, work in PREPARED.items()}
    sys.stdout.write(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
