"""Pictures that leave the machine: their pixels, and nothing of where they were taken or on what."""

import io

from processing_llava.image_limits import (
    DEFAULT_LIMITS,
    JPEG_DROPPED,
    MARKER,
    ImageLimits,
    limit_pieces,
    strip_metadata,
    walk_scans,
)
from processing_llava.image_loading import ImageSource, load_image, naming_source, read_bytes

_JPEG_COLOURS, _JPEG_COLOURS_SIZE = (b"\xe0", b"\xee"), 18
"""JFIF and Adobe, and the size of the former without a preview."""


def clean_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """An image, encoded before, that holds nothing but the pixels of `load_image`, for files that leave the machine.

    JPEG and PNG lose their metadata and stay as they were encoded; all else becomes PNG, which changes no pixel.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: as `load_image`.
    """
    with naming_source(source):
        data = read_bytes(source, limits=limits, urls=None)
        image = load_image(data, limits=limits)
    stripped, orientation = strip_metadata(data, max_pieces=limits.max_pieces, max_frames=limits.max_frames)
    kept = _cut_to_pixels(stripped, max_pieces=limits.max_pieces) if orientation == 1 else None
    if kept is not None:
        return kept
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _cut_to_pixels(data: bytes, *, max_pieces: int) -> bytes | None:
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
    segments = list(limit_pieces(walk_scans(data), max_pieces))
    end = MARKER.search(data, segments[-1][2]) if segments else None
    has_more = any(
        kind in JPEG_DROPPED or (kind in _JPEG_COLOURS and stop - start > _JPEG_COLOURS_SIZE)
        for kind, start, stop in segments
    )
    return None if end is None or has_more else data[: end.end()]
