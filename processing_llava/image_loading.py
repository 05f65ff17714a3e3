"""The single door for images: bytes, file, data URI, array, PIL image or URL in, RGB image out, or one clear error.

A PNG of a hundred bytes can announce a billion pixels, so that every limit is checked on the header.

What may surprise: no text opens a file, since it may be a stranger's; paths are `pathlib.Path`. EXIF orientation is
applied (the original LLaVA never does), all other metadata goes, transparent pixels become white (a bare
`convert("RGB")` shows the colour below them), and 16-bit grey is scaled (Pillow 12.3 clips it).
"""

import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, ImageFile

from .image_arrays import ArrayImage
from .image_decoding import EncodedFile, Need, Picture, decode
from .image_limits import (
    DEFAULT_LIMITS,
    ImageLimits,
    check_image_size,
    check_num_bytes,
    read_orientation,
    shorten,
    strip_metadata,
)
from .messages import Base64File, unwrap_picture

Pixels = Image.Image | np.ndarray | torch.Tensor
ImageSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Pixels | ArrayImage | dict

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

# Opening a pipe would wait for a writer; Windows has no pipes, and would change line ends.
_OPEN_FLAGS = os.O_RDONLY | (os.O_NONBLOCK if os.name == "posix" else os.O_BINARY)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")
MAX_PATH = 120
"""Characters of a path in a message."""
_READING = threading.Lock()
"""Two rows of a batch may hold the same file."""
MAX_LINE = 1000
"""Characters of a message."""
SECONDS_OF_BASE64 = 3e-9


class UrlReader(Protocol):
    """Fetches an image, or refuses to: `image_urls.UrlPolicy`."""

    def fetch(self, url: str, *, max_bytes: int) -> bytes: ...


def load_image(
    source: ImageSource,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    urls: UrlReader | None = None,
    shortest_edge: int | None = None,
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
        shortest_edge: Pixels of the shorter side that suffice: an image that would be refused in all its pixels may
            come out smaller, with three times as many left.

    Returns:
        An image of mode "RGB" whose pixels are in memory, without metadata. A PIL image that is already so is
        returned itself.

    Raises:
        ValueError: the source is not allowed, of an unknown kind or format, damaged, or above a limit; if there is no
            file at the path, it is a FileNotFoundError, too.
    """

    def need(height: int, width: int) -> tuple[float, float, int]:
        return *(shortest_edge * side / min(height, width) for side in (height, width)), 0

    with open_picture(source, limits=limits, urls=urls, need=need if shortest_edge else None) as picture:
        image = picture.image
    if type(image) is Image.Image and not image.info:
        return image
    if isinstance(source, Image.Image) or image.format == "WEBP":
        # An image that others opened keeps what the file said of camera and place, and a WebP its decoder.
        image = image.copy()
    image.info = {}
    return image


@contextmanager
def open_picture(
    source: ImageSource,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    urls: UrlReader | None = None,
    need: Need | None = None,
) -> Iterator[Picture]:
    """As `load_image`, for those who drop the picture at once: it may hold metadata still.

    Until then, it counts as one of those that are decoded at a time. `need` tells how many of its pixels suffice.
    """
    with ExitStack() as stack:
        # It has no name here, so that it goes once it is converted.
        with naming_source(source):
            opened = decode(*open_source(source, limits=limits, urls=urls), limits=limits, need=need)
            picture = stack.enter_context(opened)
        yield picture


@contextmanager
def naming_picture(number: int, total: int) -> Iterator[None]:
    """Errors say which of several pictures it is."""
    try:
        yield
    except ValueError as error:
        if total == 1:
            raise
        raise ValueError(f"picture {number} of {total}: {error}") from error


class MissingImage(FileNotFoundError, ValueError):
    """There is no file at a path."""


@contextmanager
def naming_source(source: ImageSource) -> Iterator[None]:
    """Whatever goes wrong is a ValueError of one line, which names the file, where there is one, without its folders:
    a stranger may read it."""
    try:
        yield
    except MemoryError:
        # Of the machine: what a picture may take was checked.
        raise
    except Exception as error:
        line = shorten(error, MAX_LINE)
        if not line.startswith("got "):
            line = (
                f"got an image of type {shorten(type(source).__name__)} that cannot be read ({shorten(line)}); "
                "expected what load_image takes; convert it"
            )
        path = source
        with suppress(Exception):
            if isinstance(source, dict):
                path = source.get("path")
            elif isinstance(source, ImageFile.ImageFile):
                path = source.filename
            if isinstance(path, os.PathLike) or (isinstance(path, str) and path is not source):
                name = shorten(os.path.basename(os.fsdecode(path)))
                line += f"; the file is {name!r}" if name and name not in line else ""
        raise (MissingImage if isinstance(error, MissingImage) else ValueError)(line) from error


def open_source(
    source: ImageSource, *, limits: ImageLimits, urls: UrlReader | None = None
) -> tuple[Image.Image | ArrayImage, EncodedFile | None, int, Image.Image | None]:
    """The image with its header read and its size checked, what it is read from, its EXIF orientation, and the same
    image as its owner opened it from a path."""
    source = unwrap_picture(source)
    # MPO is a JPEG with another one behind it, as phones write (Pillow 12.3, MpoImagePlugin.py).
    if isinstance(source, ImageFile.ImageFile) and source.format not in (*FORMATS, "MPO"):
        raise ValueError(
            f"got an image that is read from a {source.format} file; expected one of {', '.join(FORMATS)}; if it is "
            "your own, pass image.copy()"
        )
    file = owned = None
    if isinstance(source, ImageFile.ImageFile) and source.tile and source.tell() == 0:
        # Opened by others, and not read yet.
        owned = source if source.filename else None
        image, file, orientation = _open_file(read_file_object(source.fp, limits=limits), limits=limits)
    elif isinstance(source, Image.Image):
        exif = source.info.get("exif")
        image, orientation = source, read_orientation(exif if isinstance(exif, bytes) else b"")
    elif isinstance(source, (np.ndarray, torch.Tensor, ArrayImage)):
        image, orientation = source if isinstance(source, ArrayImage) else ArrayImage(source, limits=limits), 1
    else:
        image, file, orientation = _open_file(read_bytes(source, limits=limits, urls=urls), source, limits=limits)
    check_image_size(image.height, image.width, limits=limits)
    return image, file, orientation, owned


def read_bytes(source: ImageSource, *, limits: ImageLimits, urls: UrlReader | None) -> bytes:
    """The encoded image, never reading more than one byte above the limit."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        # A view may show the same bytes again and again.
        check_num_bytes(memoryview(source).nbytes, limits=limits)
        return bytes(source)
    if isinstance(source, Base64File) or (isinstance(source, str) and source[:5].lower() == "data:"):
        return _decode_base64(source, limits=limits)
    if isinstance(source, str) and _URL.match(source):
        if urls is not None:
            return urls.fetch(source, max_bytes=limits.max_bytes)
        raise ValueError(
            f"got the URL {shorten(source)}; expected bytes, a pathlib.Path or a data URI, because URLs are not "
            "fetched here; download the image and pass its bytes, or allow hosts with urls=UrlPolicy(hosts=...)"
        )
    if isinstance(source, str):
        raise ValueError(
            f"got the text {shorten(source)!r} for an image; expected bytes, a data URI or a PIL image, because no "
            "text opens a file here; if it is your own path, pass pathlib.Path(...)"
        )
    if isinstance(source, os.PathLike):
        return _read_file(os.fspath(source), limits=limits)
    return read_file_object(source, limits=limits)


def _read_file(path: str, *, limits: ImageLimits) -> bytes:
    # Where it is too long, the end, where its name is.
    place = shorten(str(path)[-MAX_PATH:], MAX_PATH)
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except FileNotFoundError:
        raise MissingImage(f"got the path {place}; expected an image file there; correct it") from None
    except (OSError, ValueError) as error:
        reason = shorten(error.strerror if isinstance(error, OSError) else error)
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
            f"got the path {place}, which cannot be read ({shorten(error)}); expected an image file; check the path"
        ) from None
    finally:
        os.close(descriptor)


