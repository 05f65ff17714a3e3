"""Images to `pixel_values`, bit for bit as the original LLaVA: padded, centre-cropped, or cut into anyres tiles.

What may surprise:

- "pad" fills with the mean colour truncated to integers, (122, 116, 104) for CLIP, not rounded.
- Images stay 8-bit PIL images until their last step, a table of 256 float32 levels per channel. The table gives
  exactly the values of "rescale in float64, normalise in float32".
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from .anyres_layout import check_pinpoints
from .image_arrays import ArrayImage
from .image_decoding import Picture
from .image_limits import DEFAULT_LIMITS, ImageLimits
from .image_loading import ImageSource, UrlReader, load_image, open_picture
from .image_tiles import cut_anyres, measure_need, pad_to_tile, read_tile_shape, resize_to_tile
from .messages import shorten

IMAGE_ASPECT_RATIOS = ("pad", "square", "anyres")

SHAPE_FIELDS = ("size", "crop_size", "do_center_crop", "resample")
"""What `read_tile_shape` reads."""
_MAX_LEVEL, _MIN_SPREAD = 1e4, 1e-6
"""Bounds of means, spreads and factors of levels; those of towers lie between 0.003 and 255."""

MACHINE_FIELDS = ("limits", "urls", "num_threads")
"""Fields that are never saved."""


class AnyLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    """What `AnyLlavaImageProcessorPil` takes beyond the keyword arguments of every image processor."""

    image_aspect_ratio: str | None
    image_grid_pinpoints: list | tuple | None


@dataclass(frozen=True, eq=False)
class CutImage:
    """An image as the vision tower sees it, before its normalisation."""

    tiles: list[np.ndarray] | list[torch.Tensor]
    """Bytes [tile_size, tile_size, 3], or [3 or 4, tile_size, tile_size] in the fast twin."""
    scale: float
    """Factor of the levels."""
    size: tuple[int, int]
    """(height, width) of the image in pixels."""


class AnyLlavaImageProcessorPil(PilBackend):
    """Turns images into the tiles of a LLaVA's vision tower, with Pillow alone (no torchvision).

    Beyond the fields of every image processor:

    - `image_aspect_ratio`: "pad" (to a square in the mean colour; v1.5), "square" (as the tower's own processor does:
      centre crop for CLIP, stretch for SigLIP; v0, v1) or "anyres" (whole image and detail tiles; v1.6).
    - `image_grid_pinpoints`: (height, width) pairs in pixels for "anyres", else None. The original writes them as
      (width, height).
    - `size`, `crop_size`, `do_center_crop`: `{"shortest_edge": n}` with a centre crop of at most n by n, or
      `{"height": n, "width": n}` with `do_center_crop=False`.

    What belongs to the machine and not to the model is never saved:

    - `limits`: which images are refused.
    - `urls`: fetches URLs; without it they are refused.
    - `num_threads`: how many images of a call are worked on at once; as many threads as torch uses by default.

    Raises:
        ValueError: an unknown `image_aspect_ratio`, "anyres" without pinpoints or with pinpoints that are no whole
            tiles, or sizes that give no square tile.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = AnyLlavaImageProcessorKwargs

    image_aspect_ratio = "pad"
    image_grid_pinpoints = None
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(
        self,
        *,
        limits: ImageLimits = DEFAULT_LIMITS,
        urls: UrlReader | None = None,
        num_threads: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.limits = limits
        self.urls = urls
        self.num_threads = num_threads
        names = self.valid_kwargs.__annotations__
        self._validate_preprocess_kwargs(**{name: value for name, value in self.__dict__.items() if name in names})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "size" or (name == "crop_size" and value is not None):
            value = _read_size(name, value, to_square=name == "crop_size" or self.default_to_square)
        super().__setattr__(name, value)

    @property
    def tile_size(self) -> int:
        """Side, in pixels, of every tile in `pixel_values`."""
        return read_tile_shape(self.size, self.crop_size, self.do_center_crop, self.resample).tile_size

    def to_dict(self) -> dict[str, Any]:
        """Fields that belong to the model, as `save_pretrained` writes them."""
        return {name: value for name, value in super().to_dict().items() if name not in MACHINE_FIELDS}

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As in transformers.

        Raises:
            ValueError: also for an argument without an effect here.
        """
        self._refuse_ineffective(kwargs)
        with naming_setting():
            return super().preprocess(images, *args, **kwargs)

    def _refuse_ineffective(self, settings: dict[str, Any]) -> None:
        expected = {"do_pad": (None, False), "pad_size": (None,), "image_seq_length": (None,)}
        expected["data_format"] = (None, ChannelDimension.FIRST, ChannelDimension.FIRST.value)
        if self.backend == "pil":
            expected["device"] = (None, "cpu", torch.device("cpu"))
        for name, value in settings.items():
            if name not in self.valid_kwargs.__annotations__ or value not in expected.get(name, (value,)):
                raise ValueError(
                    f"got {name}={shorten(value)}, which has no effect in {type(self).__name__}; expected other "
                    "settings: leave it out"
                )

    def fetch_images(self, images: Any) -> Any:
        """Loads what is not an image yet, keeping the nesting of lists.

        Args:
            images: Each a `pathlib.Path`, bytes, data URI, binary file object, PIL image or array, or a URL if `urls`
                fetches it. Any other text is refused: it may be a stranger's, and open any file.

        Raises:
            FileNotFoundError: there is no file at a path.
            ValueError: an image is refused, see `load_image`.
        """
        if isinstance(images, (list, tuple)):
            return self.map_images(self.fetch_images, images)
        if isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
            return images
        return load_image(images, limits=self.limits, urls=self.urls)

    def map_images(self, function: Callable[[Any], Any], images: Sequence[Any]) -> list[Any]:
        """The results of a function for each image, in their order; computed in threads if that can help."""
        num_threads = min(self.num_threads or torch.get_num_threads(), len(images))
        if num_threads <= 1:
            return [function(image) for image in images]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(function, images))

    def _prepare_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> list[CutImage]:
        cuts = self.map_images(lambda source: self._cut_source(source, **kwargs), flatten_images(images))
        return list(chain.from_iterable(cuts))

    def cut_picture(self, source: Any) -> CutImage:
        """A picture as the vision tower sees it, of much less memory, for calls with the settings that are stored.

        Args:
            source: As in `fetch_images`; not several.

        Raises:
            FileNotFoundError: there is no file at the path.
            ValueError: it is refused.
        """
        names = self.valid_kwargs.__annotations__
        (cut,) = self._cut_source(source, **{name: value for name, value in self.__dict__.items() if name in names})
        return cut

    def _cut_source(self, source: Any, **settings: Any) -> list[CutImage]:
        """Loads an image and cuts it at once, so that no more of them are in memory at full size than may be decoded
        at a time."""
        if isinstance(source, CutImage):
            return [source]

        def need(height: int, width: int) -> tuple[float, float, float]:
            return measure_need(
                height,
                width,
                shape=read_tile_shape(*(settings[name] for name in SHAPE_FIELDS)),
                image_aspect_ratio=settings["image_aspect_ratio"],
                pinpoints=settings["image_grid_pinpoints"],
            )

        # An array may hold several.
        is_batch = isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 4
        cuts = []
        for image in source if is_batch else [source]:
            image, scale = self.process_image(image, **settings)
            with open_picture(image, limits=self.limits, urls=self.urls, need=need) as picture:
                cuts.append(self.cut_image(picture, scale, **settings))
        return cuts

    def process_image(
        self,
        image: ImageSource,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        **kwargs: Any,
    ) -> tuple[ImageSource, float]:
        """The pixels of one image, or what they are to be loaded from.

        Args:
            image: What `load_image` takes, or an array or tensor with 1, 3 or 4 channels first or last, as levels of
                0..255 or as floats in 0..1.
            do_convert_rgb: False refuses a PIL image that is not RGB.
            input_data_format: Where the channels of an array are, if its shape leaves a doubt.
            do_rescale: Whether levels are scaled.
            rescale_factor: Their factor.
            **kwargs: The other settings of the call, not needed here.

        Returns:
            The image, and the factor of its levels. Floats in 0..1 count as rescaled already.

        Raises:
            ValueError: an image above the limits, or without a known range of values.
        """
        scale = rescale_factor if do_rescale else 1.0
        if isinstance(image, (np.ndarray, torch.Tensor)):
            channels = None if input_data_format is None else ChannelDimension(input_data_format).name.lower()
            image = ArrayImage(image, channels=channels, limits=self.limits)
            scale = 1 / 255 if image.is_rescaled else scale
        if isinstance(image, (Image.Image, ArrayImage)) and not do_convert_rgb and image.mode != "RGB":
            raise ValueError(f"got an image of mode {image.mode}; expected RGB; convert it or set do_convert_rgb=True")
        return image, scale

    def cut_image(self, picture: Picture, scale: float, **settings: Any) -> CutImage:
        """A picture as tiles.

        Args:
            picture: With as many pixels as the tiles need, or more.
            scale: Factor of its levels.
            **settings: All of the call.
        """
        shape = read_tile_shape(*(settings[name] for name in SHAPE_FIELDS))
        if settings["image_aspect_ratio"] == "anyres":
            tiles = cut_anyres(picture, shape, settings["image_grid_pinpoints"])
        elif settings["image_aspect_ratio"] == "pad":
            fill = tuple(int(level * 255) for level in settings["image_mean"])
            tiles = [pad_to_tile(picture, shape, fill)]
        else:
            tiles = [resize_to_tile(picture, shape)]
        return CutImage(tiles, scale, (picture.height, picture.width))

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        kwargs["size"] = _read_size("size", kwargs["size"], to_square=bool(kwargs["default_to_square"]))
        if kwargs["crop_size"] is not None:
            kwargs["crop_size"] = _read_size("crop_size", kwargs["crop_size"], to_square=True)
        kwargs = super()._standardize_kwargs(**kwargs)
        if kwargs["image_grid_pinpoints"] is not None:
            kwargs["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in kwargs["image_grid_pinpoints"]]
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs["image_aspect_ratio"] not in IMAGE_ASPECT_RATIOS:
            raise ValueError(
                f"got image_aspect_ratio={kwargs['image_aspect_ratio']!r}; expected one of "
                f"{', '.join(IMAGE_ASPECT_RATIOS)}; correct the image processor's config"
            )
        if not kwargs["do_resize"]:
            raise ValueError("got do_resize=False; expected True, because a vision tower takes one size; leave it out")
        for name, least, is_used in (
            ("image_mean", -_MAX_LEVEL, kwargs["do_normalize"]),
            ("image_std", _MIN_SPREAD, kwargs["do_normalize"]),
            ("rescale_factor", -_MAX_LEVEL, kwargs["do_rescale"]),
        ):
            if is_used:
                _check_levels(name, kwargs[name], least, num=1 if name == "rescale_factor" else 3)
        shape = read_tile_shape(kwargs["size"], kwargs["crop_size"], kwargs["do_center_crop"], kwargs["resample"])
        if kwargs["image_aspect_ratio"] == "anyres":
            if shape.edge != shape.tile_size:
                raise ValueError(
                    f"got size {shape.edge} and crop_size {shape.tile_size} with image_aspect_ratio='anyres'; "
                    "expected equal sizes, because tiles are not resized again; set both to the tower's"
                )
            check_pinpoints(kwargs["image_grid_pinpoints"] or (), tile_size=shape.tile_size)

    def _preprocess(
        self,
        images: list[CutImage],
        *,
        image_aspect_ratio: str,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("got no images; expected at least one; pass images=None for text alone")
        max_tiles = max(len(image.tiles) for image in images)
        side = len(images[0].tiles[0])
        pixel_values = np.zeros((len(images), max_tiles, 3, side, side), dtype=np.float32)
        norms = (image_mean, image_std) if do_normalize else ()
        for image, values in zip(images, pixel_values):
            table = _tabulate_levels(image.scale, *norms)
            for tile, tile_values in zip(image.tiles, values):
                for channel in range(3):
                    # "clip" because the default mode copies through a buffer; a byte is always inside the table.
                    np.take(table[channel], tile[..., channel], out=tile_values[channel], mode="clip")

        data = {"pixel_values": pixel_values[:, 0]}
        if image_aspect_ratio == "anyres":
            image_sizes = np.array([image.size for image in images], dtype=np.int64)
            data = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        return BatchFeature(data=data, tensor_type=return_tensors)


@contextmanager
def naming_setting() -> Iterator[None]:
    """Makes one line of what transformers says of a setting of the wrong type (5.23, processing_utils.py)."""
    try:
        yield
    except StrictDataclassError as error:
        found = " ".join(str(error).split())
        raise ValueError(f"got a setting of the wrong type ({found}); expected another type: correct it") from error


def _read_size(name: str, value: Any, *, to_square: bool) -> SizeDict:
    try:
        fields = dict(get_size_dict(value, default_to_square=to_square, param_name=name))
        if all(isinstance(side, int) and side > 0 for side in fields.values()):
            return SizeDict(**fields)
    except (AttributeError, LookupError, TypeError, ValueError):
        pass
    raise ValueError(f"got {name}={shorten(value)}; expected whole numbers of pixels: set those of the tower")


def _check_levels(name: str, value: Any, least: float, *, num: int) -> None:
    levels = [value] if num == 1 else value
    is_right = isinstance(levels, (list, tuple, np.ndarray)) and np.shape(levels) == (num,)
    if not is_right or not all(
        isinstance(level, Real) and not isinstance(level, bool) and least <= level <= _MAX_LEVEL for level in levels
    ):
        amount = "a number" if num == 1 else "three numbers, one per channel,"
        raise ValueError(
            f"got {name}={shorten(value)}; expected {amount} from {least:g} to {_MAX_LEVEL:g}: correct it"
        )


def flatten_images(images: Any) -> list:
    """The images of lists, however deep, in reading order."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item)]
    return [images]


def _tabulate_levels(
    scale: float, mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)
) -> np.ndarray:
    """(3, 256) float32: what each level of each channel becomes."""
    levels = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    return (levels - np.array(mean, dtype=np.float32)[:, None]) / np.array(std, dtype=np.float32)[:, None]


__all__ = ["AnyLlavaImageProcessorPil"]
