"""Opened files -> RGB pictures, within a budget of memory and time that is checked before a pixel is decoded.

A decoder in C cannot be stopped: the header tells what it will cost, at rates measured with files made to be slow (one
core of an AMD EPYC, Pillow 12.3). Where the budget asks for it and a vision tower needs far fewer pixels, libjpeg
decodes at a part of the size (`Image.draft`), and pixels are averaged (`Image.reduce`), as long as three remain, on
each axis, for one that is needed: tiles change by two levels of 255 at most, but for one value in a few thousand.

What may surprise: pixels are converted in bands, so that no picture of another mode is ever whole beside the RGB one;
and of PNG, whose time no header tells, the decoder gets small pieces until its time is over.
"""

import io
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageFile
from transformers.utils import logging

from .image_arrays import ArrayImage
from .image_limits import ImageLimits, check_costs, read_jpeg, shorten
from .image_webp import read_webp_costs

logger = logging.get_logger(__name__)

MIN_RATIO = 2.9
"""Three, of 8000 pixels at a quarter for 672."""
MAX_DECODING = 128_000_000
"""Bytes that all threads of a process may decode into together; a single picture may take more."""
BAND_PIXELS = 125_000
TILES = 2_000_000
"""Bytes of what is made for a model."""
PNG_PIECE, PNG_SHARE = 2048, 0.95
"""Bytes, and the share of the time after which no more follow."""

Need = Callable[[int, int], tuple[float, float, float]]
"""Of an upright picture's height and width: rows and columns that suffice, and pixels that are read for the tiles."""

# EXIF orientation -> what brings the stored pixels upright; 1 means "leave as it is".
_TURN = Image.Transpose
UPRIGHT = {2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE}
UPRIGHT |= {6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90}
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}
"""Bytes that Pillow keeps for a pixel, where they are not four."""


@dataclass(frozen=True)
class Picture:
    """An upright RGB image of a picture, which may have more pixels."""

    image: Image.Image
    height: int
    width: int
    """Of the picture."""
    box: tuple[float, float, float, float]
    """Left, top, right and bottom of the picture in pixels of the image, of which the last may show less."""

    @property
    def is_reduced(self) -> bool:
        return self.image.size != (self.width, self.height)

    def reduce(self, factor: int) -> "Picture":
        """The same from fewer pixels."""
        return Picture(self.image.reduce(factor), self.height, self.width, tuple(side / factor for side in self.box))