def read_file_object(source: BinaryIO, *, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The content of a binary file from its beginning; one byte above the limit at most.

    Raises:
        ValueError: this is no such file.
    """
    problem = ""
    try:
        with _READING:
            # A stream begins where it is.
            with suppress(AttributeError, OSError):
                source.seek(0)
            data = source.read(limits.max_bytes + 1)
    except AttributeError:
        data = None
    except Exception as error:
        data, problem = None, f" ({shorten(error) or type(error).__name__})"
    if not isinstance(data, bytes):
        raise ValueError(
            f"got an image of type {shorten(type(source).__name__)}{problem}; expected bytes, a pathlib.Path, a data "
            "URI, a file object opened as binary, an array or a PIL image; convert it"
        )
    return data


def _decode_base64(source: str | Base64File, *, limits: ImageLimits) -> bytes:
    if isinstance(source, str):
        comma = source.find(",", 0, 1000)
        if comma < 0 or not source[:comma].lower().endswith(";base64"):
            raise ValueError(f"got the data URI {shorten(source)}; expected 'data:image/png;base64,...'; encode it so")
        source = Base64File(source, comma + 1)
    # Four characters carry three bytes; half leaves room for line breaks, and the exact check follows.
    check_num_bytes((len(source) - source.start) // 2, limits=limits)
    try:
        return source.read(limits.max_bytes + 1)
    except ValueError as error:
        raise ValueError(
            f"got the data URI {shorten(source.text)} ({error}); expected base64 after the comma; encode it again"
        ) from None


def _open_file(
    data: bytes, source: ImageSource = None, *, limits: ImageLimits
) -> tuple[Image.Image, EncodedFile, int]:
    """Reads the header only."""
    check_num_bytes(len(data), limits=limits)
    stripped, orientation = strip_metadata(data, max_pieces=limits.max_pieces, max_frames=limits.max_frames)
    text = source if isinstance(source, (str, Base64File)) else ""
    file = EncodedFile(stripped, is_copy=stripped is not source, seconds=SECONDS_OF_BASE64 * len(text))
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"got an image with too many pixels ({shorten(error)}); expected max_pixels of at most "
            f"{limits.max_pixels}; resize the image, or raise both ImageLimits(max_pixels=...) and "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except MemoryError:
        raise
    except Exception:
        for name, (start, remedy) in OTHER_FORMATS.items():
            if re.match(start, data[:1000], flags=re.DOTALL):
                raise ValueError(f"got a file of {name}; expected one of {', '.join(FORMATS)}; {remedy}") from None
        raise ValueError(
            f"got {len(data)} bytes that are no image of a known format (they start with {data[:12]!r}); expected one "
            f"of {', '.join(FORMATS)}; convert the image"
        ) from None
    if any(tile.codec_name == "bmp_rle" for tile in image.tile):
        # Decoded in Python (Pillow 12.3, BmpImagePlugin.py): seconds, and tens of bytes for each pixel.
        raise ValueError(
            "got a BMP that is compressed by run lengths; expected one without compression; save the image again"
        )
    return image, file, orientation
