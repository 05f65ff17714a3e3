"""What an encoded image may cost, and what of it a decoder sees: pixels without metadata, in so many pieces at most.

A million tiny comments or empty scans cost a decoder hours: so the pieces of a file are counted here, and Pillow sees
those that it needs. What is no image, or breaks off, is left for Pillow to refuse.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from .image_webp import keep_first_picture, walk_webp

MAX_JPEG_SCANS = 50
"""Each scan of a progressive JPEG is a pass over the whole image; encoders write about ten."""
MAX_TABLES = {b"\x89": ("PNG", 100, 2000), b"\xff": ("JPEG", 1000, 200_000)}
"""Pieces and bytes beside the pixels, which Pillow reads in Python; encoders write 20 of 1,000 bytes."""

Piece = tuple[bytes, int, int]
"""Kind, and the range of bytes [start, stop). `_OTHER` are bytes that a decoder passes over one by one."""

_START, _OTHER = b"start", b""
_PNG_KEPT = {_START, b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# JFIF and Adobe segments say how colours are meant; those of other applications and comments do not count.
JPEG_DROPPED = {_OTHER, b"\xfe", *(bytes([marker]) for marker in (*range(0xE1, 0xEE), 0xEF))}
# Markers without content for Pillow 12.3 (JpegImagePlugin.py): reserved ones, restarts, start and end.
_LONE_MARKERS = {bytes([marker]) for marker in (0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE))}
_APP1, _START_OF_SCAN, _END_OF_IMAGE = b"\xe1", b"\xda", b"\xd9"
_FRAMES = {bytes([marker]) for marker in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}
_DECODED_FRAMES = (b"\xc0", b"\xc1", b"\xc2", b"\xc9", b"\xca")
"""Not lossless or hierarchical."""
# In a scan, FF is followed by 00 or the number of a restart. 01 has no content.
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_GIF_FRAME, _GIF_CONTROL = b",", b"!\xf9"
_ORIENTATION, _SHORT = 0x0112, 3


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Anything above is refused.

    Raises:
        ValueError: a limit below 1.
    """

    max_bytes: int = 30_000_000
    """Size of the encoded file."""
    max_pixels: int = 64_000_000
    """Height times width."""
    max_side: int = 20_000
    """Longer side in pixels."""
    max_aspect_ratio: float = 20
    """Longer side over shorter side: resizing the shorter side of a thin image to that of a tile makes it huge."""
    max_frames: int = 1000
    """Pictures of an animation, of which only the first is decoded."""
    max_pieces: int = 20_000
    """Chunks, segments or blocks of the file."""
    max_memory: int = 61_000_000
    """Bytes that reading one picture may take, as its header tells."""
    max_milliseconds: int = 200
    """Time of one core that reading one picture may take, as its header tells; a PNG is stopped when it is over."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = self.__dict__[field.name]
            if not value >= 1:
                raise ValueError(f"got {field.name}={value!r}; expected at least 1; raise it or leave the default")


DEFAULT_LIMITS = ImageLimits()


def shorten(value: object, most: int = 80) -> str:
    """At most so many characters on one line, all of which can be shown: sources may be whole files."""
    try:
        text = str(value)
    except Exception:
        text = type(value).__name__
    line = " ".join(text[: 2 * most + 40].split())
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def check_num_bytes(num_bytes: int, *, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Refuses a file above the limit.

    Raises:
        ValueError: naming the limit.
    """
    if num_bytes > limits.max_bytes:
        raise ValueError(
            f"got an image of {num_bytes} bytes or more; expected at most {limits.max_bytes}; compress the image, or "
            f"{_allow('max_bytes')}"
        )


