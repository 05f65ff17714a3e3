"""The single door for images: bytes, file, data URI, array, PIL image or URL in, RGB image out, or one clear error.

An image that reaches a server may be hostile: a PNG of a hundred bytes can announce a billion pixels, or be one pixel
wide and cost gigabytes once its short side is resized. Every limit is therefore checked on the header, before any
pixel is decoded.

What may surprise: no text opens a file, since it may be a stranger's and name any file of the machine; paths are
`pathlib.Path`. EXIF orientation is applied (the original LLaVA never does), all other metadata goes, transparent
pixels become white (a bare `convert("RGB")` shows the colour that hides below them), and 16-bit grey is scaled
(Pillow 12.3 clips it, so that nearly everything turns white).
"""

import base64
import binascii
import io
import os
import re
import stat
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, ImageFile
from transformers.utils import logging

from .image_arrays import image_from_levels, read_levels
from .image_containers import cut_to_pixels, read_orientation, strip_metadata
from .image_limits import DEFAULT_LIMITS, ImageLimits, check_image_size, check_num_bytes
from .messages import unwrap_picture

logger = logging.get_logger(__name__)

Pixels = Image.Image | np.ndarray | torch.Tensor
ImageSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Pixels | dict

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_SAVE = "save it as PNG or JPEG"
_OPEN = f"{_SAVE}, or, if it is your own, pass PIL.Image.open(path).copy()"
_HEIC = f"{_SAVE}; iPhones take JPEG with Settings, Camera, Formats, Most Compatible"
OTHER_FORMATS = {
    "TIFF": (rb"II\*\0|MM\0\*", _OPEN),
    "AVIF": (rb".{4}ftypavi[fs]", _OPEN),
    "HEIC": (rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)", _HEIC),
    "JPEG 2000": (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", _OPEN),
    "ICO": (rb"\0\0\x01\0", _SAVE),
    "PSD": (rb"8BPS", _SAVE),
    "JPEG XL": (rb"\xff\x0a|\0\0\0\x0cJXL ", _SAVE),
    "PDF": (rb"%PDF-", "save its page as PNG"),
    "SVG": (rb"(\xef\xbb\xbf)?\s*(<svg|<[?!].*<svg)", "draw it in a browser and save it as PNG"),
}
"""How files of other formats begin, and what to do with them."""

# EXIF orientation -> what brings the stored pixels upright; 1 means "leave as it is".
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow 12.3 raises on damaged files: its own errors, and those of parsing a chunk that is too short.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error)

# Opening a pipe would wait for a writer; Windows has no pipes, and would change line ends.
_OPEN_FLAGS = os.O_RDONLY | (os.O_NONBLOCK if os.name == "posix" else os.O_BINARY)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_READING = threading.Lock()
"""Two rows of a batch may hold the same file."""


class UrlReader(Protocol):
    """Fetches an image, or refuses to: `image_urls.UrlPolicy`."""

    def fetch(self, url: str, *, max_bytes: int) -> bytes: ...


def load_image(
    source: ImageSource,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    urls: UrlReader | None = None,
) -> Image.Image:
    """Loads one image, upright and in RGB.

    Args:
        source: Encoded bytes, a `pathlib.Path`, a "data:...;base64," URI, a URL, a binary file object, a PIL image, an
            array of levels or of floats in 0..1, or the `{"bytes": ..., "path": ...}` of `datasets`. Encoded images
            are JPEG, PNG, WebP, GIF or BMP, told by their content; of an animation, the first picture is taken. Any
            other text is refused.
        limits: What is refused.
        urls: Fetches URLs. Without it they are refused, since a server that fetches whatever address it is sent
            reaches hosts that the sender could not.

    Returns:
        An image of mode "RGB" whose pixels are in memory, without metadata. A PIL image that is already so is
        returned itself.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the source is not allowed, of an unknown kind or format, damaged, or above a limit.
    """
    image = load_pixels(source, limits=limits, urls=urls)
    if type(image) is Image.Image and not image.info:
        return image
    # An image that was opened from a file keeps what the file said of camera and place, in several attributes.
    plain = image.copy()
    plain.info = {}
    return plain


def load_images(
    sources: Iterable[ImageSource],
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    urls: UrlReader | None = None,
) -> list[Image.Image]:
    """Loads images one by one; as `load_image`, but a refusal says which of them it is.

    Raises:
        FileNotFoundError: there is no file at a path.
        ValueError: as `load_image`.
    """
    sources, images = list(sources), []
    for number, source in enumerate(sources, start=1):
        try:
            images.append(load_image(source, limits=limits, urls=urls))
        except ValueError as error:
            if len(sources) == 1:
                raise
            raise ValueError(f"picture {number} of {len(sources)}: {error}") from error
    return images


