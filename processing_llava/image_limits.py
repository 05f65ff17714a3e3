"""What an image may cost. Everything is checked before a pixel is decoded."""

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Anything above is refused.

    Raises:
        ValueError: a limit below 1.
    """

    max_bytes: int = 50_000_000
    """Size of the encoded file."""
    max_pixels: int = 64_000_000
    """Height times width; decoding takes up to 12 bytes for each."""
    max_side: int = 20_000
    """Longer side in pixels."""
    max_aspect_ratio: float = 20
    """Longer side over shorter side: resizing the shorter side of a thin image to that of a tile makes it huge."""
    max_frames: int = 1000
    """Pictures of an animation, of which only the first is decoded."""
    max_pieces: int = 20_000
    """Chunks, segments or blocks of the file."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = self.__dict__[field.name]
            if not value >= 1:
                raise ValueError(f"got {field.name}={value!r}; expected at least 1; raise it or leave the default")


DEFAULT_LIMITS = ImageLimits()


def read_limits(settings: Iterable[str]) -> ImageLimits:
    """The limits that texts such as "max_pixels=200000000" set, and the others as they are by default.

    Raises:
        ValueError: naming the text that sets none.
    """
    kinds, limits = {field.name: field.type for field in fields(ImageLimits)}, {}
    for setting in settings:
        name, _, number = setting.partition("=")
        try:
            limits[name] = kinds[name](number)
        except (KeyError, ValueError) as error:
            raise ValueError(f"got {setting!r}; expected NAME=NUMBER with one of {', '.join(kinds)}") from error
    return ImageLimits(**limits)


def check_num_bytes(num_bytes: int, *, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Refuses a file above the limit.

    Raises:
        ValueError: naming the limit.
    """
    if num_bytes > limits.max_bytes:
        raise ValueError(
            f"got an image of {num_bytes} bytes or more; expected at most {limits.max_bytes}; compress the image, or "
            "allow it with ImageLimits(max_bytes=...) or --image-limit max_bytes=..."
        )


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
                f"resize or crop the image, or allow it with ImageLimits({name}=...) or --image-limit {name}=..."
            )
