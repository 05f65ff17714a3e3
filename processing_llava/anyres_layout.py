"""Which tiles an image is cut into, what is kept of them, and how many tokens that makes: integers only.

The processor counts placeholders with this file and the model arranges features with it, so that the two cannot
disagree. What is surprising: the arithmetic mixes floats and truncation exactly as in the original LLaVA, because
released checkpoints were trained on its rounding errors. transformers rounds before it truncates (transformers 5.23,
models/llava_next/modeling_llava_next.py) and reads pinpoints in the other order, and therefore picks other grids for
some sizes of images.

Every pair is (height, width). The original stores pinpoints as (width, height): swap each pair, keep the list order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .messages import shorten

PATCH_MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
"""What becomes of the features of the detail tiles. "flat": one tile after the other, whole. "spatial": the rows of
the joined map. "spatial_unpad": those rows without the black borders, each closed by a newline feature."""

MAX_TILES = 100
"""Most detail tiles of an image; no published LLaVA has more than 36."""


@dataclass(frozen=True)
class ImageLayout:
    """The tiles of one image and the part of their joined feature map that becomes tokens.

    `grid_rows` by `grid_columns` detail tiles follow the tile that shows the whole image; both are 0 for an image
    that is a single tile. With P patches per side, the slice `[top:bottom, left:right]` of the
    (grid_rows * P, grid_columns * P) map is kept; it may be empty in one direction.
    """

    grid_rows: int
    grid_columns: int
    top: int
    bottom: int
    left: int
    right: int
    num_tokens: int

    @property
    def num_tiles(self) -> int:
        """Tiles in `pixel_values`, the whole image included."""
        return 1 + self.grid_rows * self.grid_columns

    @property
    def kept_rows(self) -> int:
        """Rows of the joined feature map that are kept."""
        return self.bottom - self.top

    @property
    def kept_columns(self) -> int:
        """Columns of the joined feature map that are kept, newline not counted."""
        return self.right - self.left


def check_merge_type(patch_merge_type: str) -> None:
    """Refuses an unknown merge type.

    Raises:
        ValueError: `patch_merge_type` is not one of `PATCH_MERGE_TYPES`.
    """
    if patch_merge_type not in PATCH_MERGE_TYPES:
        raise ValueError(
            f"got patch_merge_type={shorten(patch_merge_type)}; expected one of {', '.join(PATCH_MERGE_TYPES)}; "
            "set it in the model config"
        )


def check_visual_tokens(visual_tokens: int | None) -> None:
    """Refuses what is no number of tokens of an image.

    Raises:
        ValueError: `visual_tokens` is neither None nor a whole number of at least 1.
    """
    if visual_tokens is not None and (not isinstance(visual_tokens, int) or visual_tokens < 1):
        raise ValueError(
            f"got visual_tokens={visual_tokens!r}; expected a whole number of at least 1, or None for all tokens of "
            "an image; give the same to model and processor"
        )


def check_pinpoints(pinpoints: Sequence[Sequence[int]], *, tile_size: int) -> None:
    """Refuses pinpoints that cannot be cut into whole tiles.

    Args:
        pinpoints: (height, width) pairs in pixels.
        tile_size: Side of a tile in pixels.

    Raises:
        ValueError: the list is empty, an entry is not a pair, a side is not a positive multiple of `tile_size`, or
            there are more than `MAX_TILES` tiles, or as many pairs.
    """
    if not pinpoints:
        raise ValueError("got no pinpoints; expected at least one (height, width) pair; set image_grid_pinpoints")
    most = max(len(pinpoints), *(math.prod(pinpoint) // tile_size**2 for pinpoint in pinpoints))
    if most > MAX_TILES:
        raise ValueError(f"got pinpoints for {most} tiles; expected at most {MAX_TILES}; correct image_grid_pinpoints")
    for pinpoint in pinpoints:
        if len(pinpoint) != 2 or any(side < 1 or side % tile_size for side in pinpoint):
            raise ValueError(
                f"got pinpoint {tuple(pinpoint)}; expected (height, width), each a positive multiple of the tile size "
                f"{tile_size}; correct image_grid_pinpoints or the size of the image processor"
            )


def select_grid(height: int, width: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Picks the pinpoint that shows most pixels of the image, then the one that wastes fewest; ties go to the first.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        pinpoints: Candidate (height, width) pairs in pixels; their order decides ties.

    Returns:
        (height, width) of the chosen pinpoint.
    """

    def usefulness(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - pinpoint[0] * pinpoint[1]

    # max() returns the first of equals, which is the rule for ties.
    best_height, best_width = max(pinpoints, key=usefulness)
    return best_height, best_width


def fit_inside(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Size of the image once resized, aspect ratio kept, to touch the inside of the target.

    The free side is rounded up, unlike in `select_grid` and in unpadding, which both truncate.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        target_height: Height of the pinpoint in pixels.
        target_width: Width of the pinpoint in pixels.

    Returns:
        (height, width) in pixels, neither larger than the target.
    """
    scale_height = target_height / height
    scale_width = target_width / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), target_height), target_width
    return target_height, min(math.ceil(width * scale_height), target_width)


def plan_image(
    height: int,
    width: int,
    *,
    tile_size: int,
    patches_per_side: int,
    prefix_tokens: int = 0,
    pinpoints: tuple[tuple[int, int], ...] | None,
    patch_merge_type: str,
    visual_tokens: int | None = None,
) -> ImageLayout:
    """Lays out one image: its tiles, the features kept of them, and the number of tokens.

    Args:
        height: Height of the image in pixels, after its EXIF orientation.
        width: Width of the image in pixels, after its EXIF orientation.
        tile_size: Side of a tile in pixels.
        patches_per_side: P, patches along the side of a tile; a tile has P * P patch features.
        prefix_tokens: Features of a tile that are no patches and are kept (1 for CLIP's CLS, else 0).
        pinpoints: (height, width) pairs in pixels; None for one tile per image ("pad" and "square"), where the merge
            type has nothing to merge.
        patch_merge_type: One of `PATCH_MERGE_TYPES`.
        visual_tokens: Most tokens of an image, chosen among its features once the tiles are merged; None for all.

    Returns:
        The layout. `num_tokens` counts newlines and prefix features, but no start or end token.

    Raises:
        ValueError: an unknown merge type, an image without pixels, pinpoints that are no whole tiles, a spatial
            merge of features that include a prefix, which has no place in a grid, or a wrong `visual_tokens`.
    """
    check_merge_type(patch_merge_type)
    check_visual_tokens(visual_tokens)
    limit = math.inf if visual_tokens is None else visual_tokens
    if height < 1 or width < 1:
        raise ValueError(f"got an image of height {height} and width {width}; expected at least 1 pixel each")
    tokens_per_tile = patches_per_side**2 + prefix_tokens
    if pinpoints is None:
        return ImageLayout(0, 0, 0, 0, 0, 0, num_tokens=min(tokens_per_tile, limit))
    if prefix_tokens and patch_merge_type != "flat":
        raise ValueError(
            f"got {prefix_tokens} prefix features per tile with patch_merge_type={patch_merge_type!r}; expected none, "
            "because they have no place in the grid; select patch features only, or merge 'flat'"
        )
    check_pinpoints(pinpoints, tile_size=tile_size)

    grid_height, grid_width = select_grid(height, width, pinpoints)
    rows, columns = grid_height // tile_size, grid_width // tile_size
    map_height, map_width = rows * patches_per_side, columns * patches_per_side
    if patch_merge_type == "flat":
        num_tokens = (1 + rows * columns) * tokens_per_tile
        return ImageLayout(rows, columns, 0, map_height, 0, map_width, min(num_tokens, limit))
    if patch_merge_type == "spatial":
        num_tokens = tokens_per_tile + map_height * map_width
        return ImageLayout(rows, columns, 0, map_height, 0, map_width, min(num_tokens, limit))
    top, left = _find_padding(height, width, map_height, map_width)
    bottom, right = map_height - top, map_width - left
    num_tokens = tokens_per_tile + (bottom - top) * (right - left + 1)
    return ImageLayout(rows, columns, top, bottom, left, right, min(num_tokens, limit))


def _find_padding(height: int, width: int, map_height: int, map_width: int) -> tuple[int, int]:
    """(top, left) rows and columns of the map that show only padding; as many go at the bottom and on the right.

    An odd amount of padding keeps one row or column of it, and a map side that is nearly all padding keeps nothing
    (an image of 8000 x 100 has no detail tokens). Checkpoints were trained on both.
    """
    if width / height > map_width / map_height:
        return (map_height - int(height * (map_width / width))) // 2, 0
    return 0, (map_width - int(width * (map_height / height))) // 2