def load_pixels(
    source: ImageSource,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    urls: UrlReader | None = None,
) -> Image.Image:
    """As `load_image`, for callers that take the pixels and drop the image: it may hold metadata still."""
    with _naming(source):
        image, orientation = _open(source, limits=limits, urls=urls)
        has_16_bits = _has_16_bits(image)
        try:
            image.load()
        except DAMAGE as error:
            raise ValueError(
                f"got an image that cannot be decoded ({_shorten(error)}); expected a whole image; save it again"
            ) from error
        if has_16_bits:
            _warn_of_few_levels(image)
        if orientation != 1:
            image = image.transpose(UPRIGHT[orientation])
            # Whoever loads it once more must not turn it again.
            image.info.pop("exif", None)
        return _to_rgb(image)


def clean_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """An image, encoded before, that holds nothing but the pixels of `load_image`, for files that leave the machine.

    JPEG and PNG lose their metadata and stay as they were encoded; all else becomes PNG, which changes no pixel.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: as `load_image`.
    """
    with _naming(source):
        data = _read_bytes(source, limits=limits, urls=None)
        image = load_image(data, limits=limits)
    stripped, orientation = strip_metadata(data, max_pieces=limits.max_pieces, max_frames=limits.max_frames)
    kept = cut_to_pixels(stripped, max_pieces=limits.max_pieces) if orientation == 1 else None
    if kept is not None:
        return kept
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read_image_size(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) that `load_image` would give, from the header: damaged pixels go unseen.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: as `load_image`, except for pixels that cannot be decoded.
    """
    with _naming(source):
        image, orientation = _open(source, limits=limits)
    # Orientations from 5 on exchange the sides.
    return image.size if orientation >= 5 else image.size[::-1]


@contextmanager
def _naming(source: ImageSource) -> Iterator[None]:
    """Errors name the file, where there is one, without its folders: a stranger may read them."""
    path = source
    if isinstance(source, dict):
        path = source.get("path")
    elif isinstance(source, ImageFile.ImageFile):
        path = source.filename
    is_path = isinstance(path, os.PathLike) or (isinstance(path, str) and path is not source)
    name = _shorten(os.path.basename(os.fsdecode(path))) if is_path else ""
    try:
        yield
    except ValueError as error:
        if not name or name in str(error):
            raise
        raise ValueError(f"{error}; the file is {name!r}") from error


def _open(source: ImageSource, *, limits: ImageLimits, urls: UrlReader | None = None) -> tuple[Image.Image, int]:
    """The image with its header read and its size checked, and its EXIF orientation."""
    source = unwrap_picture(source)
    # MPO is a JPEG with another one behind it, as phones write (Pillow 12.3, MpoImagePlugin.py).
    if isinstance(source, ImageFile.ImageFile) and source.format not in (*FORMATS, "MPO"):
        raise ValueError(
            f"got an image that is read from a {source.format} file; expected one of {', '.join(FORMATS)}; if it is "
            "your own, pass image.copy()"
        )
    if isinstance(source, Image.Image):
        image, orientation = source, read_orientation(source.info.get("exif", b""))
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        image, orientation = image_from_levels(read_levels(source, limits=limits)[0]), 1
    else:
        data = _read_bytes(source, limits=limits, urls=urls)
        image, orientation = _open_file(data, limits=limits)
    check_image_size(image.height, image.width, limits=limits)
    return image, orientation


def _read_bytes(source: ImageSource, *, limits: ImageLimits, urls: UrlReader | None) -> bytes:
    """The encoded image, never reading more than one byte above the limit."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = _decode_data_uri(source, limits=limits)
    elif isinstance(source, str) and _URL.match(source):
        data = _fetch(source, limits=limits, urls=urls)
    elif isinstance(source, str):
        raise ValueError(
            f"got the text {_shorten(source)!r} for an image; expected bytes, a data URI or a PIL image, because no "
            "text opens a file here; if it is your own path, pass pathlib.Path(...)"
        )
    elif isinstance(source, os.PathLike):
        data = _read_file(os.fspath(source), limits=limits)
    else:
        data = read_file_object(source, limits=limits)
    check_num_bytes(len(data), limits=limits)
    return data


def _fetch(url: str, *, limits: ImageLimits, urls: UrlReader | None) -> bytes:
    if urls is None:
        raise ValueError(
            f"got the URL {_shorten(url)}; expected bytes, a pathlib.Path or a data URI, because URLs are not fetched "
            "here; download the image and pass its bytes, or allow hosts with urls=UrlPolicy(hosts=...)"
        )
    return urls.fetch(url, max_bytes=limits.max_bytes)