def check_image_size(height: int, width: int, *, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Refuses a height and width, in pixels, above the limits.

    Raises:
        ValueError: no pixels, a side too long, too many pixels, or too thin.
    """
    if height < 1 or width < 1:
        raise ValueError(f"got an image of {width} x {height} pixels; expected at least 1 x 1; send another image")
    short, long = sorted((height, width))
    costs = {"max_side": long, "max_pixels": height * width, "max_aspect_ratio": long / short}
    check_costs(height, width, costs, limits=limits)


def check_costs(height: int, width: int, costs: dict[str, float], *, limits: ImageLimits) -> None:
    """Refuses what an image of this size costs, by the name of its limit.

    Raises:
        ValueError: naming the first limit that is passed.
    """
    for name, value in costs.items():
        allowed = getattr(limits, name)
        if value > allowed:
            raise ValueError(
                f"got an image of {width} x {height} pixels; expected {name} of at most {allowed}, not {value:.10g}; "
                f"resize or crop the image, or {_allow(name)}"
            )


def _allow(name: str) -> str:
    return f"allow it with ImageLimits({name}=...) or --image-limit {name}=..."


def strip_metadata(data: bytes, *, max_pieces: int, max_frames: int) -> tuple[bytes, int]:
    """An encoded image without what its pixels do not need.

    Args:
        data: The encoded image.
        max_pieces: Largest number of chunks, segments or blocks; full blocks of a GIF are not counted.
        max_frames: Largest number of pictures in an animation.

    Returns:
        The image as Pillow should read it, and its EXIF orientation, 1 to 8.

    Raises:
        ValueError: too many pieces, pictures or scans.
    """
    pieces = list(limit_pieces(_walk(data), max_pieces))
    frame, exif = _OTHER, iter([b""])
    kept, header = pieces, b""
    if data.startswith(b"\x89PNG"):
        frame = b"fcTL"
        exif = (data[start + 8 : stop - 4] for kind, start, stop in pieces if kind == b"eXIf")
        kept = [piece for piece in pieces if piece[0] in _PNG_KEPT]
    elif data.startswith(b"\xff\xd8"):
        _check_scans(data, max_pieces=max_pieces)
        segments = (data[start + 4 : stop] for kind, start, stop in pieces if kind == _APP1)
        exif = (segment for segment in segments if segment.startswith(b"Exif\0\0"))
        kept = [piece for piece in pieces if piece[0] not in JPEG_DROPPED]
    elif data.startswith(b"GIF8"):
        frame = _GIF_FRAME
        kept = _keep_first_picture(pieces)
    elif data.startswith(b"RIFF"):
        frame = b"ANMF"
        exif = (data[start + 8 : stop] for kind, start, stop in pieces if kind == b"EXIF")
        kept = keep_first_picture(pieces)
        num_bytes = 4 + sum(stop - start for _, start, stop in kept)
        header = data[:4] + struct.pack("<L", num_bytes) + data[8:12]
    else:
        kept = [(_START, 0, len(data))]
    sizes = [stop - start for kind, start, stop in kept if kind not in (_START, b"IDAT", _START_OF_SCAN)]
    name, max_tables, max_bytes = MAX_TABLES.get(data[:1], ("", len(sizes), sum(sizes)))
    if len(sizes) > max_tables or sum(sizes) > max_bytes:
        raise ValueError(
            f"got a {name} with {len(sizes)} tables of {sum(sizes)} bytes; expected at most {max_tables} of "
            f"{max_bytes}; save the image again"
        )
    num_frames = sum(kind == frame for kind, _, _ in pieces)
    if frame and num_frames > max_frames:
        raise ValueError(
            f"got an animation of {num_frames} pictures; expected at most {max_frames}; send one of them, or "
            f"{_allow('max_frames')}"
        )
    orientation = read_orientation(next(exif, b""))
    if len(header) + sum(stop - start for _, start, stop in kept) == len(data):
        # A copy would take memory for nothing.
        return data, orientation
    view = memoryview(data)
    return b"".join([header, *(view[start:stop] for _, start, stop in kept)]), orientation


def read_orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8, of the first directory; 1, as stored, where the block is absent or broken."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = ">" if tiff.startswith(b"MM") else "<"
    try:
        (start,) = struct.unpack_from(f"{order}L", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for number in range(num_entries):
            tag, kind, count, value = struct.unpack_from(f"{order}HHLH", tiff, start + 2 + 12 * number)
            if (tag, kind, count) == (_ORIENTATION, _SHORT, 1):
                return value if 1 <= value <= 8 else 1
    except struct.error:
        # Cameras and editors write broken blocks around sound pixels.
        pass
    return 1


def limit_pieces(pieces: Iterator[Piece], max_pieces: int) -> Iterator[Piece]:
    for number, piece in enumerate(pieces):
        if number >= max_pieces:
            raise ValueError(
                f"got an image file of more than {max_pieces} pieces; expected fewer chunks, segments or blocks; save "
                f"the image again, or {_allow('max_pieces')}"
            )
        yield piece


def _walk(data: bytes) -> Iterator[Piece]:
    for signature, walk in _WALKS.items():
        if data.startswith(signature):
            return walk(data)
    return iter(())


def _walk_png(data: bytes) -> Iterator[Piece]:
    yield _START, 0, 8
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">L4s", data, position)
        yield kind, position, position + 12 + length
        if kind == b"IEND":
            return
        position += 12 + length


def _walk_gif(data: bytes) -> Iterator[Piece]:
    position = 13 + _size_of_colours(data, 10)
    yield _START, 0, position
    while position < len(data):
        start, kind = position, data[position : position + 1]
        if kind == b";":
            return
        if kind == _GIF_FRAME:
            position += 11 + _size_of_colours(data, position + 9)
        elif kind == b"!":
            kind = data[position : position + 2]
            position += 2
        else:
            yield _OTHER, position, position + 1
            position += 1
            continue
        while position < len(data) and data[position]:
            # A file cannot hold very many of the others.
            if data[position] < 128:
                yield _OTHER, position, position
            position += 1 + data[position]
        position += 1
        yield kind, start, position


def _size_of_colours(data: bytes, position: int) -> int:
    flags = data[position] if position < len(data) else 0
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _keep_first_picture(pieces: list[Piece]) -> list[Piece]:
    """The first picture of a GIF, and the block with its transparent colour, of the size that Pillow expects."""
    first = next((index for index, (kind, _, _) in enumerate(pieces) if kind == _GIF_FRAME), len(pieces))
    controls = [piece for piece in pieces[:first] if piece[0] == _GIF_CONTROL and piece[2] - piece[1] == 8]
    return pieces[:1] + controls[-1:] + pieces[first : first + 1]


def _walk_jpeg(data: bytes) -> Iterator[Piece]:
    """Segments up to the first scan, which stands for all that follows."""
    yield _START, 0, 2
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1 : position + 2]
        if data[position] != 0xFF or marker in b"\x00\xff":
            yield _OTHER, position, position + 1
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _LONE_MARKERS:
            length = 0
        elif length < 2:
            # Broken: Pillow and libjpeg would go on at different places.
            return
        stop = len(data) if marker == _START_OF_SCAN else position + 2 + length
        yield marker, position, stop
        position = stop


def _check_scans(data: bytes, *, max_pieces: int) -> None:
    # The film behind a phone's photograph can hold the same bytes by chance.
    if data.count(b"\xff" + _START_OF_SCAN) <= MAX_JPEG_SCANS:
        return
    num_scans = sum(kind == _START_OF_SCAN for kind, _, _ in limit_pieces(walk_scans(data), max_pieces))
    if num_scans > MAX_JPEG_SCANS:
        raise ValueError(f"got a JPEG of {num_scans} scans; expected at most {MAX_JPEG_SCANS}; save the image again")


def walk_scans(data: bytes) -> Iterator[Piece]:
    """Segments up to the end of the image, as libjpeg finds them."""
    position = 2
    while (found := MARKER.search(data, position)) and found[1] != _END_OF_IMAGE:
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        yield found[1], found.start(), position


@dataclass(frozen=True)
class JpegParts:
    """What decoding a JPEG has to work on."""

    num_blocks: int
    """Blocks of 8 x 8 samples, of all components."""
    scans: list[tuple[int, bool, bool]]
    """Blocks, whether it refines earlier ones, and whether each block has bits of its own."""
    is_arithmetic: bool
    keeps_coefficients: bool
    """Several scans make the image."""
    num_bytes: int
    """Up to the end of the image."""


def read_jpeg(data: bytes, *, max_pieces: int) -> JpegParts:
    """Reads the headers of a JPEG from `strip_metadata`.

    Raises:
        ValueError: too many pieces, a broken frame, or of a kind that nobody sends.
    """
    frames = [(kind, data[start + 5 : stop]) for kind, start, stop in _walk_jpeg(data) if kind in _FRAMES]
    kind, frame = frames[0] if len(frames) == 1 else (b"", b"")
    components = [(name, both >> 4, both & 15) for name, both in zip(frame[5::3], frame[6::3])]
    factors = [factor for _, *both in components for factor in both]
    if kind not in _DECODED_FRAMES or not 0 < min(factors, default=0) <= max(factors) < 5:
        raise ValueError(
            f"got a JPEG with frames of {[kind for kind, _ in frames]}; expected a baseline or progressive one; save "
            "the image again"
        )
    height, width = struct.unpack_from(">HH", frame)
    # Blocks come in groups of those that show the same pixels.
    columns = -(-width // (8 * max(across for _, across, _ in components)))
    rows = -(-height // (8 * max(down for _, _, down in components)))
    blocks = [(name, columns * across * rows * down) for name, across, down in components]
    scans, stop, is_progressive = [], 0, kind in (b"\xc2", b"\xca")
    for marker, start, stop in limit_pieces(walk_scans(data), max_pieces):
        if marker == _START_OF_SCAN:
            # From the average on, which no run of empty blocks skips.
            has_averages, is_refinement = data[stop - 3 : stop - 2] == b"\0", data[stop - 1 : stop] > b"\x0f"
            names = data[start + 5 : stop - 3 : 2]
            scans.append((sum(num for name, num in blocks if name in names), is_refinement, has_averages))
            if not is_progressive and len(names) == len(blocks):
                break
    end = MARKER.search(data, stop)
    return JpegParts(
        num_blocks=sum(num for _, num in blocks),
        scans=scans,
        is_arithmetic=kind in (b"\xc9", b"\xca"),
        keeps_coefficients=is_progressive or len(scans) > 1,
        num_bytes=end.start() if end else len(data),
    )


_WALKS: dict[bytes, Callable[[bytes], Iterator[Piece]]] = {
    b"\x89PNG": _walk_png,
    b"\xff\xd8": _walk_jpeg,
    b"GIF8": _walk_gif,
    b"RIFF": walk_webp,
}
