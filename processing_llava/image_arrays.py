"""Arrays and tensors of pixels -> 8-bit levels, and PIL images -> tensors."""

import ctypes

import numpy as np
import torch
from PIL import Image

from .image_limits import DEFAULT_LIMITS, ImageLimits, check_image_size

NUM_CHANNELS = (1, 3, 4)
"""Grey, RGB, and RGB with alpha."""


def read_levels(
    array: np.ndarray | torch.Tensor, *, channels: str | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> tuple[np.ndarray, bool]:
    """The levels of an image.

    Args:
        array: [height, width], or with 1, 3 or 4 channels first or last; levels of 0..255, or floats of 0..1.
        channels: "first" or "last"; told by the shape if None, and first where both fit, as in transformers 5.23,
            image_utils.py.
        limits: What is refused.

    Returns:
        uint8 [height, width, 1, 3 or 4], and whether the values were floats of 0..1. Those are truncated to levels as
        transformers does.

    Raises:
        ValueError: another shape or range of values, or above a limit.
    """
    if array.ndim == 2:
        array, channels = array[..., None], "last"
    if array.ndim != 3:
        raise ValueError(
            f"got an image array of shape {tuple(array.shape)}; expected [height, width] or three dimensions; pass "
            "one image, or a list"
        )
    if channels is None:
        channels = "first" if array.shape[0] in NUM_CHANNELS else "last"
    height, width, num_channels = array.shape if channels == "last" else (*array.shape[1:], array.shape[0])
    if num_channels not in NUM_CHANNELS:
        raise ValueError(
            f"got an image array of shape {tuple(array.shape)}; expected 1, 3 or 4 channels, first or last; convert it"
        )
    check_image_size(height, width, limits=limits)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        # numpy has no bfloat16.
        array = (array.float() if array.is_floating_point() else array).numpy()
    if channels == "first":
        array = np.moveaxis(array, 0, -1)
    if array.dtype == np.uint8:
        return array, False
    low, high = float(array.min()), float(array.max())
    are_levels = array.dtype != np.bool_ and np.array_equal(array, np.rint(array))
    is_rescaled = not are_levels and high <= 1 and np.issubdtype(array.dtype, np.floating)
    if min(low, 255 - high) < 0 or not (are_levels or is_rescaled):
        raise ValueError(
            f"got an image array of {array.dtype} from {low:g} to {high:g}; expected levels of 0..255, or floats of "
            "0..1; pass image / white, with the value that means white"
        )
    return (array * 255 if is_rescaled else array).astype(np.uint8), is_rescaled


class _ArrowArray(ctypes.Structure):
    """A struct of Arrow's C data interface, in which Pillow shows its memory (Pillow 12.3, Image.py)."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    *((name, ctypes.c_void_p) for name in ("dictionary", "release", "private_data")),
]
_read_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_read_capsule.restype, _read_capsule.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def view_pixels(image: Image.Image) -> torch.Tensor:
    """The levels of an RGB image, not to be written to: uint8 [height, width, 3], or [height, width, 4] with a last
    channel of padding.

    Pillow keeps four bytes for each pixel. Where they lie in one piece, which holds up to 4 million pixels, they are
    not copied.
    """
    try:
        capsules = image.__arrow_c_array__()
    except ValueError:
        # Not in one piece.
        return torch.from_numpy(np.array(image))
    array = ctypes.cast(_read_capsule(capsules[1], b"arrow_array"), ctypes.POINTER(_ArrowArray)).contents
    bands = array.children[0].contents
    buffer = (ctypes.c_uint8 * bands.length).from_address(bands.buffers[1])
    # The memory belongs to the capsules, and the tensor keeps the buffer.
    buffer.owner = capsules
    return torch.frombuffer(buffer, dtype=torch.uint8).view(image.height, image.width, -1)


def image_from_levels(levels: np.ndarray) -> Image.Image:
    """uint8 [height, width, 1, 3 or 4] as an image of mode L, RGB or RGBA."""
    return Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[-1] == 1 else levels))
