"""AnyLlavaImageProcessor: what AnyLlavaImageProcessorPil does, faster, and within a level or two of it.

Images stay 8-bit tensors until they are normalised, and torch resizes those with vector instructions (BENCHMARKS.md:
Preprocessing). What may surprise: the filter weights of torch have fewer digits than Pillow's, so that some levels out
of a thousand differ by one. The Pillow backend, bit for bit the original, stays the default.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling

from .anyres_layout import fit_inside, select_grid
from .image_arrays import view_pixels
from .image_decoding import Picture
from .image_processing_llava import SHAPE_FIELDS, AnyLlavaImageProcessorKwargs, AnyLlavaImageProcessorPil, CutImage
from .image_tiles import TileShape, fit_shorter_side, read_tile_shape, shrinks_columns_first

# C 3 channels, or 4 of which the last is padding · H height · W width · S side of a tile

FILTERS = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}

MAX_SQUARE_PIXELS = 4_000_000
"""A larger square, which could take twenty times the memory of a thin image, is not built to pad it."""
MAX_RATIO = 8
"""Longer side over shorter side. torch would hold several copies of what a thinner image becomes."""


class AnyLlavaImageProcessor(AnyLlavaImageProcessorPil):
    """The fast twin of `AnyLlavaImageProcessorPil`: the same fields, the same files, tensors instead of arrays.

    With `device=` in a call, images go there as bytes and are normalised there.

    Raises:
        ValueError: as its twin; and for another filter than bilinear or bicubic.
    """

    # Tests of transformers look for it in each class.
    valid_kwargs = AnyLlavaImageProcessorKwargs

    @property
    def backend(self) -> str:
        return "torch"

    def cut_image(self, picture: Picture, scale: float, **settings: Any) -> CutImage:
        """As in the twin, which cuts those that would take much memory here."""
        mode, height, width = settings["image_aspect_ratio"], picture.height, picture.width
        side, short_side = max(height, width), min(height, width)
        is_costly = side * (side if mode == "pad" else short_side) > MAX_SQUARE_PIXELS
        if is_costly or picture.is_reduced or side > MAX_RATIO * short_side:
            cut = super().cut_image(picture, scale, **settings)
            tiles = [torch.from_numpy(np.require(tile, requirements="W")).permute(2, 0, 1) for tile in cut.tiles]
            return CutImage(tiles, scale, cut.size)
        image_CHW = view_pixels(picture.image).permute(2, 0, 1)
        shape = read_tile_shape(*(settings[name] for name in SHAPE_FIELDS))
        if mode == "anyres":
            tiles = _cut_anyres(image_CHW, shape, select_grid(height, width, settings["image_grid_pinpoints"]))
        elif mode == "pad":
            fill = tuple(int(level * 255) for level in settings["image_mean"])
            tiles = [_pad_to_tile(image_CHW, shape, fill)]
        else:
            tiles = [_resize_to_tile(image_CHW, shape)]
        return CutImage(tiles, scale, (height, width))

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs["resample"] not in FILTERS:
            raise ValueError(
                f"got resample={kwargs['resample']!r}; expected bilinear (2) or bicubic (3), the filters of this "
                'backend; correct it, or load the image processor with backend="pil"'
            )

    def _preprocess(
        self,
        images: list[CutImage],
        *,
        image_aspect_ratio: str,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        return_tensors: str | None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("got no images; expected at least one; pass images=None for text alone")
        mean, std = (image_mean, image_std) if do_normalize else ((0.0,) * 3, (1.0,) * 3)
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        side = images[0].tiles[0].shape[-1]
        batch = (len(images), max(len(image.tiles) for image in images), 3, side, side)
        # numpy 2.4 asks the system for large pages and torch 2.13 does not; small ones take longer to get.
        values = torch.from_numpy(np.empty(batch, np.float32)) if device is None else torch.empty(batch, device=device)

        def fill(index: int) -> None:
            image = images[index]
            factor, offset = (tensor.float().to(device) for tensor in (image.scale / std, -mean / std))
            # One tile after the other, so that each stays in the cache of the CPU.
            for tile_CSS, values_3SS in zip(image.tiles, values[index]):
                values_3SS.copy_(tile_CSS[:3].to(device)).mul_(factor).add_(offset)
            values[index, len(image.tiles) :] = 0

        self.map_images(fill, range(len(images)))
        data = {"pixel_values": values[:, 0]}
        if image_aspect_ratio == "anyres":
            data = {"pixel_values": values, "image_sizes": torch.tensor([image.size for image in images])}
        return BatchFeature(data, tensor_type=return_tensors)


def _resize_to_tile(image_CHW: torch.Tensor, shape: TileShape) -> torch.Tensor:
    """[C, S, S]"""
    if not shape.keeps_ratio:
        return _resize(image_CHW, shape.edge, shape.edge, shape.resample)
    height, width = fit_shorter_side(*image_CHW.shape[1:], shape.edge)
    return _crop_centre(_resize(image_CHW, height, width, shape.resample), shape.tile_size)


def _pad_to_tile(image_CHW: torch.Tensor, shape: TileShape, fill: tuple[int, ...]) -> torch.Tensor:
    """[C, S, S]"""
    num_channels, height, width = image_CHW.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    row = torch.tensor(fill + (0,) * (num_channels - 3), dtype=torch.uint8).repeat(side)
    square_HWC = row.expand(side, -1).contiguous().view(side, side, num_channels)
    square_HWC[top : top + height, left : left + width] = image_CHW.permute(1, 2, 0)
    square_CHW = square_HWC.permute(2, 0, 1)
    return _crop_centre(_interpolate(square_CHW, shape.edge, shape.edge, shape.resample), shape.tile_size)


def _cut_anyres(image_CHW: torch.Tensor, shape: TileShape, grid: tuple[int, int]) -> list[torch.Tensor]:
    """Tiles of [C, S, S]: the stretched image, then the detail tiles row by row."""
    side = shape.tile_size
    height, width = fit_inside(*image_CHW.shape[1:], *grid)
    top, left = (grid[0] - height) // 2, (grid[1] - width) // 2
    canvas_3HW = torch.zeros(3, *grid, dtype=torch.uint8)
    canvas_3HW[:, top : top + height, left : left + width] = _resize(image_CHW, height, width, shape.resample)[:3]
    details = [tile for row in canvas_3HW.split(side, dim=1) for tile in row.split(side, dim=2)]
    return [_resize(image_CHW, side, side, shape.resample), *details]


def _resize(image_CHW: torch.Tensor, height: int, width: int, resample: int) -> torch.Tensor:
    """[C, height, width]"""
    if shrinks_columns_first(*image_CHW.shape[1:], height, width):
        image_CHW = _interpolate(image_CHW, height, image_CHW.shape[2], resample)
    return _interpolate(image_CHW, height, width, resample)


def _interpolate(image_CHW: torch.Tensor, height: int, width: int, resample: int) -> torch.Tensor:
    return interpolate(image_CHW[None], (height, width), mode=FILTERS[resample], antialias=True)[0]


def _crop_centre(image_CHW: torch.Tensor, side: int) -> torch.Tensor:
    top, left = ((length - side) // 2 for length in image_CHW.shape[1:])
    # A copy, which does not keep the rest of the image in memory.
    return image_CHW[:, top : top + side, left : left + side].clone()


__all__ = ["AnyLlavaImageProcessor"]
