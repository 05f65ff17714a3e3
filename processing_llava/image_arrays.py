"""Arrays and tensors of pixels as images, and PIL images as tensors."""

import ctypes
import math

import numpy as np
import torch
from PIL import Image

from .image_limits import DEFAULT_LIMITS, ImageLimits, check_costs, check_image_size, shorten

NUM_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Grey, RGB, and RGB with alpha."""
BAND_VALUES = 400_000
"""Values that are looked at in one piece."""


class ArrayImage:
    """An array or tensor of pixels, with what `image_decoding.py` needs of a PIL image.

    Args:
        array: [height, width], or with 1, 3 or 4 channels first or last; levels of 0..255, or floats of 0..1.
        channels: "first" or "last"; told by the shape if None, and first where both fit, as in transformers 5.23,
            image_utils.py.
        limits: What is refused.

    Raises:
        ValueError: another kind of array, shape or range of values, or above a limit.
    """

    format = None

    def __init__(
        self,
        array: np.ndarray | torch.Tensor,
        *,
        channels: str | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.info: dict[str, object] = {}
        self.is_rescaled = False
        """Whether the values are floats of 0..1, which are truncated to levels as transformers does."""
        try:
            self._read_shape(array, channels, limits)
            self._read_values(self._read_rows(0, 1), limits)
        except ValueError:
            raise
        except Exception as error:
            # Tensors without memory, of other layouts, of other types.
            raise ValueError(
                f"got an image array of type {shorten(type(array).__name__)} ({shorten(error)}); expected plain "
                "numbers; convert it"
            ) from error

    def _read_shape(self, array: np.ndarray | torch.Tensor, channels: str | None, limits: ImageLimits) -> None:
        shape = tuple(array.shape)
        if isinstance(array, np.ndarray):
            if isinstance(array, np.ma.MaskedArray):
                raise ValueError("got an image array with a mask; expected plain numbers; pass array.filled(...)")
            # A matrix has rules of its own.
            array = np.asarray(array)
        if len(shape) == 2:
            array, channels, shape = array[..., None], "last", (*shape, 1)
        if len(shape) != 3:
            raise ValueError(
                f"got an image array of shape {shorten(shape)}; expected [height, width] or three dimensions; pass "
                "one image, or a list"
            )
        if channels is None:
            channels = "first" if shape[0] in NUM_CHANNELS else "last"
        self.height, self.width, num_channels = shape if channels == "last" else (*shape[1:], shape[0])
        if num_channels not in NUM_CHANNELS:
            raise ValueError(
                f"got an image array of shape {shorten(shape)}; expected 1, 3 or 4 channels, first or last; convert it"
            )
        check_image_size(self.height, self.width, limits=limits)
        self.array, self.has_channels_first, self.mode = array, channels == "first", NUM_CHANNELS[num_channels]
        self.size = self.width, self.height

    def _read_rows(self, start: int, stop: int) -> np.ndarray:
        rows = self.array[:, start:stop] if self.has_channels_first else self.array[start:stop]
        if isinstance(rows, torch.Tensor):
            rows = rows.detach().cpu()
            # numpy has no bfloat16.
            rows = (rows.float() if rows.is_floating_point() else rows).numpy()
        return np.moveaxis(rows, 0, -1) if self.has_channels_first else rows

    def _read_values(self, rows: np.ndarray, limits: ImageLimits) -> None:
        kind, itemsize = rows.dtype.kind, rows.dtype.itemsize
        if kind not in "buif":
            raise ValueError(f"got an image array of {shorten(rows.dtype)}; expected plain numbers; convert it")
        # Floats without a unit in a CPU take longest; and no neighbours in memory, longer.
        is_slow = kind == "f" and (itemsize not in (4, 8) or self.array.itemsize == 1)
        is_scattered = not (rows.flags.c_contiguous or rows[..., 0].flags.c_contiguous)
        rate = (18e-9 if is_slow else 1.5e-9 if itemsize > 1 else 0.3e-9) + 2.5e-9 * is_scattered
        self.seconds = rate * self.height * self.width * len(self.mode)
        check_costs(self.height, self.width, {"max_milliseconds": math.ceil(1000 * self.seconds)}, limits=limits)
        if rows.dtype == np.uint8:
            return
        low, high, are_levels = np.inf, -np.inf, kind != "b"
        num_rows = max(1, BAND_VALUES // (self.width * len(self.mode)))
        for start in range(0, self.height, num_rows):
            rows = self._read_rows(start, start + num_rows)
            # Python's would lose what is no number.
            low, high = np.minimum(low, float(rows.min())), np.maximum(high, float(rows.max()))
            are_levels = are_levels and (kind != "f" or np.array_equal(rows, np.rint(rows)))
        self.is_rescaled = bool(kind == "f" and not are_levels and high <= 1)
        if min(low, 255 - high) < 0 or not (are_levels or self.is_rescaled):
            raise ValueError(
                f"got an image array of {rows.dtype} from {low:g} to {high:g}; expected levels of 0..255, or floats "
                "of 0..1; pass image / white, with the value that means white"
            )

    def load(self) -> None:
        """They are there."""

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """Whole rows, of mode L, RGB or RGBA."""
        rows = self._read_rows(box[1], box[3])
        levels = (rows * 255 if self.is_rescaled else rows).astype(np.uint8, copy=False)
        if self.mode != "L" and rows.flags.c_contiguous:
            return Image.fromarray(levels)
        planes = [Image.fromarray(np.ascontiguousarray(levels[..., number])) for number in range(len(self.mode))]
        return Image.merge(self.mode, planes)


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
    """The levels of an RGB image, not to be written to: uint8 [height, width, 3], or 4 with a last channel of padding.

    Pillow keeps four bytes for each pixel. Up to 4 million lie in one piece, and are not copied.
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
