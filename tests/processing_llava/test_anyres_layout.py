"""Layouts against the published token table, an independent brute force, and the sizes where transformers differs."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution

from processing_llava.anyres_layout import check_pinpoints, fit_inside, plan_image, select_grid

# as the released checkpoints write them, (width, height), and as this package does
ORIGINAL_PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
PINPOINTS = tuple((height, width) for width, height in ORIGINAL_PINPOINTS)

# image (width, height), grid (columns, rows), kept (rows, columns), tokens: measured with the original code
TOKEN_TABLE = [
    ((336, 336), (1, 2), (24, 24), 1176),
    ((300, 300), (1, 2), (24, 24), 1176),
    ((100, 100), (1, 2), (24, 24), 1176),
    ((337, 336), (2, 1), (24, 24), 1176),
    ((336, 672), (1, 2), (48, 24), 1776),
    ((640, 480), (2, 2), (36, 48), 2340),
    ((1024, 768), (2, 2), (36, 48), 2340),
    ((480, 640), (2, 2), (48, 36), 2352),
    ((899, 1024), (2, 2), (48, 42), 2640),
    ((672, 672), (2, 2), (48, 48), 2928),
    ((1000, 1000), (2, 2), (48, 48), 2928),
    ((1920, 1080), (2, 2), (28, 48), 1948),
    ((1080, 1920), (2, 2), (48, 28), 1968),
    ((2000, 500), (3, 1), (18, 72), 1890),
    ((500, 2000), (1, 3), (72, 18), 1944),
    ((4000, 500), (3, 1), (10, 72), 1306),
    ((50, 2000), (1, 3), (72, 2), 792),
    ((8000, 100), (3, 1), (0, 72), 576),
    ((1, 1000), (1, 3), (72, 0), 648),
]

# the 8,400 sizes on which the original and transformers were compared, as (width, height)
COMPARED_SIZES = [(width, height) for width in range(40, 1400, 13) for height in range(40, 1400, 17)]


def plan(height, width, *, patch_merge_type="spatial_unpad", prefix_tokens=0, pinpoints=PINPOINTS, **fields):
    return plan_image(
        height,
        width,
        tile_size=336,
        patches_per_side=24,
        prefix_tokens=prefix_tokens,
        pinpoints=pinpoints,
        patch_merge_type=patch_merge_type,
        **fields,
    )


def original_grid(width, height, pinpoints):
    """The published selection rule, in (width, height) and with explicit comparisons."""
    best, best_effective, best_waste = None, -1, math.inf
    for grid_width, grid_height in pinpoints:
        scale = min(grid_width / width, grid_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = grid_width * grid_height - effective
        if effective > best_effective or (effective == best_effective and waste < best_waste):
            best, best_effective, best_waste = (grid_width, grid_height), effective, waste
    return best


def original_kept(width, height, map_width, map_height):
    """Row and column numbers that survive unpadding, by slicing lists of them."""
    rows, columns = list(range(map_height)), list(range(map_width))
    if width / height > map_width / map_height:
        padding = (map_height - int(height * (map_width / width))) // 2
        return rows[padding : map_height - padding], columns
    padding = (map_width - int(width * (map_height / height))) // 2
    return rows, columns[padding : map_width - padding]


@pytest.mark.parametrize(("size", "grid", "kept", "num_tokens"), TOKEN_TABLE, ids=lambda value: str(value))
def test_token_table(size, grid, kept, num_tokens):
    layout = plan(size[1], size[0])
    assert (layout.grid_columns, layout.grid_rows) == grid
    assert (layout.kept_rows, layout.kept_columns) == kept
    assert layout.num_tokens == num_tokens
    assert layout.num_tiles == 1 + grid[0] * grid[1]


@settings(max_examples=3000, deadline=None)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    patches_per_side=st.integers(1, 30),
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8),
)
def test_any_layout_equals_brute_force(width, height, patches_per_side, grids):
    tile_size = 14 * patches_per_side
    original = [(columns * tile_size, rows * tile_size) for columns, rows in grids]
    layout = plan_image(
        height,
        width,
        tile_size=tile_size,
        patches_per_side=patches_per_side,
        pinpoints=tuple((rows, columns) for columns, rows in original),
        patch_merge_type="spatial_unpad",
    )
    grid_width, grid_height = original_grid(width, height, original)
    assert (layout.grid_columns, layout.grid_rows) == (grid_width // tile_size, grid_height // tile_size)
    map_width, map_height = layout.grid_columns * patches_per_side, layout.grid_rows * patches_per_side
    rows, columns = original_kept(width, height, map_width, map_height)
    assert list(range(map_height))[layout.top : layout.bottom] == rows
    assert list(range(map_width))[layout.left : layout.right] == columns
    assert layout.num_tokens == patches_per_side**2 + len(rows) * (len(columns) + 1)


@settings(max_examples=1000, deadline=None)
@given(height=st.integers(1, 20000), width=st.integers(1, 20000), target=st.sampled_from(PINPOINTS))
def test_fitted_image_touches_the_inside_of_its_target(height, width, target):
    fitted = fit_inside(height, width, *target)
    assert all(1 <= side <= limit for side, limit in zip(fitted, target))
    assert fitted[0] == target[0] or fitted[1] == target[1]
    # the free side is the exact one rounded up, give or take the float error of one ulp
    scale = min(target[0] / height, target[1] / width)
    assert all(-1e-6 <= side - exact < 1 + 1e-6 for side, exact in zip(fitted, (height * scale, width * scale)))


def test_ties_go_to_the_first_pinpoint_of_the_original_order():
    """transformers reads the same list as (height, width), so that ties choose the transposed grid."""
    differing = 0
    for width, height in COMPARED_SIZES:
        chosen = select_grid(height, width, PINPOINTS)
        assert chosen[::-1] == original_grid(width, height, ORIGINAL_PINPOINTS)
        differing += chosen != tuple(select_best_resolution((height, width), ORIGINAL_PINPOINTS))
    assert differing == 414


def test_unpadding_truncates_without_rounding_first():
    """transformers rounds to 7 digits before truncating, and differs on exactly these of the compared sizes."""
    differing = []
    for width, height in COMPARED_SIZES:
        layout = plan(height, width)
        map_height, map_width = layout.grid_rows * 24, layout.grid_columns * 24
        if width / height > map_width / map_height:
            rounded = map_height - 2 * ((map_height - int(round(height * (map_width / width), 7))) // 2)
            kept = layout.kept_rows
        else:
            rounded = map_width - 2 * ((map_width - int(round(width * (map_height / height), 7))) // 2)
            kept = layout.kept_columns
        if rounded != kept:
            differing.append(((width, height), kept, rounded))
    assert differing == [((235, 1128), 14, 16), ((352, 924), 62, 64)]


@pytest.mark.parametrize("patch_merge_type", ["flat", "spatial", "spatial_unpad"])
def test_one_tile_per_image_without_pinpoints(patch_merge_type):
    layout = plan(480, 640, pinpoints=None, patch_merge_type=patch_merge_type)
    assert (layout.num_tiles, layout.num_tokens) == (1, 576)
    assert plan(480, 640, pinpoints=None, patch_merge_type=patch_merge_type, prefix_tokens=1).num_tokens == 577


def test_flat_keeps_every_feature_of_every_tile():
    layout = plan(480, 640, patch_merge_type="flat", prefix_tokens=1)
    assert (layout.num_tiles, layout.num_tokens) == (5, 5 * 577)


def test_spatial_keeps_the_padding_and_adds_no_newline():
    layout = plan(480, 640, patch_merge_type="spatial")
    assert (layout.top, layout.bottom, layout.left, layout.right) == (0, 48, 0, 48)
    assert layout.num_tokens == 576 + 48 * 48


@pytest.mark.parametrize("pinpoints", [None, PINPOINTS])
@pytest.mark.parametrize("patch_merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("visual_tokens", [1, 64, 100_000])
def test_fewer_tokens_change_nothing_but_their_number(pinpoints, patch_merge_type, visual_tokens):
    fields = {"pinpoints": pinpoints, "patch_merge_type": patch_merge_type}
    full = plan(480, 640, **fields)
    layout = plan(480, 640, visual_tokens=visual_tokens, **fields)
    assert layout == replace(full, num_tokens=min(full.num_tokens, visual_tokens))


@pytest.mark.parametrize("patch_merge_type", ["spatial", "spatial_unpad"])
def test_prefix_features_have_no_place_in_a_grid(patch_merge_type):
    with pytest.raises(ValueError, match="got 1 prefix features per tile"):
        plan(480, 640, patch_merge_type=patch_merge_type, prefix_tokens=1)


def test_unknown_merge_type_lists_the_known_ones():
    with pytest.raises(ValueError, match="'maxpool'; expected one of flat, spatial, spatial_unpad"):
        plan(480, 640, patch_merge_type="maxpool")


def test_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="height 0 and width 640"):
        plan(0, 640)


@pytest.mark.parametrize("pinpoints", [(), ((336, 500),), ((0, 336),), ((336, 336, 336),)])
def test_pinpoints_that_are_no_whole_tiles_are_refused(pinpoints):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        check_pinpoints(pinpoints, tile_size=336)
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        plan(480, 640, pinpoints=pinpoints)
