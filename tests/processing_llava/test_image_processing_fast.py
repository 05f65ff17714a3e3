"""The fast image processor against its exact twin: equal shapes, sizes and settings, and levels that differ little."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import modeling_llava  # noqa: F401 - registers the image processors
from processing_llava import AnyLlavaImageProcessor, AnyLlavaImageProcessorPil, ImageLimits, image_processing_fast
from processing_llava.image_arrays import view_pixels
from tests.conftest import GOLDENS

PICTURES = sorted((GOLDENS / "images").glob("*.png"))
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = [
    (640, 480),
    (480, 640),
    (97, 413),
    (413, 97),
    (1, 1),
    (7, 5),
    (336, 336),
    (1200, 60),
    (60, 1200),
    (1500, 1100),
]


def twins(image_aspect_ratio, *, tile_size=336, **fields):
    """The exact processor and the fast one, of equal settings."""
    fields = {"size": {"shortest_edge": tile_size}, "crop_size": tile_size} | fields
    if image_aspect_ratio == "anyres":
        fields["image_grid_pinpoints"] = [[side * tile_size // 336 for side in pair] for pair in PINPOINTS]
    return [
        image_processor(image_aspect_ratio=image_aspect_ratio, **fields)
        for image_processor in (AnyLlavaImageProcessorPil, AnyLlavaImageProcessor)
    ]


def differ(image_aspect_ratio, image, **fields) -> torch.Tensor:
    """By how many levels the pixels of the two differ."""
    settings = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    exact, fast = (processor(image, **settings) for processor in twins(image_aspect_ratio, **fields))
    assert exact.keys() == fast.keys()
    assert exact["pixel_values"].shape == fast["pixel_values"].shape
    if "image_sizes" in exact:
        assert exact["image_sizes"].equal(fast["image_sizes"])
    return (exact["pixel_values"] - fast["pixel_values"]).abs()


def noise(size):
    return Image.merge("RGB", [Image.effect_noise(size, 90) for _ in range(3)])


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "square", "anyres"])
@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_pictures_differ_by_a_level_or_two(image_aspect_ratio, path):
    difference = differ(image_aspect_ratio, Image.open(path))
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "square", "anyres"])
@pytest.mark.parametrize("size", SIZES)
def test_noise_of_every_shape_differs_by_a_level_or_two(image_aspect_ratio, size):
    difference = differ(image_aspect_ratio, noise(size))
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.02


def test_towers_that_stretch_their_images():
    fields = {"size": {"height": 224, "width": 224}, "crop_size": None, "do_center_crop": False}
    assert differ("square", noise((300, 200)), **fields).max() <= 2
    assert differ("pad", noise((300, 200)), resample=2, **fields).max() <= 2


def test_equal_levels_become_equal_values():
    """One colour stays what it is however it is resized: what is left is the arithmetic of normalisation."""
    for level in range(0, 256, 5):
        image = Image.new("RGB", (400, 400), (level, 255 - level, 7))
        exact, fast = (processor(image, return_tensors="pt")["pixel_values"] for processor in twins("square"))
        torch.testing.assert_close(fast, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"do_rescale": False}, {"do_normalize": False}, {"image_mean": [0.1, 0.2, 0.3]}]
)
def test_options_of_a_call_mean_the_same(options):
    image = noise((400, 300))
    exact, fast = (processor(image, return_tensors="pt", **options)["pixel_values"] for processor in twins("square"))
    scale = 1 if options == {"do_rescale": False} else 255
    torch.testing.assert_close(
        fast, exact, rtol=0, atol=2.1 / scale * (1 if options == {"do_normalize": False} else 4)
    )


def test_every_kind_of_source_gives_the_same_pixels():
    image = Image.open(PICTURES[0]).convert("RGB")
    levels = np.array(image)
    channels_first = torch.from_numpy(levels).permute(2, 0, 1)
    read_only = np.asarray(image)
    _, fast = twins("pad", tile_size=56)
    expected = fast(image, return_tensors="pt")["pixel_values"]
    sources = [levels, read_only, channels_first, channels_first.contiguous(), levels.astype(np.float64), PICTURES[0]]
    for source in sources:
        torch.testing.assert_close(fast(source, return_tensors="pt")["pixel_values"], expected, rtol=0, atol=0)
    floats = (channels_first.float() + 0.5).clip(max=255) / 255
    torch.testing.assert_close(fast(floats, return_tensors="pt")["pixel_values"], expected)
    assert levels.tobytes() == image.tobytes()


def test_grey_and_transparent_images_become_rgb():
    grey = Image.effect_noise((80, 60), 90)
    for image in (grey, np.asarray(grey)[..., None], grey.convert("RGBA"), Image.new("RGBA", (60, 60), (9, 9, 9, 0))):
        assert differ("square", image, tile_size=56).max() <= 2


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "square", "anyres"])
def test_threads_change_nothing(image_aspect_ratio):
    images = [noise(size) for size in SIZES] + [PICTURES[0]]
    for processor in twins(image_aspect_ratio, tile_size=56):
        expected = processor(images, return_tensors="pt")
        processor.num_threads = 4
        threaded = processor(images, return_tensors="pt")
        assert threaded.keys() == expected.keys()
        assert all(threaded[name].equal(value) for name, value in expected.items())


def test_refusals_reach_the_caller_from_threads():
    _, fast = twins("pad", tile_size=56)
    fast.num_threads = 2
    with pytest.raises(ValueError, match="max_aspect_ratio"):
        fast([noise((50, 50)), noise((500, 5))])
    with pytest.raises(FileNotFoundError):
        fast([PICTURES[0], PICTURES[0].with_name("missing.png")])


def test_unused_tiles_are_zero():
    _, fast = twins("anyres", tile_size=56)
    pixel_values = fast([noise((300, 300)), noise((100, 50))], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape[1] == 5
    assert pixel_values[0, 4].any()
    assert not pixel_values[1, 3:].any()


def test_a_square_too_large_for_memory_is_padded_in_bands(monkeypatch):
    image = noise((500, 40))
    expected = differ("pad", image)
    monkeypatch.setattr(image_processing_fast, "MAX_SQUARE_PIXELS", 500 * 500 - 1)
    assert not differ("pad", image).any()
    assert expected.max() <= 2


def test_normalised_on_a_device():
    _, fast = twins("anyres", tile_size=56)
    image = noise((300, 200))
    expected = fast(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        fast(image, return_tensors="pt", device="cpu")["pixel_values"], expected, rtol=0, atol=0
    )


@pytest.mark.gpu
def test_normalised_on_a_gpu():
    _, fast = twins("anyres", tile_size=56)
    image = noise((300, 200))
    pixel_values = fast(image, return_tensors="pt", device="cuda")["pixel_values"]
    assert pixel_values.device.type == "cuda"
    torch.testing.assert_close(pixel_values.cpu(), fast(image, return_tensors="pt")["pixel_values"])


def test_filters_that_torch_lacks_are_refused():
    with pytest.raises(ValueError, match='expected bilinear .* or bicubic .* backend="pil"'):
        AnyLlavaImageProcessor(resample=Image.Resampling.LANCZOS)


def test_files_are_those_of_the_twin(tmp_path):
    exact, fast = twins("anyres", limits=ImageLimits(max_side=99), num_threads=3)
    assert fast.to_dict() == exact.to_dict()
    assert not {"limits", "urls", "num_threads"} & set(fast.to_dict())
    fast.save_pretrained(tmp_path)
    assert AnyLlavaImageProcessorPil.from_pretrained(tmp_path).to_dict() == exact.to_dict()
    assert (fast.backend, exact.backend) == ("torch", "pil")


@pytest.mark.parametrize("size", [(3, 2), (640, 427), (2100, 2000)])
def test_the_memory_of_an_image_is_seen_as_it_is(size):
    """The last has more than one piece, and is copied."""
    image = noise(size)
    expected = np.array(image)
    pixels = view_pixels(image)
    del image
    gc.collect()
    Image.new("RGB", size, "red")
    assert pixels.shape == (size[1], size[0], 3 if size[0] == 2100 else 4)
    assert np.array_equal(pixels[..., :3].numpy(), expected)


@pytest.mark.parametrize(
    ("backend", "expected"), [("pil", AnyLlavaImageProcessorPil), ("torch", AnyLlavaImageProcessor)]
)
def test_auto_image_processor_takes_the_name_of_the_backend(backend, expected, tmp_path):
    twins("anyres")[0].save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend=backend)) is expected