class _Memory:
    """Bytes that threads have taken to decode into."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.taken = 0

    @contextmanager
    def take(self, num_bytes: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + num_bytes <= MAX_DECODING)
            self.taken += num_bytes
        try:
            yield
        finally:
            with self.changed:
                self.taken -= num_bytes
                self.changed.notify_all()


_memory = _Memory()
if os.name == "posix":
    # Threads that held some are not in a child.
    os.register_at_fork(after_in_child=_memory.__init__)


class EncodedFile(io.BytesIO):
    """What Pillow reads; a reader that is too slow is stopped.

    Args:
        data: The encoded image.
        is_copy: Whether it takes memory beside what the caller holds.
        seconds: What it took to get the bytes.
    """

    deadline = math.inf

    def __init__(self, data: bytes, *, is_copy: bool, seconds: float = 0.0) -> None:
        super().__init__(data)
        self.data = data
        self.is_copy = is_copy
        self.seconds = seconds

    def read(self, size: int | None = -1) -> bytes:
        if time.thread_time() > self.deadline:
            raise TimeoutError
        return super().read(size)


@contextmanager
def decode(
    image: Image.Image | ArrayImage,
    file: EncodedFile | None,
    orientation: int,
    owned: Image.Image | None,
    *,
    limits: ImageLimits,
    need: Need | None,
) -> Iterator[Picture]:
    """A picture, which counts as in memory until the context ends.

    Args:
        image: With its header read, and its size checked.
        file: What it is read from; None if its pixels are there.
        orientation: From EXIF, 1 to 8.
        owned: The same image as its owner opened it from a path: to read it closes its file.
        limits: What is refused.
        need: None for all pixels.

    Raises:
        ValueError: damaged, of a mode without a range of values, or above the limits.
    """
    _check_mode(image)
    width, height = image.size
    upright = (width, height) if orientation >= 5 else (height, width)
    is_changed = orientation != 1 or image.mode != "RGB" or "transparency" in image.info
    is_changed = is_changed or isinstance(image, ArrayImage)
    draft, factor, memory, rest = _plan(image, file, upright, is_changed=is_changed, limits=limits, need=need)
    with _memory.take(memory):
        has_16_bits, start = _has_16_bits(image), time.thread_time()
        try:
            if draft == 1 and owned is not None:
                image = owned
            if draft > 1:
                image.draft(None, (width // draft, height // draft))
            if image.format == "PNG" and file is not None:
                image.decodermaxblock = PNG_PIECE
                file.deadline = start + PNG_SHARE * limits.max_milliseconds / 1000 - rest - file.seconds
            image.load()
            if image.mode == "P" and image.palette is None:
                raise ValueError("no palette")
            if has_16_bits:
                _warn_of_few_levels(image)
            if is_changed:
                image = _show(image, factor, orientation)
            elif factor > 1:
                image = image.reduce(factor)
        except TimeoutError:
            seconds = time.thread_time() - start + rest + file.seconds
            check_costs(*upright, {"max_milliseconds": 1000 * seconds / PNG_SHARE}, limits=limits)
        except MemoryError:
            raise
        except Exception as error:
            # Whatever Pillow trips over is damage of the file.
            raise ValueError(
                f"got an image that cannot be decoded ({shorten(error) or type(error).__name__}); expected a whole "
                "image; save it again"
            ) from error
        yield Picture(image, *upright, _find_box(image.size, upright, draft * factor, orientation))


def _plan(
    image: Image.Image | ArrayImage,
    file: EncodedFile | None,
    upright: tuple[int, int],
    *,
    is_changed: bool,
    limits: ImageLimits,
    need: Need | None,
) -> tuple[int, int, int, float]:
    """Of all ways to read a picture that the budget allows, the one that reduces it least.

    Returns:
        The part of its size at which it is decoded, the factor by which it is reduced then, bytes that this takes, and
        seconds after decoding.
    """
    num_pixels, work, largest, narrowed = image.width * image.height, 0, 1, 0
    if need is not None:
        height, width, work = need(*upright)
        largest = max(1, int(min(upright[0] / height, upright[1] / width) / MIN_RATIO))
        # All rows, of fewer columns, are in memory, of which Pillow or the system keep as much again; and tiles.
        narrowed = 8 * width * upright[0]
    num_bytes = seconds = pixel_bytes = pixel_seconds = 0
    changed = 4
    if isinstance(image, ArrayImage):
        seconds, changed = image.seconds, 2 if image.mode == "RGB" else 4
    if file is not None:
        num_bytes, seconds, pixel_bytes, pixel_seconds = _read_costs(image, file, limits)
        num_bytes += file.is_copy * len(file.data)
        seconds += file.seconds
    drafts = (1, 2, 4, 8) if image.format == "JPEG" and file is not None else (1,)
    # One that is averaged is nearer to the whole picture than one that is decoded at a part of its size.
    for scale, draft in product(range(1, largest + 1), drafts):
        if scale % draft:
            continue
        num_decoded = math.ceil(image.width / draft) * math.ceil(image.height / draft)
        num_shown, is_copied = num_pixels / scale**2, is_changed or scale > draft
        memory = num_bytes + pixel_bytes * num_decoded + 4 * num_shown * is_copied
        memory += narrowed / scale + min(TILES, narrowed)
        rest = 1e-9 * ((changed if is_changed else 1.2 * is_copied) * num_decoded + 6 * work / scale**2)
        milliseconds = 1000 * (seconds + pixel_seconds * num_decoded + rest)
        if memory <= limits.max_memory and milliseconds <= limits.max_milliseconds:
            return draft, scale // draft, int(memory), rest
    costs = {"max_memory": math.ceil(memory), "max_milliseconds": math.ceil(milliseconds)}
    check_costs(*upright, costs, limits=limits)
    raise AssertionError("a picture that costs too much was refused")


def _read_costs(image: Image.Image, file: EncodedFile, limits: ImageLimits) -> tuple[float, float, float, float]:
    """Bytes and seconds that decoding takes, and those for each pixel of the result."""
    num_bytes, num_stored = len(file.data), _BYTES.get(image.mode, 4)
    if image.format == "JPEG":
        return _read_costs_of_jpeg(file, num_stored, limits)
    if image.format == "WEBP":
        # Two canvases, a frame as bytes, libwebp's own pixels, and two copies of the file.
        code_bytes, code_seconds = read_webp_costs(file.data)
        return 2 * num_bytes + code_bytes, 27e-9 * num_bytes + code_seconds, 17, 22e-9
    if image.format == "PNG":
        # Half of the worst, as photographs are; where the time is over, the decoder stops.
        return 0, 0, num_stored, 4.2e-9 * len(image.getbands()) * (1 + _has_16_bits(image))
    # Codes of a GIF may stand for nothing.
    return 0, (10e-9 if image.format == "GIF" else 1e-9) * num_bytes, num_stored, 10e-9


def _read_costs_of_jpeg(file: EncodedFile, num_stored: int, limits: ImageLimits) -> tuple[float, float, float, float]:
    parts = read_jpeg(file.data, max_pieces=limits.max_pieces)
    num_blocks, seconds = parts.num_blocks, 0
    if parts.is_arithmetic:
        # Nearly no bytes may hold a hundred decisions.
        seconds += 50e-9 * parts.num_bytes + sum(1e-6 * num for num, *_ in parts.scans)
    if not parts.keeps_coefficients:
        return 0, seconds + 20e-9 * num_blocks + 7.5e-9 * parts.num_bytes, num_stored, 4e-9
    # Refinement looks at every coefficient; other scans pass over blocks.
    rates = (
        (num, 50e-9 if refines else 20e-9 if has_averages else 5e-9) for num, refines, has_averages in parts.scans
    )
    seconds += sum(num * rate for num, rate in rates)
    return 128 * num_blocks, seconds + 130e-9 * num_blocks + 25e-9 * parts.num_bytes, num_stored, 4e-9


def _show(image: Image.Image, factor: int, orientation: int) -> Image.Image:
    """Upright, reduced, and in RGB."""
    width, height = (math.ceil(side / factor) for side in image.size)
    is_turned = orientation >= 5
    shown = Image.new("RGB", (height, width) if is_turned else (width, height))
    num_rows = max(1, BAND_PIXELS // image.width // factor) * factor
    for top in range(0, image.height, num_rows):
        band = _to_rgb(image.crop((0, top, image.width, min(top + num_rows, image.height))))
        if factor > 1:
            band = band.reduce(factor)
        start = top // factor
        if orientation in (3, 4, 6, 7):
            start = height - start - band.height
        if orientation != 1:
            band = band.transpose(UPRIGHT[orientation])
        shown.paste(band, (start, 0) if is_turned else (0, start))
    return shown


def _find_box(
    size: tuple[int, int], upright: tuple[int, int], scale: int, orientation: int
) -> tuple[float, float, float, float]:
    """Where the picture is in the image: stored rows and columns end with what may be less than a pixel."""
    height, width = (side / scale for side in upright)
    left = size[0] - width if orientation in (2, 3, 6, 7) else 0
    top = size[1] - height if orientation in (3, 4, 7, 8) else 0
    return left, top, left + width, top + height


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(
            f"got an image of mode {image.mode}, whose range of values is unknown; expected levels in 0..255; pass "
            "numpy.asarray(image) / white, with the value that means white"
        )
    if image.mode == "LAB":
        raise ValueError(
            "got an image of mode LAB; expected RGB; pass PIL.ImageCms.profileToProfile(image, "
            'PIL.ImageCms.createProfile("LAB"), PIL.ImageCms.createProfile("sRGB"), outputMode="RGB")'
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _scale_levels(image)
    if image.mode == "La":
        # Pillow 12.3 does not convert it to RGBA.
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        on_white = Image.new("RGB", image.size, (255, 255, 255))
        on_white.paste(image, mask=image)
        return on_white
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    """Of several channels, Pillow keeps the upper 8 bits (Pillow 12.3, PngImagePlugin.py)."""
    if image.mode.startswith("I;16"):
        return True
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    return any(";16" in str(tile.args) for tile in tiles)


def _warn_of_few_levels(image: Image.Image) -> None:
    """Cameras of 10 to 14 bits write levels that end far below the white of their file."""
    if image.mode.startswith("I;16"):
        highest = image.getextrema()[1]
    else:
        upper = max(high for _, high in image.getextrema()[: 1 if image.mode == "LA" else 3])
        highest = upper << 8 | 0xFF if upper else 0
    num_bits = max(8, int(highest).bit_length())
    if highest and num_bits <= 14:
        logger.warning_once(
            f"got a 16-bit picture whose levels need {num_bits} bits: white is 65535, so it is read as a dark one; if "
            f"its camera has {num_bits} bits, pass numpy.asarray(image) / {2**num_bits - 1}"
        )


def _scale_levels(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with the level that stands for transparent on white."""
    wide = image.convert("I")
    transparent = wide.info.pop("transparency", None)
    # Rounds 0..65535 to 0..255. A 32-bit image takes only a scale and an offset (Pillow 12.3, Image.py: point).
    grey = wide.point(lambda level: level * (1 / 257) + 0.5).convert("L")
    if isinstance(transparent, int):
        grey.paste(255, mask=Image.fromarray(np.asarray(wide) == transparent))
    return grey
