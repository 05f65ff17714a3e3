"""Images that strangers send: `python -m tests.processing_llava.hostile_images` prints what each costs, as JSON.

They are loaded one after the other in this process; before each, what others freed goes back to the system. Time is
that of the processor: other work on the machine does not count.
"""

import ctypes
import json
import struct
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.processing_llava.hostile_objects import HANDLED_OBJECTS, REFUSED_OBJECTS
from tests.processing_llava.image_encoders import (
    JPEG_QUANTA,
    animated_webp,
    arithmetic_jpeg,
    bmp,
    encode,
    gif_canvas,
    jpeg_frame,
    jpeg_scan,
    jpeg_segment,
    lossless_webp,
    png,
    png_chunk,
    progressive_jpeg,
    riff_chunk,
    sequential_jpeg,
    vp8l,
    vp8l_of_groups,
    webp_of_groups,
    webp_of_transparent_groups,
)


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


def exif_orientation(value: int, *, kind: int = 3, count: int = 1, order: str = "<") -> bytes:
    """A block with the orientation as an entry of any form."""
    entry = struct.pack(f"{order}HHLHH", 0x0112, kind, count, value, 0)
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LH", 8, 1) + entry + bytes(4)


def turn_jpeg(data: bytes, block: bytes) -> bytes:
    return data[:2] + exif_segments(block) + data[2:]


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
    "orientations of other types": lambda: png(
        9, 6, before=b"".join(png_chunk(b"eXIf", exif_orientation(6, kind=kind)) for kind in (1, 4, 5, 7, 12))
    ),
    "orientation of a million values": lambda: png(9, 6, before=png_chunk(b"eXIf", exif_orientation(6, count=10**6))),
    "orientation of 65535": lambda: turn_jpeg(sequential_jpeg(9, 6), exif_orientation(65_535, order=">")),
    "WebP of 1,000 groups of codes": lambda: webp_of_groups(500, 500, groups=1000),
    "WebP of 1,000 groups of the largest codes": lambda: webp_of_groups(500, 500, groups=1000, longest=True),
    "text of 30 MB in a PNG": lambda: png(8, 8, before=png_chunk(b"tEXt", b"a\0" + bytes(29_900_000))),
    "unknown chunk of 30 MB in a PNG": lambda: png(8, 8, before=png_chunk(b"abCd", bytes(29_900_000))),
    "comments in a JPEG": lambda: jpeg(segments=b"\xff\xfe\0\2" * 19_000),
    "compressed profile": lambda: png(8, 8, before=png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
}
REFUSED: dict[str, Callable[[], bytes]] = {
    "1 x 6000": lambda: png(1, 6000),
    "6000 x 1": lambda: png(6000, 1),
    "13000 x 13000, header": lambda: png(13_000, 13_000, pixels=b""),
    "169 megapixels in 164 KB": lambda: png(13_000, 13_000),
    "WebP of 268 megapixels": lambda: b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xfe\xff\xff\x0f" + bytes(8),
    "palette that is missing": lambda: png(100, 100, colour=3),
    "palette that is missing, with transparency": lambda: png(100, 100, colour=3, before=png_chunk(b"tRNS", bytes(9))),
    "JPEG of many tables": lambda: jpeg(segments=JPEG_QUANTA * 20_000),
    "JPEG of large tables": lambda: jpeg(segments=(b"\xff\xdb\xff\xdd" + (bytes(1) + bytes([1]) * 64) * 1007) * 300),
    "JPEG of segments between its scans": lambda: jpeg_frame(
        0xC0, 100, 100, jpeg_scan(range(1, 2)) + b"\xff\xfe\0\2" * 10**6 + jpeg_scan(range(2, 4))
    ),
    **{
        f"JPEG of 19,000 segments {marker:X}": lambda marker=marker, content=content: jpeg(
            segments=jpeg_segment(marker, content) * 19_000
        )
        for marker, content in ((0xE0, b""), (0xEE, b""), (0xDD, bytes(2)), (0xC4, bytes(17)))
    },
    "WebP of 15,625 groups of codes": lambda: webp_of_groups(500, 500, groups=15_625),
    "WebP of 62,500 groups of codes": lambda: webp_of_groups(1000, 1000, groups=62_500),
    "WebP whose transparency has 15,625 groups of codes": lambda: webp_of_transparent_groups(500, 500, groups=15_625),
    "animated WebP of 15,625 groups of codes": lambda: animated_webp(
        500, 500, riff_chunk(b"VP8L", vp8l_of_groups(500, 500, groups=15_625)), (500, 500)
    ),
    "PNG with a palette of 30 MB": lambda: png(8, 8, colour=3, before=png_chunk(b"PLTE", bytes(29_900_000))),
    "PNG with transparency of 30 MB": lambda: png(8, 8, colour=2, before=png_chunk(b"tRNS", bytes(29_900_000))),
    "PNG with 19,000 palettes": lambda: png(8, 8, colour=3, before=png_chunk(b"PLTE", b"") * 19_000),
    "lossless JPEG": lambda: jpeg_frame(0xC3, 100, 100, jpeg_scan(range(1, 4))),
    "JPEG of two frames": lambda: jpeg_frame(0xC0, 9, 9, jpeg_frame(0xC0, 8000, 8000, jpeg_scan(range(1, 4)))[2:]),
    "JPEG of impossible factors": lambda: jpeg_frame(0xC0, 100, 100, jpeg_scan(range(1, 2)), factors=(0x00,)),
    "lossless WebP of 64 megapixels in 34 bytes": lambda: lossless_webp(8000, 8000),
    "GIF of 64 megapixels with one pixel": lambda: gif_canvas(8000, 8000),
    "arithmetic CMYK JPEG of 64 megapixels": lambda: arithmetic_jpeg(8000, 8000, scans=50, components=4),
    "grey PNG of 64 megapixels with a transparent level": lambda: png(
        8000, 8000, depth=16, before=png_chunk(b"tRNS", bytes(2))
    ),
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


TRANSPARENT_COLOUR = png_chunk(b"tRNS", bytes(6))
PALETTE = png_chunk(b"PLTE", bytes(768))
OF_ANY_SIZE: dict[str, Callable[[int, int], bytes]] = {
    "arithmetic JPEG": arithmetic_jpeg,
    "arithmetic JPEG of one component": partial(arithmetic_jpeg, components=1),
    "arithmetic CMYK JPEG of 50 scans": partial(arithmetic_jpeg, scans=50, components=4),
    "progressive JPEG of averages": partial(progressive_jpeg, scans=1),
    "JPEG of 50 scans": partial(progressive_jpeg, scans=50),
    "CMYK JPEG of 50 scans": partial(progressive_jpeg, scans=50, components=4),
    "JPEG of 50 scans of averages": partial(progressive_jpeg, scans=50, averages=True),
    "grey JPEG of 50 scans that refine": partial(progressive_jpeg, scans=50, components=1, refines=True),
    "JPEG whose components come one by one": sequential_jpeg,
    "GIF of one pixel on a canvas": gif_canvas,
    "lossless WebP of one colour": lossless_webp,
    "animated WebP of few pixels on a canvas": lambda width, height: animated_webp(
        width, height, riff_chunk(b"VP8L", vp8l(8, 8)), (8, 8)
    ),
    "animated WebP": lambda width, height: animated_webp(
        width, height, riff_chunk(b"VP8L", vp8l(width, height)), (width, height)
    ),
    "BMP of one bit": partial(bmp, bits=1),
    "BMP of 24 bits": bmp,
    "BMP of 32 bits": partial(bmp, bits=32),
    "BMP without rows": partial(bmp, rows=b""),
    "grey PNG of one bit": partial(png, depth=1),
    "grey PNG of 16 bits": partial(png, depth=16),
    "grey PNG of 16 bits with a transparent level": partial(png, depth=16, before=png_chunk(b"tRNS", bytes(2))),
    "grey PNG of 16 bits with alpha": partial(png, depth=16, colour=4),
    "RGB PNG, every filter the slowest": partial(png, colour=2, filter=4),
    "RGB PNG with a transparent colour": partial(png, colour=2, before=TRANSPARENT_COLOUR),
    "RGBA PNG of 16 bits, every filter the slowest": partial(png, depth=16, colour=6, filter=4),
    "interlaced PNG": partial(png, colour=2, interlace=1),
    "interlaced RGBA PNG of 16 bits": partial(png, depth=16, colour=6, interlace=1, filter=4),
    "PNG with a palette of transparency": partial(png, colour=3, before=PALETTE + png_chunk(b"tRNS", bytes(256))),
    "PNG that is turned": lambda width, height: png(
        width, height, colour=2, before=png_chunk(b"eXIf", exif_orientation(6))
    ),
    "JPEG that is turned": lambda width, height: turn_jpeg(sequential_jpeg(width, height), exif_orientation(5)),
}
"""What a picture of each kind costs is known before it is decoded; a size is refused, or cheap."""
MEGAPIXELS = (24, 12, 8, 6, 4, 2, 1, 0.5, 0.1)


def prepare(data: object, *, backend: str, image_aspect_ratio: str, **limits: int) -> tuple[int, ...]:
    """The shape of what a model gets."""
    from processing_llava.image_limits import ImageLimits
    from processing_llava.processing_llava import IMAGE_BACKENDS

    pinpoints = [[336, 672], [672, 336], [672, 672]] if image_aspect_ratio == "anyres" else None
    processor = IMAGE_BACKENDS[backend](
        image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=pinpoints, limits=ImageLimits(**limits)
    )
    return tuple(processor(data)["pixel_values"].shape)


def load(data: object, **limits: int) -> tuple[int, int]:
    from processing_llava.image_limits import ImageLimits
    from processing_llava.image_loading import load_image

    return load_image(data, limits=ImageLimits(**limits)).size


LARGE_ARRAYS: dict[str, Callable[[], object]] = {
    "bytes of 24 megapixels": lambda: np.full((4000, 6000, 3), 7, np.uint8),
    "floats of 24 megapixels": lambda: np.full((4000, 6000, 3), 0.5, np.float32),
    "tensor of 24 megapixels": lambda: torch.full((3, 4000, 6000), 0.5),
}
"""What is reduced as it is read."""
HALF_THE_TIME = {"max_milliseconds": 100}
"""What is allowed by it takes less than all of it on a machine that is twice as slow."""


def measure(data: object, work: Callable[[object], object] = load) -> dict[str, object]:
    """Seconds and bytes that an image takes, and how it ends."""
    # What was freed before would be taken without being seen; 5 makes Linux forget the most memory until here.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = read_memory("VmRSS"), time.process_time()
    try:
        outcome = str(work(data))
    except Exception as error:
        # `MissingImage` is a ValueError, too.
        name = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        outcome = f"{name}: {error}"
    seconds, num_bytes = time.process_time() - start, read_memory("VmHWM") - before
    return {"seconds": seconds, "bytes": num_bytes, "outcome": outcome}


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
    objects = {**HANDLED_OBJECTS, **REFUSED_OBJECTS}
    results = {name: measure(build()) for name, build in {**HANDLED, **REFUSED, **objects}.items()}
    for name, build in OF_ANY_SIZE.items():
        for megapixels in MEGAPIXELS:
            height = int((megapixels * 750_000) ** 0.5)
            data = build(height * 4 // 3, height)
            results[f"{name}, {megapixels} megapixels"] = result = measure(data, partial(load, **HALF_THE_TIME))
            if result["outcome"].startswith("("):
                for kind in ("pil pad", "torch anyres"):
                    work = partial(PREPARED[kind], **HALF_THE_TIME)
                    results[f"{name}, {megapixels} megapixels, {kind}"] = measure(data, work)
                break
    for name, build in {**HANDLED, **HANDLED_OBJECTS, **LARGE_ARRAYS}.items():
        results |= {f"{name}, {kind}": measure(build(), work) for kind, work in PREPARED.items()}
    sys.stdout.write(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