def _read_file(path: str, *, limits: ImageLimits) -> bytes:
    place = _shorten_path(path)
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except FileNotFoundError:
        raise FileNotFoundError(f"got the path {place}; expected an image file there; correct it") from None
    except (OSError, ValueError) as error:
        reason = _shorten(error.strerror if isinstance(error, OSError) else error)
        raise ValueError(f"got the path {place} ({reason}); expected an image file; correct the path") from None
    try:
        # The status of what is open, since a path may lead elsewhere a moment later.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"got {place}, which is no regular file; expected an image file; correct the path")
        check_num_bytes(status.st_size, limits=limits)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limits.max_bytes + 1)
    except OSError as error:
        raise ValueError(
            f"got the path {place}, which cannot be read ({_shorten(error)}); expected an image file; check the path"
        ) from None
    finally:
        os.close(descriptor)


def read_file_object(source: BinaryIO, *, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The content of a binary file from its beginning, wherever others have left it; one byte above the limit at most.

    Raises:
        ValueError: this is no such file.
    """
    try:
        with _READING:
            with suppress(AttributeError, OSError):
                source.seek(0)
            data = source.read(limits.max_bytes + 1)
    except AttributeError:
        data = None
    if not isinstance(data, bytes):
        raise ValueError(
            f"got an image of type {type(source).__name__}; expected bytes, a pathlib.Path, a data URI, a file "
            "object opened as binary, an array or a PIL image; convert it"
        )
    return data


def _decode_data_uri(uri: str, *, limits: ImageLimits) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ValueError(f"got the data URI {_shorten(uri)}; expected 'data:image/png;base64,...'; encode it so")
    # Four characters carry three bytes; half leaves room for line breaks, and the exact check follows.
    check_num_bytes(len(payload) // 2, limits=limits)
    try:
        return base64.b64decode(payload.encode("ascii").translate(None, b" \t\r\n"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"got the data URI {_shorten(uri)} ({error}); expected base64 after the comma; encode it again"
        ) from None


def _open_file(data: bytes, *, limits: ImageLimits) -> tuple[Image.Image, int]:
    """Reads the header only."""
    stripped, orientation = strip_metadata(data, max_pieces=limits.max_pieces, max_frames=limits.max_frames)
    try:
        image = Image.open(io.BytesIO(stripped), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"got an image with too many pixels ({_shorten(error)}); expected max_pixels of at most "
            f"{limits.max_pixels}; resize the image, or raise both ImageLimits(max_pixels=...) and "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except DAMAGE:
        for name, (start, remedy) in OTHER_FORMATS.items():
            if re.match(start, data[:1000], flags=re.DOTALL):
                raise ValueError(f"got a file of {name}; expected one of {', '.join(FORMATS)}; {remedy}") from None
        raise ValueError(
            f"got {len(data)} bytes that are no image of a known format (they start with {data[:12]!r}); expected one "
            f"of {', '.join(FORMATS)}; convert the image"
        ) from None
    if any(tile.codec_name == "bmp_rle" for tile in image.tile):
        # Decoded in Python (Pillow 12.3, BmpImagePlugin.py): seconds, and tens of bytes for each pixel that a short
        # file skips.
        raise ValueError(
            "got a BMP that is compressed by run lengths; expected one without compression; save the image again"
        )
    return image, orientation


def _to_rgb(image: Image.Image) -> Image.Image:
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
    """Whether each channel has 16 bits; of several channels, the upper 8 are kept (Pillow 12.3, PngImagePlugin.py)."""
    if image.mode.startswith("I;16"):
        return True
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    return any(";16" in str(tile.args) for tile in tiles)


def _warn_of_few_levels(image: Image.Image) -> None:
    """Cameras of 10 to 14 bits write levels that end far below the white of their file."""
    if image.mode.startswith("I;16"):
        highest = image.getextrema()[1]
    else:
        channels = image.split()[: 1 if image.mode in ("L", "LA") else 3]
        upper = max(channel.getextrema()[1] for channel in channels)
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


def _shorten(value: object) -> str:
    """At most 80 characters on one line: sources may be whole files."""
    line = " ".join(str(value)[:200].split())
    return line if len(line) <= 80 else f"{line[:77]}..."


def _shorten_path(path: str) -> str:
    """At most 110 characters on one line: the end, where the name of the file is."""
    line = " ".join(str(path)[-200:].split())
    return line if len(line) <= 110 else f"...{line[-107:]}"
