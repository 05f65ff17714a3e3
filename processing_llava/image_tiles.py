"""A picture -> the tiles that a vision tower sees, with Pillow, bit for bit as the original LLaVA.

"anyres" stretches the whole image into its first tile, and pads the detail tiles with black: slips of the original on
which every released checkpoint was trained.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers.image_utils import SizeDict

from .anyres_layout import fit_inside, select_grid
from .image_decoding import MIN_RATIO, Picture

BAND_PIXELS = 250_000
"""Rows are padded and resized in bands of about this many."""
BIG_PIXELS = 8_000_000
"""An image of more is averaged before it becomes the first tile of anyres: to resize it twice takes too long."""


@dataclass(frozen=True)
class TileShape:
    """What the vision tower sees, and how an image gets there."""

    tile_size: int
    """Side of a tile in pixels."""
    edge: int
    """What resizing brings the shorter side to, or both sides where the ratio is not kept; at least `tile_size`."""
    keeps_ratio: bool
    """CLIP keeps the aspect ratio and crops the centre; SigLIP stretches."""
    resample: int
    """Pillow's number of the filter."""


MAX_EDGE = 4096
"""Of an image that a tower takes, in pixels."""


def read_tile_shape(size: SizeDict, crop_size: SizeDict | None, do_center_crop: bool, resample: int) -> TileShape:
    """The fields of an image processor as what they say of tiles.

    Raises:
        ValueError: if they make no square of one size.
    """
    keeps_ratio = size.shortest_edge is not None
    edge = size.shortest_edge if keeps_ratio else size.height
    if edge is None or size.longest_edge is not None or (not keeps_ratio and size.width != edge):
        raise ValueError(
            f"got size={dict(size)}; expected {{'shortest_edge': n}} or {{'height': n, 'width': n}}; set it to the "
            "side that the vision tower takes"
        )
    if edge > MAX_EDGE:
        raise ValueError(
            f"got size={dict(size)}; expected at most {MAX_EDGE}, as no tower takes more: correct the image processor"
        )
    if keeps_ratio and not do_center_crop:
        raise ValueError(
            f"got size={dict(size)} with do_center_crop=False; expected a crop, because images that keep their aspect "
            "ratio are not square; set do_center_crop=True, or size to {'height': n, 'width': n}"
        )
    if not do_center_crop:
        return TileShape(edge, edge, keeps_ratio, resample)
    tile_size = crop_size.height
    if tile_size is None or crop_size.width != tile_size or tile_size > edge or (tile_size < edge and not keeps_ratio):
        raise ValueError(
            f"got crop_size={dict(crop_size)} with size={dict(size)}; expected a square no larger than the shortest "
            "edge; correct it, or set do_center_crop=False for a tower that stretches its images"
        )
    return TileShape(tile_size, edge, keeps_ratio, resample)


def measure_need(
    height: int, width: int, *, shape: TileShape, image_aspect_ratio: str, pinpoints: list[list[int]] | None
) -> tuple[float, float, float]:
    """Rows and columns to which a picture is resized at most, and pixels that are read for that at full size."""
    side = max(height, width)
    if image_aspect_ratio == "pad":
        return shape.edge * height / side, shape.edge * width / side, height * side
    if image_aspect_ratio == "anyres":
        fitted = fit_inside(height, width, *select_grid(height, width, pinpoints))
        share = 1.3 if height * width > BIG_PIXELS else 2
        return *(max(length, shape.tile_size) for length in fitted), share * height * width
    fitted = fit_shorter_side(height, width, shape.edge) if shape.keeps_ratio else (shape.edge, shape.edge)
    return *fitted, height * width


def resize_to_tile(picture: Picture, shape: TileShape) -> np.ndarray:
    """What the tower's own image processor does, as (tile_size, tile_size, 3) bytes."""
    if not shape.keeps_ratio:
        return np.asarray(_resize(picture, shape.edge, shape.edge, resample=shape.resample))
    height, width = fit_shorter_side(picture.height, picture.width, shape.edge)
    return _crop_centre(_resize(picture, height, width, resample=shape.resample), shape.tile_size)


def fit_shorter_side(height: int, width: int, edge: int) -> tuple[int, int]:
    """(height, width) with the shorter side exact and the longer one truncated, as everywhere in CLIP's processing."""
    short = min(height, width)
    return tuple(edge if side == short else int(edge * side / short) for side in (height, width))


