"""The container of an encoded image: what pixels need is kept, metadata goes, and what stalls a decoder is refused.

A file of a few megabytes can cost a decoder hours without being a large image: a GIF with a million tiny comments, a
JPEG with a million empty scans, an EXIF block whose entries all point at the same megabytes. So the pieces of a file
(chunks, segments, blocks) are counted here, and Pillow sees only those that it needs. Whatever is no image, or breaks
off, is left for Pillow to refuse.
"""

import re
import struct
from collections.abc import Callable, Iterator

MAX_JPEG_SCANS = 50
"""Each scan of a progressive JPEG is a pass over the whole image; encoders write about ten."""

Piece = tuple[bytes, int, int]
"""Kind, and the range of bytes [start, stop). `_OTHER` are bytes that a decoder passes over one by one."""

_START, _OTHER = b"start", b""
_PNG_KEPT = {_START, b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# JFIF and Adobe segments say how colours are meant; those of other applications and comments do not count.
_JPEG_DROPPED = {_OTHER, b"\xfe", *(bytes([marker]) for marker in (*range(0xE1, 0xEE), 0xEF))}
_JPEG_COLOURS, _JPEG_COLOURS_SIZE = (b"\xe0", b"\xee"), 18
"""JFIF and Adobe, and the size of the former without a preview."""
# Markers without content for Pillow 12.3 (JpegImagePlugin.py): reserved ones, restarts, start and end.
_LONE_MARKERS = {bytes([marker]) for marker in (0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE))}
_APP1, _START_OF_SCAN, _END_OF_IMAGE = b"\xe1", b"\xda", b"\xd9"
# In a scan, FF is followed by 00 or the number of a restart. 01 has no content.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_GIF_FRAME, _GIF_CONTROL = b",", b"!\xf9"
_ORIENTATION, _SHORT = 0x0112, 3


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
    pieces = list(_limit(_walk(data), max_pieces))
    frame, exif = _OTHER, iter([b""])
    kept = pieces
    if data.startswith(b"\x89PNG"):
        frame = b"fcTL"
        exif = (data[start + 8 : stop - 4] for kind, start, stop in pieces if kind == b"eXIf")
        kept = [piece for piece in pieces if piece[0] in _PNG_KEPT]
    elif data.startswith(b"\xff\xd8"):
        _check_scans(data, max_pieces=max_pieces)
        segments = (data[start + 4 : stop] for kind, start, stop in pieces if kind == _APP1)
        exif = (segment for segment in segments if segment.startswith(b"Exif\0\0"))
        kept = [piece for piece in pieces if piece[0] not in _JPEG_DROPPED]
    elif data.startswith(b"GIF8"):
        frame = _GIF_FRAME
        kept = _keep_first_picture(pieces)
    else:
        # libwebp skips the chunks of a WebP that it does not need.
        frame = b"ANMF"
        exif = (data[start + 8 : stop] for kind, start, stop in pieces if kind == b"EXIF")
        kept = [(_START, 0, len(data))]
    num_frames = sum(kind == frame for kind, _, _ in pieces)
    if frame and num_frames > max_frames:
        raise ValueError(
            f"got an animation of {num_frames} pictures; expected at most {max_frames}; send one of them, or allow it "
            "with ImageLimits(max_frames=...) or --image-limit max_frames=..."
        )
    return b"".join(data[start:stop] for _, start, stop in kept), read_orientation(next(exif, b""))


def cut_to_pixels(data: bytes, *, max_pieces: int) -> bytes | None:
    """A JPEG or PNG with its pixels alone; None if it has to be encoded again for that.

    What `strip_metadata` leaves may still hold what no decoder reads: the film behind a phone's photograph, or a
    preview of the whole picture beside the part that was cut out.

    Args:
        data: From `strip_metadata`.
        max_pieces: As in `strip_metadata`.

    Raises:
        ValueError: too many pieces.
    """
    if data.startswith(b"\x89PNG"):
        return data
    if not data.startswith(b"\xff\xd8"):
        return None
    segments = list(_limit(_walk_scans(data), max_pieces))
    end = _MARKER.search(data, segments[-1][2]) if segments else None
    has_more = any(
        kind in _JPEG_DROPPED or (kind in _JPEG_COLOURS and stop - start > _JPEG_COLOURS_SIZE)
        for kind, start, stop in segments
    )
    return None if end is None or has_more else data[: end.end()]


def read_orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1, as stored, where the block is absent or broken.

    Only the first directory is read: other entries can point anywhere, each of them at megabytes.
    """
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


def _limit(pieces: Iterator[Piece], max_pieces: int) -> Iterator[Piece]:
    for number, piece in enumerate(pieces):
        if number >= max_pieces:
            raise ValueError(
                f"got an image file of more than {max_pieces} pieces; expected fewer chunks, segments or blocks; save "
                "the image again, or allow it with ImageLimits(max_pieces=...) or --image-limit max_pieces=..."
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


def _walk_webp(data: bytes) -> Iterator[Piece]:
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sL", data, position)
        yield kind, position, position + 8 + length
        position += 8 + length + length % 2


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
            # A file cannot hold very many of the others, which are full or nearly so.
            if data[position] < 128:
                yield _OTHER, position, position
            position += 1 + data[position]
        position += 1
        yield kind, start, position


def _size_of_colours(data: bytes, position: int) -> int:
    flags = data[position] if position < len(data) else 0
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _keep_first_picture(pieces: list[Piece]) -> list[Piece]:
    """The first picture of a GIF, and the block with its transparent colour, if that has the size Pillow expects."""
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
    # What follows the image, such as the film of a phone's photograph, can hold the same bytes by chance.
    if data.count(b"\xff" + _START_OF_SCAN) <= MAX_JPEG_SCANS:
        return
    num_scans = sum(kind == _START_OF_SCAN for kind, _, _ in _limit(_walk_scans(data), max_pieces))
    if num_scans > MAX_JPEG_SCANS:
        raise ValueError(f"got a JPEG of {num_scans} scans; expected at most {MAX_JPEG_SCANS}; save the image again")


def _walk_scans(data: bytes) -> Iterator[Piece]:
    """Segments up to the end of the image, as libjpeg finds them."""
    position = 2
    while (found := _MARKER.search(data, position)) and found[1] != _END_OF_IMAGE:
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        yield found[1], found.start(), position


_WALKS: dict[bytes, Callable[[bytes], Iterator[Piece]]] = {
    b"\x89PNG": _walk_png,
    b"\xff\xd8": _walk_jpeg,
    b"GIF8": _walk_gif,
    b"RIFF": _walk_webp,
}
