"""The single door for images: bytes, path, data URI, file object or PIL image in, RGB image out, or one clear error.

An image that reaches a server may be hostile: a PNG of a hundred bytes can announce a billion pixels, or be one pixel
wide and cost gigabytes once its short side is resized. Every limit is therefore read from the header, before any
pixel is decoded. What may surprise: EXIF orientation is applied (the original LLaVA never does), transparent pixels
become white (a bare `convert("RGB")` shows the colour that hides below them), and 16-bit grey is scaled (Pillow clips
it, so that nearly everything turns white). URLs are not fetched here, because a server that fetches whatever address
it is sent reaches hosts that the sender could not.

Only the standard library and Pillow are used, and the file is copied into Hub repositories as it is.
"""

import base64
import binascii
import io
import os
import re
import stat
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# EXIF orientation -> what brings the stored pixels upright; 1 and unknown values mean "leave as it is"
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# what Pillow lets escape on damaged files: its own errors, and those of parsing a chunk that is too short
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error)


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image may cost; anything above is refused before it is decoded.

    Raises:
        ValueError: a limit below 1.
    """

    max_bytes: int = 50_000_000
    """Size of the encoded file."""
    max_pixels: int = 64_000_000
    """Height times width."""
    max_side: int = 20_000
    """Longer side in pixels."""
    max_aspect_ratio: float = 200
    """Longer side over shorter side; the reference behaviour of LLaVA is published up to 80 (8000 x 100)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = self.__dict__[field.name]
            if not value >= 1:
                raise ValueError(f"got {field.name}={value!r}; expected at least 1; raise it or leave the default")


DEFAULT_LIMITS = ImageLimits()


def load_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Loads one image, upright and in RGB.

    Args:
        source: encoded bytes, a path, a "data:...;base64," URI, a binary file object, or a PIL image. Encoded images
            are JPEG, PNG, WebP, GIF or BMP, told by their content; of an animation, the first frame is taken.
        limits: what is refused.

    Returns:
        An image of mode "RGB" whose pixels are in memory. A PIL image that is already so is returned itself.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the source is a URL, of an unknown kind or format, damaged, or above a limit.
    """
    if isinstance(source, Image.Image):
        image = source
    else:
        image = _open(_read_bytes(source, limits=limits), limits=limits)
    check_image_size(image.height, image.width, limits=limits)
    try:
        image.load()
    except DAMAGE as error:
        raise ValueError(
            f"got an image that cannot be decoded ({_shorten(error)}); expected a whole image; save it again"
        ) from error
    return _to_rgb(_turn_upright(image))


def read_image_size(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) that `load_image` would give, from the header: damaged pixels go unseen.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: as `load_image`, but for pixels that cannot be decoded.
    """
    if isinstance(source, Image.Image):
        image = source
    else:
        image = _open(_read_bytes(source, limits=limits), limits=limits)
    check_image_size(image.height, image.width, limits=limits)
    # orientations from 5 on exchange the sides
    return image.size if _read_orientation(image) >= 5 else image.size[::-1]


def check_image_size(height: int, width: int, *, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Refuses a height and width, in pixels, above the limits.

    Raises:
        ValueError: no pixels, a side too long, too many pixels, or too thin.
    """
    if height < 1 or width < 1:
        raise ValueError(f"got an image of {width} x {height} pixels; expected at least 1 x 1; send another image")
    ratio = max(height, width) / min(height, width)
    for name, value, allowed in (
        ("max_side", max(height, width), limits.max_side),
        ("max_pixels", height * width, limits.max_pixels),
        ("max_aspect_ratio", ratio, limits.max_aspect_ratio),
    ):
        if value > allowed:
            raise ValueError(
                f"got an image of {width} x {height} pixels; expected {name} of at most {allowed}, not {value:.10g}; "
                f"resize or crop the image, or allow it with ImageLimits({name}=...)"
            )


def _read_bytes(source: ImageSource, *, limits: ImageLimits) -> bytes:
    """The encoded image, never reading more than one byte above the limit."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = _decode_data_uri(source, limits=limits)
    elif isinstance(source, (str, os.PathLike)):
        data = _read_file(os.fspath(source), limits=limits)
    else:
        data = _read_file_object(source, limits=limits)
    _check_num_bytes(len(data), limits=limits)
    return data


def _read_file(path: str, *, limits: ImageLimits) -> bytes:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise ValueError(
            f"got the URL {_shorten(path)}; expected bytes, a path or a data URI, because URLs are not fetched here; "
            "download the image and pass its bytes"
        )
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"got the path {_shorten(path)}; expected an image file there; correct it") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"got the path {_shorten(path)} ({_shorten(error)}); expected an image file; correct the path"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"got {_shorten(path)}, which is no regular file; expected an image file; correct the path")
    _check_num_bytes(status.st_size, limits=limits)
    with Path(path).open("rb") as file:
        return file.read(limits.max_bytes + 1)


def _read_file_object(source: BinaryIO, *, limits: ImageLimits) -> bytes:
    try:
        data = source.read(limits.max_bytes + 1)
    except AttributeError:
        data = None
    if not isinstance(data, bytes):
        raise ValueError(
            f"got an image of type {type(source).__name__}; expected bytes, a path, a data URI, a file object opened "
            "as binary, or a PIL image; convert it"
        )
    return data


def _decode_data_uri(uri: str, *, limits: ImageLimits) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ValueError(f"got the data URI {_shorten(uri)}; expected 'data:image/png;base64,...'; encode it so")
    # four characters carry three bytes; half leaves room for line breaks, and the exact check follows
    _check_num_bytes(len(payload) // 2, limits=limits)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"got the data URI {_shorten(uri)} ({error}); expected base64 after the comma; encode it again"
        ) from None


def _check_num_bytes(num_bytes: int, *, limits: ImageLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise ValueError(
            f"got an image of {num_bytes} bytes or more; expected at most {limits.max_bytes}; compress the image, or "
            "allow it with ImageLimits(max_bytes=...)"
        )


def _open(data: bytes, *, limits: ImageLimits) -> Image.Image:
    """Reads the header only."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"got an image with too many pixels ({_shorten(error)}); expected max_pixels of at most "
            f"{limits.max_pixels}; resize the image, or raise both ImageLimits(max_pixels=...) and "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except DAMAGE:
        raise ValueError(
            f"got {len(data)} bytes that are no image of a known format (they start with {data[:12]!r}); expected one "
            f"of {', '.join(FORMATS)}; convert the image"
        ) from None


def _read_orientation(image: Image.Image) -> int:
    """A key of `UPRIGHT`, or 1: as stored."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGE:
        # cameras and editors write broken EXIF blocks around sound pixels
        return 1
    return orientation if orientation in UPRIGHT else 1


def _turn_upright(image: Image.Image) -> Image.Image:
    orientation = _read_orientation(image)
    if orientation == 1:
        return image
    upright = image.transpose(UPRIGHT[orientation])
    # transpose() keeps the EXIF block: whoever reads it next would turn the image again
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        upright.info.pop(key, None)
    return upright


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(
            f"got an image of mode {image.mode}, whose range of values is unknown; expected levels in 0..255; scale "
            "the image and convert it to RGB"
        )
    if image.mode.startswith("I;16"):
        # rounds 0..65535 to 0..255; point() of a 32-bit image only takes a scale and an offset
        image = image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
        # a level of 0..65535 that matches nothing any more
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _shorten(value: object) -> str:
    """At most 80 characters on one line: sources may be whole files."""
    line = " ".join(str(value)[:200].split())
    return line if len(line) <= 80 else f"{line[:77]}..."
