"""A budget for pictures: what is reduced stays near the whole picture, and threads share what they decode into."""

import io
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from modeling_llava.commands.answering import read_image_limits
from processing_llava import ImageLimits, image_decoding
from processing_llava.image_decoding import UPRIGHT
from processing_llava.image_loading import load_image, open_picture
from processing_llava.image_processing_llava import AnyLlavaImageProcessorPil, CutImage
from processing_llava.processing_llava import IMAGE_BACKENDS
from spaces_demo.safety import UPLOAD_LIMITS
from tests.conftest import GOLDENS
from tests.processing_llava.image_encoders import encode, lossless_webp, png, progressive_jpeg

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NO_BUDGET = ImageLimits(max_memory=10**12, max_milliseconds=10**9)
RAW = {"do_normalize": False, "do_rescale": False, "return_tensors": "np"}


def processor(image_aspect_ratio, *, backend="pil", **fields):
    pinpoints = PINPOINTS if image_aspect_ratio == "anyres" else None
    return IMAGE_BACKENDS[backend](image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=pinpoints, **fields)


def photograph(width, height, name="cat_451x300.png"):
    with Image.open(GOLDENS / "images" / name) as image:
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def plans(monkeypatch):
    """(part of the size at which a JPEG is decoded, factor of its reduction) of each picture that is read."""
    found, original = [], image_decoding._plan

    def plan(*args, **kwargs):
        result = original(*args, **kwargs)
        found.append(result[:2])
        return result

    monkeypatch.setattr(image_decoding, "_plan", plan)
    return found