def pad_to_tile(picture: Picture, shape: TileShape, fill: tuple[int, ...]) -> np.ndarray:
    """The picture in the middle of a square of the colour `fill`, resized, as (tile_size, tile_size, 3) bytes.

    Equal to building that square and resizing it, but the square of a 20000 x 100 image would take 1.6 GB. Pillow
    resizes a square's rows before its columns and stores bytes in between, so bands of rows can be narrowed one at a
    time, and rows that are all padding not at all.
    """
    image = _fade_ends(picture, fill)
    side = max(picture.height, picture.width)
    scale = picture.width / (picture.box[2] - picture.box[0])
    padding = [(side - length) // 2 / scale for length in (picture.width, picture.height)]
    # The image lies on whole pixels, and the square around it begins and ends where it may.
    left, top = map(math.ceil, padding)
    x, y = left + picture.box[0] - padding[0], top + picture.box[1] - padding[1]
    num_columns, num_rows = math.ceil(x + side / scale), math.ceil(y + side / scale)
    narrowed = Image.new("RGB", (shape.edge, num_rows), fill)
    band_height = max(1, BAND_PIXELS // num_columns)
    for start in range(0, image.height, band_height):
        stop = min(start + band_height, image.height)
        band = Image.new("RGB", (num_columns, stop - start), fill)
        band.paste(image.crop((0, start, image.width, stop)), (left, 0))
        box = (x, 0, x + side / scale, stop - start)
        narrowed.paste(band.resize((shape.edge, stop - start), shape.resample, box=box), (0, top + start))
    box = (0, y, shape.edge, y + side / scale)
    return _crop_centre(narrowed.resize((shape.edge, shape.edge), shape.resample, box=box), shape.tile_size)


def _fade_ends(picture: Picture, fill: tuple[int, ...]) -> Image.Image:
    """The image; pixels beside the padding that show less of the picture than others take the rest from it."""
    axis = 0 if picture.height > picture.width else 1
    image, last = picture.image, picture.image.size[axis] - 1
    for place, share in ((0, 1 - picture.box[axis]), (last, picture.box[axis + 2] - last)):
        if share < 1:
            corner, size = [0, 0], [*image.size]
            corner[axis], size[axis] = place, 1
            strip = image.crop((*corner, corner[0] + size[0], corner[1] + size[1]))
            image = image.copy()
            image.paste(Image.blend(Image.new("RGB", strip.size, fill), strip, share), tuple(corner))
    return image


def cut_anyres(picture: Picture, shape: TileShape, pinpoints: list[list[int]]) -> list[np.ndarray]:
    """The stretched image, then the detail tiles row by row, each as (tile_size, tile_size, 3) bytes."""
    tile_size = shape.tile_size
    grid_height, grid_width = select_grid(picture.height, picture.width, pinpoints)
    height, width = fit_inside(picture.height, picture.width, grid_height, grid_width)
    canvas = Image.new("RGB", (grid_width, grid_height))
    resized = _resize(picture, height, width, resample=shape.resample)
    canvas.paste(resized, ((grid_width - width) // 2, (grid_height - height) // 2))
    pixels = np.asarray(canvas)
    details = [
        pixels[top : top + tile_size, left : left + tile_size]
        for top in range(0, grid_height, tile_size)
        for left in range(0, grid_width, tile_size)
    ]
    if math.prod(picture.image.size) > BIG_PIXELS:
        picture = picture.reduce(max(1, int(min(picture.image.size) / tile_size / MIN_RATIO)))
    return [np.asarray(_resize(picture, tile_size, tile_size, resample=shape.resample)), *details]


def _resize(picture: Picture, height: int, width: int, *, resample: int) -> Image.Image:
    """Pillow 13's resize with any Pillow, so that a picture is the same tokens on every machine."""
    image, (left, top, right, bottom) = picture.image, picture.box
    if shrinks_columns_first(picture.height, picture.width, height, width):
        image = image.resize((image.width, height), resample, box=(0, top, image.width, bottom))
        top, bottom = 0, height
    return image.resize((width, height), resample, box=(left, top, right, bottom))


def shrinks_columns_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether Pillow 13 shrinks columns before rows, as they lose most (python-pillow/Pillow#9549).

    Earlier versions always take rows first, and as bytes are stored in between, tall images differ by a level or two.
    """
    return height - new_height > max(0, 2 * (width - new_width))


def _crop_centre(image: Image.Image, side: int) -> np.ndarray:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))
