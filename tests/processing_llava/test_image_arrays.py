"""Whatever object is given as a picture becomes RGB or a ValueError of one line, and an honest array is exact."""

import io
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from processing_llava import ImageLimits, image_arrays, image_decoding
from processing_llava.data.row_lengths import read_image_size
from processing_llava.image_arrays import ArrayImage
from processing_llava.image_loading import load_image
from processing_llava.processing_llava import IMAGE_BACKENDS
from tests.processing_llava.hostile_images import png
from tests.processing_llava.hostile_objects import TWO_LINES

SHAPES = [(), (5,), (5, 4), (1, 1), (5, 4, 1), (5, 4, 3), (5, 4, 4), (3, 5, 4), (4, 4, 4), (1, 5, 4), (3, 3, 3)]
SHAPES += [(5, 4, 2), (0, 4, 3), (5, 0), (5, 4, 3, 1), (2, 3, 5, 4), (30, 1), (1, 21), (1, 1, 3, 5, 4)]
NUMPY_TYPES = ["?", *"bBhHiIlLefdgFDGO", "S3", "U3", "V3", "M8[s]", "m8[s]", ">u2", "<f4", ">f8"]
TORCH_TYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
VALUES = [0, 1, 255, 256, -1, 0.5, 1.5, float("nan"), float("inf"), float("-inf"), 1e30]
PROCESSOR = IMAGE_BACKENDS["pil"](size={"shortest_edge": 4}, crop_size=4)
LAYOUTS = {
    "plain": lambda array: array,
    "reversed": lambda array: array[::-1],
    "every other": lambda array: array[::2],
    "transposed": lambda array: array.T,
    "one value": lambda array: np.broadcast_to(array.reshape(-1)[:1], array.shape),
    "matrix": lambda array: np.asmatrix(array),
    "masked": lambda array: np.ma.masked_array(array, np.zeros(array.shape, bool)),
    "not to be written": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
}


def check(source):
    """RGB, or None if it was refused as it should be."""
    try:
        image = load_image(source)
    except ValueError as error:
        line = str(error)
        assert line.startswith("got ") and "; expected " in line, line
        assert line.isprintable() and len(line) < 1000, line
        # Four dimensions are a batch.
        if source.ndim != 4:
            with pytest.raises(ValueError, match=r"^got "):
                PROCESSOR([source])
        return None
    assert (type(image), image.mode, image.info) == (Image.Image, "RGB", {})
    assert read_image_size(source) == image.size[::-1]
    return image


def read_plainly(array):
    """All levels at once, of an array that is honest: what it is to become."""
    array = np.asarray(array)
    if array.ndim == 2:
        array = array[..., None]
    elif array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    are_levels = array.dtype != bool and np.array_equal(array, np.rint(array))
    levels = (array if are_levels else array * 255).astype(np.uint8)
    return load_image(Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[-1] == 1 else levels)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_arrays_of_every_type_shape_value_and_layout(dtype):
    num_loaded = 0
    for shape, value, layout in product(SHAPES, VALUES, LAYOUTS.values()):
        try:
            array = layout(np.full(shape, value).astype(dtype))
        except (ValueError, TypeError, OverflowError, IndexError):
            # There is no such array.
            continue
        image = check(array)
        num_loaded += image is not None
        if image is not None and np.asarray(array).shape not in ((1, 1), (30, 1)):
            assert image.tobytes() == read_plainly(array).tobytes()
    assert (num_loaded > 0) == (np.dtype(dtype).kind in "uif")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_tensors_of_every_type_shape_and_layout(dtype):
    layouts = [
        lambda tensor: tensor,
        lambda tensor: tensor.clone().requires_grad_(),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: tensor.flip(0).transpose(0, -1),
        lambda tensor: tensor.reshape(-1)[:1].expand(9, 8),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.conj(),
        lambda tensor: torch._neg_view(tensor),
        lambda tensor: tensor.to_mkldnn(),
        lambda tensor: tensor.as_subclass(type("Tensor2", (torch.Tensor,), {})),
    ]
    for shape, value, layout in product(SHAPES, (0, 1, 0.5, float("nan")), layouts):
        try:
            tensor = layout(torch.full(shape, value).to(dtype))
        except (RuntimeError, TypeError, IndexError):
            # There is no such tensor.
            continue
        image = check(tensor)
        if image is not None:
            numbers = tensor.detach()
            numbers = (numbers.float() if numbers.is_floating_point() else numbers).numpy()
            if numbers.shape not in ((1, 1), (30, 1)):
                assert image.tobytes() == read_plainly(numbers).tobytes()


@pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "f2", "f4", "f8", "g"])
@pytest.mark.parametrize("channels", ["last", "first"])
def test_bands_and_the_whole_are_the_same(dtype, channels, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 120, (61, 47, 3))
    array = (levels / 255 if dtype in ("f2", "f4", "f8", "g") else levels).astype(dtype)
    expected = read_plainly(array)
    array = np.ascontiguousarray(np.moveaxis(array, -1, 0)) if channels == "first" else array
    monkeypatch.setattr(image_arrays, "BAND_VALUES", 300)
    monkeypatch.setattr(image_decoding, "BAND_PIXELS", 100)
    # torch has no "g", and of halves, numpy rounds the products.
    for source in (array, *([torch.from_numpy(array)] if dtype not in ("f2", "g") else [])):
        assert load_image(source).tobytes() == expected.tobytes()


def test_floats_are_told_by_any_band(monkeypatch):
    """A picture whose first rows are black or white has levels that look like integers there."""
    monkeypatch.setattr(image_arrays, "BAND_VALUES", 30)
    array = np.zeros((40, 10, 3), np.float32)
    array[35, 5, 1] = 0.5
    assert ArrayImage(array).is_rescaled and load_image(array).getpixel((5, 35)) == (0, 127, 0)
    array[36, 5, 1] = 2
    with pytest.raises(ValueError, match="from 0 to 2; expected levels"):
        load_image(array)


def test_large_arrays_are_reduced_as_files_are():
    levels = np.asarray(Image.radial_gradient("L").convert("RGB").resize((5200, 4200), Image.Resampling.BICUBIC))
    with pytest.raises(ValueError, match=r"expected max_memory of at most .* ImageLimits\(max_memory="):
        load_image(levels)
    prepare = IMAGE_BACKENDS["pil"](image_aspect_ratio="pad")
    whole = IMAGE_BACKENDS["pil"](
        image_aspect_ratio="pad", limits=ImageLimits(max_memory=10**12, max_milliseconds=10**9)
    )
    for source in (levels, (levels / np.float32(255)), torch.from_numpy(levels.copy()).permute(2, 0, 1)):
        found, expected = (
            process([source], do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"]
            for process in (prepare, whole)
        )
        unit = 255 if source.dtype == np.float32 else 1
        assert np.abs(found - expected).max() * unit <= 2
    assert min(load_image(levels, shortest_edge=300).size) >= 870


@pytest.mark.parametrize("backend", ["pil", "torch"])
def test_an_error_while_a_picture_is_cut_is_not_one_of_the_picture(backend, monkeypatch):
    processor = IMAGE_BACKENDS[backend]()

    def fail(*args, **settings):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(processor, "cut_image", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        processor.cut_picture(png(8, 8))


def test_a_missing_file_is_both_errors(tmp_path):
    for error in (FileNotFoundError, ValueError):
        with pytest.raises(error, match=r"missing\.png; expected an image file there"):
            load_image(tmp_path / "missing.png")


def test_messages_name_a_file_in_one_line(tmp_path):
    path = tmp_path / TWO_LINES[:60]
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image of a known format") as caught:
        load_image(path)
    assert str(caught.value).isprintable() and "the file is 'a b " in str(caught.value)
    with pytest.raises(ValueError, match="'BytesIO' object|no image of a known format"):
        load_image(io.BytesIO())