PHOTOGRAPHS = {
    "12 megapixels": (4000, 3000, {"quality": 90}),
    "12 megapixels, upright": (3024, 4032, {"quality": 90}),
    "12 megapixels, progressive": (4000, 3000, {"quality": 85, "progressive": True}),
    "24 megapixels": (6000, 4000, {"quality": 90}),
    "48 megapixels": (8064, 6048, {"quality": 85}),
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_large_photographs_are_within_two_levels_of_full_decoding(name, plans):
    width, height, options = PHOTOGRAPHS[name]
    data = encode(photograph(width, height), "JPEG", **options)
    for image_aspect_ratio in ("pad", "square", "anyres"):
        batch = processor(image_aspect_ratio)(data, **RAW)
        scale = plans[-1][0] * plans[-1][1]
        assert scale > 1 or "12 megapixels" in name
        expected = processor(image_aspect_ratio, limits=NO_BUDGET)(data, **RAW)
        difference = np.abs(batch["pixel_values"] - expected["pixel_values"])
        assert difference.max() <= (2 if scale > 1 else 0), (image_aspect_ratio, plans[-2:])
        if image_aspect_ratio == "anyres":
            assert batch["image_sizes"].tolist() == [[height, width]]


def test_a_photograph_of_12_megapixels_is_exact_where_that_fits(plans):
    data = encode(photograph(4000, 3000), "JPEG")
    processor("pad")(data)
    assert load_image(data).size == (4000, 3000)
    assert plans == [(1, 1), (1, 1)]


@pytest.mark.parametrize(("size", "factor"), [((701, 503), 2), ((503, 701), 3)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_is_reduced_stays_in_its_place(orientation, size, factor, monkeypatch):
    """Sides that the factor does not divide leave less than a pixel at one end; turning moves it to the other."""
    image, exif = photograph(*size), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(image, exif=exif)
    upright = image.transpose(UPRIGHT[orientation]) if orientation > 1 else image
    assert load_image(data).tobytes() == upright.tobytes()
    monkeypatch.setattr(image_decoding, "_plan", lambda *args, **kwargs: (1, factor, 0, 0.0))
    for image_aspect_ratio in ("pad", "square", "anyres"):
        fields = {"size": {"shortest_edge": 28}, "crop_size": 28}
        prepare = AnyLlavaImageProcessorPil(
            image_aspect_ratio=image_aspect_ratio,
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]] if image_aspect_ratio == "anyres" else None,
            **fields,
        )
        with monkeypatch.context() as whole:
            whole.setattr(image_decoding, "_plan", lambda *args, **kwargs: (1, 1, 0, 0.0))
            expected = prepare(upright, **RAW)
        found = prepare(data, **RAW)
        assert np.abs(found["pixel_values"] - expected["pixel_values"]).max() <= 3, image_aspect_ratio


@pytest.mark.parametrize("backend", ["pil", "torch"])
def test_small_pictures_are_never_reduced(backend, plans):
    for mode in ("RGB", "L", "P", "RGBA"):
        for image_aspect_ratio in ("pad", "square", "anyres"):
            processor(image_aspect_ratio, backend=backend)(encode(photograph(640, 480).convert(mode)))
    assert set(plans) == {(1, 1)}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_bands_convert_as_the_whole_does(mode, monkeypatch):
    image = photograph(301, 203).convert("L" if mode == "I;16" else "RGB").convert(mode)
    whole = load_image(image)
    monkeypatch.setattr(image_decoding, "BAND_PIXELS", 1000)
    assert load_image(image).tobytes() == whole.tobytes()


def test_a_budget_says_which_field_to_raise():
    for data, name in (
        (lossless_webp(4000, 3000), "max_memory"),
        (progressive_jpeg(2400, 1800, scans=50, components=1, refines=True), "max_milliseconds"),
    ):
        with pytest.raises(ValueError, match=rf"pixels; expected {name} of at most \d+, not .* ImageLimits\({name}="):
            load_image(data)
        assert load_image(data, limits=NO_BUDGET).mode == "RGB"


def test_a_png_is_stopped_when_its_time_is_over(monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(image_decoding.time, "thread_time", lambda: next(now))
    noise = encode(Image.effect_noise((200, 200), 90))
    with pytest.raises(ValueError, match="expected max_milliseconds of at most 200, not"):
        load_image(noise)
    assert load_image(noise, limits=ImageLimits(max_milliseconds=10**9)).size == (200, 200)


@pytest.mark.parametrize("error", [AssertionError("palette"), RecursionError(), AttributeError("a"), EOFError()])
def test_whatever_pillow_trips_over_is_damage(error, monkeypatch):
    def trip(self):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", trip)
    with pytest.raises(ValueError, match="cannot be decoded .*; expected a whole image; save it again"):
        load_image(png(4, 4))


def test_threads_share_the_memory_that_they_decode_into(monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_DECODING", 2 * 4 * 500 * 500 + 1)
    at_once, most, lock = [0], [0], threading.Lock()

    def hold(_):
        with open_picture(png(500, 500, colour=2)):
            with lock:
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
            time.sleep(0.01)
            with lock:
                at_once[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, range(16)))
    assert most == [2]
    # One that is larger than all of it waits until it is alone.
    monkeypatch.setattr(image_decoding, "MAX_DECODING", 1)
    assert load_image(png(50, 50)).size == (50, 50)


def test_a_picture_that_somebody_opened_stays_as_it_is(tmp_path, plans):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(photograph(8064, 6048), "JPEG"))
    with Image.open(path) as opened:
        expected = processor("pad")(path, **RAW)["pixel_values"]
        assert np.array_equal(processor("pad")(opened, **RAW)["pixel_values"], expected)
        assert opened.size == (8064, 6048) and plans[0] == plans[1] != (1, 1)
    opened = Image.open(io.BytesIO(encode(photograph(80, 60), "JPEG")))
    assert load_image(opened).tobytes() == load_image(opened).tobytes() == opened.convert("RGB").tobytes()
    small = tmp_path / "b.png"
    photograph(80, 60).save(small)
    with warnings.catch_warnings():
        # To read it closes its file.
        warnings.simplefilter("error")
        load_image(Image.open(small))


@pytest.mark.parametrize("backend", ["pil", "torch"])
@pytest.mark.parametrize("image_aspect_ratio", ["pad", "square", "anyres"])
def test_a_picture_may_be_cut_before_a_call(image_aspect_ratio, backend):
    prepare = processor(image_aspect_ratio, backend=backend)
    path = GOLDENS / "images" / "cat_451x300.png"
    cut = prepare.cut_picture(path)
    assert isinstance(cut, CutImage) and cut.size == (300, 451)
    found, expected = (prepare([first, path], return_tensors="np") for first in (cut, path))
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_a_shorter_side_that_suffices():
    data = encode(photograph(8064, 6048), "JPEG")
    with pytest.raises(ValueError, match="max_memory"):
        load_image(data)
    image = load_image(data, shortest_edge=300)
    assert min(image.size) >= 870 and image.size[0] < 8064 and not image.info
    assert load_image(png(90, 60), shortest_edge=3).size == (90, 60)


def test_uprights_are_those_of_pillow():
    image = photograph(30, 20)
    for orientation, method in UPRIGHT.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        with Image.open(io.BytesIO(encode(image, exif=exif))) as opened:
            assert ImageOps.exif_transpose(opened).tobytes() == image.transpose(method).tobytes()


def test_the_command_and_the_page_use_the_same_limits():
    for limits in (read_image_limits([]), UPLOAD_LIMITS, AnyLlavaImageProcessorPil().limits):
        assert (limits.max_memory, limits.max_milliseconds) == (61_000_000, 200)
