"""Pixels against the original's, bit for bit; and the ways in which transformers calls an image processor."""

import json
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from processing_llava import AnyLlavaImageProcessor, image_processing_llava
from processing_llava.anyres_layout import plan_image
from processing_llava.image_limits import ImageLimits
from processing_llava.image_processing_llava import AnyLlavaImageProcessorPil
from tests.conftest import GOLDENS
from tests.processing_llava.image_encoders import encode

EXPECTED_PIXELS = load_file(GOLDENS / "pixels56.safetensors")
# the goldens give them as (width, height)
PINPOINTS_56 = [[height, width] for width, height in [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]]
CASES = {
    "v1-linear-startend": ("square", 224),
    "v1.5-vicuna": ("pad", 336),
    "v1.6-vicuna-anyres": ("anyres", 336),
    "v1.6-mistral-anyres": ("anyres", 336),
}


def image_processor(image_aspect_ratio, *, tile_size=56, **fields):
    if image_aspect_ratio == "anyres":
        fields["image_grid_pinpoints"] = [[side * tile_size // 56 for side in pair] for pair in PINPOINTS_56]
    return AnyLlavaImageProcessorPil(
        image_aspect_ratio=image_aspect_ratio, size={"shortest_edge": tile_size}, crop_size=tile_size, **fields
    )


def open_image(name="cat_451x300.png"):
    with Image.open(GOLDENS / "images" / name) as image:
        return image.copy()


def process(processor, images, **kwargs):
    return processor(images, return_tensors="pt", **kwargs)["pixel_values"]


@pytest.mark.parametrize("key", EXPECTED_PIXELS)
def test_pixels_are_those_of_the_original(key):
    image_aspect_ratio, name = key.split(".", 1)
    pixel_values = process(image_processor(image_aspect_ratio), open_image(name))
    torch.testing.assert_close(pixel_values[0], EXPECTED_PIXELS[key], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_reference_checkpoints_get_the_pixels_of_the_original(case, shared_goldens):
    image_aspect_ratio, tile_size = CASES[case]
    processor = image_processor(image_aspect_ratio, tile_size=tile_size)
    expected = load_file(shared_goldens / case / "expected.safetensors")
    samples = json.loads((shared_goldens / case / "expected.json").read_text())["samples"]
    for index, sample in enumerate(samples):
        pixel_values = process(processor, shared_goldens / "images" / sample["image"])
        middle = slice(tile_size // 2 - 8, tile_size // 2 + 8)
        exact = {"rtol": 0, "atol": 0}
        torch.testing.assert_close(pixel_values[..., :8, :8], expected[f"{index}.pixel_corner"], **exact)
        torch.testing.assert_close(pixel_values[..., middle, middle], expected[f"{index}.pixel_centre"], **exact)
        # a float32 sum of 100,000 terms depends on their order
        sums = pixel_values.sum(dim=(-2, -1))
        torch.testing.assert_close(sums, expected[f"{index}.pixel_sum"], rtol=1e-5, atol=0.1)


@pytest.mark.parametrize("case", ["v1.6-vicuna-anyres", "v1.6-mistral-anyres"])
def test_planned_tokens_are_those_of_the_reference(case, shared_goldens):
    processor = image_processor("anyres", tile_size=336)
    for sample in json.loads((shared_goldens / case / "expected.json").read_text())["samples"]:
        batch = processor(shared_goldens / "images" / sample["image"], return_tensors="pt")
        layout = plan_image(
            *batch["image_sizes"][0].tolist(),
            tile_size=processor.tile_size,
            patches_per_side=24,
            pinpoints=tuple(map(tuple, processor.image_grid_pinpoints)),
            patch_merge_type="spatial_unpad",
        )
        assert layout.num_tokens == sample["n_image_tokens"]
        assert layout.num_tiles == batch["pixel_values"].shape[1]


@pytest.mark.parametrize("size", [(7, 5), (300, 300), (640, 427), (97, 413), (1000, 37), (37, 1000)])
def test_padding_equals_resizing_a_padded_square(size, monkeypatch):
    """Also where the rows come in many bands."""
    image = Image.effect_noise(size, 90).convert("RGB")
    square = Image.new("RGB", (max(size), max(size)), (122, 116, 104))
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    expected = process(image_processor("square"), square)
    padding = image_processor("pad", limits=ImageLimits(max_aspect_ratio=30))
    torch.testing.assert_close(process(padding, image), expected, rtol=0, atol=0)
    monkeypatch.setattr("processing_llava.image_tiles.BAND_PIXELS", 3000)
    torch.testing.assert_close(process(padding, image), expected, rtol=0, atol=0)


def test_square_is_what_the_towers_own_processor_does():
    image = open_image()
    clip = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=56)
    ours = AnyLlavaImageProcessorPil(image_aspect_ratio="square", size={"shortest_edge": 64}, crop_size=56)
    torch.testing.assert_close(process(ours, image), process(clip, image), rtol=0, atol=0)

    siglip = SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=Image.Resampling.BICUBIC)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    ours = AnyLlavaImageProcessorPil(image_aspect_ratio="square", size=dict(siglip.size), do_center_crop=False, **half)
    assert ours.tile_size == 56
    torch.testing.assert_close(process(ours, image), process(siglip, image), rtol=0, atol=0)


def test_batch_of_mixed_sizes_is_padded_with_empty_tiles():
    names = ["page_384x191.png", "cat_451x300.png", "retina_97x413.png"]
    batch = image_processor("anyres")([open_image(name) for name in names], return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 5, 3, 56, 56)
    assert batch["image_sizes"].tolist() == [[191, 384], [300, 451], [413, 97]]
    for name, tiles in zip(names, batch["pixel_values"]):
        expected = EXPECTED_PIXELS[f"anyres.{name}"]
        torch.testing.assert_close(tiles[: len(expected)], expected, rtol=0, atol=0)
        assert not tiles[len(expected) :].any()


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "square"])
def test_one_tile_per_image_has_no_image_sizes(image_aspect_ratio):
    batch = image_processor(image_aspect_ratio)([open_image(), open_image()])
    assert list(batch) == ["pixel_values"]
    assert batch["pixel_values"].shape == (2, 3, 56, 56)
    assert batch["pixel_values"].dtype == np.float32


def test_nested_lists_and_every_kind_of_source_give_the_same_pixels():
    image = open_image()
    array = np.asarray(image)
    path = GOLDENS / "images" / "cat_451x300.png"
    sources = [
        image,
        path,
        path.read_bytes(),
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        array.astype(np.int64),
        array.astype(np.float32),
    ]
    processor = image_processor("pad")
    expected = process(processor, image).expand(len(sources), -1, -1, -1)
    torch.testing.assert_close(process(processor, sources), expected, rtol=0, atol=0)
    nested = [[source] for source in sources]
    torch.testing.assert_close(process(processor, processor.fetch_images(nested)), expected, rtol=0, atol=0)
    torch.testing.assert_close(process(processor, np.stack([array, array])), expected[:2], rtol=0, atol=0)


@pytest.mark.parametrize("processor_class", [AnyLlavaImageProcessorPil, AnyLlavaImageProcessor])
@pytest.mark.parametrize("image_aspect_ratio", ["pad", "square", "anyres"])
def test_no_more_images_are_held_at_full_size_than_are_worked_on(processor_class, image_aspect_ratio, monkeypatch):
    alive, most = [], []
    original = image_processing_llava.open_picture

    @contextmanager
    def open_picture(*args, **kwargs):
        with original(*args, **kwargs) as picture:
            alive.append(weakref.ref(picture.image))
            most.append(len({id(held) for reference in alive if (held := reference()) is not None}))
            yield picture

    monkeypatch.setattr(image_processing_llava, "open_picture", open_picture)
    processor = processor_class.from_dict(image_processor(image_aspect_ratio).to_dict())
    processor.num_threads = 1
    pictures = [encode(open_image().resize((200 + number, 150))) for number in range(6)]
    assert len(processor(pictures)["pixel_values"]) == 6
    assert max(most) == 1


@pytest.mark.parametrize("do_rescale", [True, False])
def test_floats_of_0_to_1_count_as_rescaled(do_rescale):
    """transformers would divide them by 255 twice unless told not to."""
    levels = np.asarray(open_image())
    floats = torch.from_numpy((levels + 0.5).clip(max=255) / 255).permute(2, 0, 1)
    expected = process(image_processor("pad"), levels)
    for image in (floats, floats.float()):
        pixel_values = process(image_processor("pad"), image, do_rescale=do_rescale)
        torch.testing.assert_close(pixel_values, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "array", [np.full((8, 8, 3), 300), np.full((8, 8, 3), -1.0), np.full((8, 8, 3), 1.5), np.zeros((8, 8, 3), bool)]
)
def test_arrays_of_an_unknown_range_are_refused(array):
    if array.dtype == bool:
        array[0] = True
    with pytest.raises(ValueError, match="expected levels of 0..255, or floats of 0..1"):
        image_processor("pad")(array)


def test_grey_and_transparent_images_become_rgb():
    processor = image_processor("square")
    grey = open_image("coins_gray_303x384.png").convert("L")
    expected = process(processor, grey.convert("RGB"))
    for image in (grey, np.asarray(grey)[None], np.asarray(grey)[..., None]):
        torch.testing.assert_close(process(processor, image), expected, rtol=0, atol=0)

    transparent = Image.new("RGBA", (60, 60), (9, 9, 9, 0))
    white = process(processor, Image.new("RGB", (60, 60), (255, 255, 255)))
    for image in (transparent, np.asarray(transparent)):
        torch.testing.assert_close(process(processor, image), white, rtol=0, atol=0)


def test_steps_can_be_left_out():
    image = open_image()
    levels = process(image_processor("square"), image, do_rescale=False, do_normalize=False)
    assert levels.max() > 200 and torch.equal(levels, levels.round())
    scaled = process(image_processor("square"), image, do_normalize=False)
    torch.testing.assert_close(scaled, levels / 255)
    with pytest.raises(ValueError, match="got an image of mode L; expected RGB"):
        process(image_processor("square"), image.convert("L"), do_convert_rgb=False)


def test_settings_of_one_call_leave_the_processor_as_it_is():
    processor = image_processor("pad")
    batch = processor(open_image(), image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS_56)
    assert batch["pixel_values"].shape == (1, 5, 3, 56, 56)
    assert processor(open_image())["pixel_values"].shape == (1, 3, 56, 56)
    with pytest.raises(ValueError, match="got no pinpoints"):
        processor(open_image(), image_aspect_ratio="anyres")


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="got no images; .* pass images=None"):
        image_processor("pad")([])


def test_images_above_the_limits_are_refused_and_the_limits_can_be_raised():
    thin = np.zeros((1000, 4, 3), dtype=np.uint8)
    processor = image_processor("square")
    for image in (thin, Image.fromarray(thin)):
        with pytest.raises(ValueError, match=r"ImageLimits\(max_aspect_ratio=\.\.\.\)"):
            processor(image)
    processor = image_processor("square", limits=ImageLimits(max_aspect_ratio=250))
    assert processor(thin)["pixel_values"].shape == (1, 3, 56, 56)
    assert "limits" not in processor.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "expected one of pad, square, anyres"),
        ({"image_aspect_ratio": "anyres"}, "got no pinpoints"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[336, 500]]}, r"got pinpoint \(336, 500\)"),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[448, 224]], "crop_size": 224},
            "got size 336 and crop_size 224",
        ),
        ({"size": {"height": 384, "width": 384}}, "do_center_crop=False for a tower that stretches"),
        ({"size": {"height": 384, "width": 300}, "do_center_crop": False}, "'width': 300"),
        ({"size": {"shortest_edge": 336, "longest_edge": 500}}, "longest_edge"),
        ({"do_center_crop": False}, "expected a crop"),
        ({"crop_size": {"height": 400, "width": 400}}, "no larger than the shortest edge"),
        ({"crop_size": {"height": 336, "width": 224}}, "expected a square"),
        ({"do_resize": False}, "got do_resize=False"),
        ({"image_mean": [0.5]}, "expected three numbers"),
    ],
)
def test_bad_configs_are_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        AnyLlavaImageProcessorPil(**fields)


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "square", "anyres"])
def test_save_and_load_round_trip(image_aspect_ratio, tmp_path):
    processor = image_processor(image_aspect_ratio, image_mean=[0.5, 0.25, 0.125])
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "AnyLlavaImageProcessor"
    loaded = AnyLlavaImageProcessorPil.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert AnyLlavaImageProcessorPil.from_dict(processor.to_dict()).to_dict() == processor.to_dict()
    torch.testing.assert_close(process(loaded, open_image()), process(processor, open_image()), rtol=0, atol=0)


def test_auto_image_processor_finds_it_by_its_stored_name(tmp_path, monkeypatch):
    class ThrowawayConfig(PreTrainedConfig):
        model_type = "throwaway"

    monkeypatch.setattr(IMAGE_PROCESSOR_MAPPING, "_extra_content", {})
    AutoImageProcessor.register(ThrowawayConfig, image_processor_classes={"pil": AnyLlavaImageProcessorPil})
    image_processor("anyres").save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is AnyLlavaImageProcessorPil
    assert loaded.image_grid_pinpoints == PINPOINTS_56


@pytest.mark.parametrize(
    "size",
    [{"shortest_edge": 56}, {"height": 56, "width": 56}, {"width": 56, "height": 56}, 56, (56, 56), [56, 56]],
    ids=str,
)
def test_size_in_every_form(size):
    processor = AnyLlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.size, processor.crop_size = size, 56
    assert processor.tile_size == 56
    picture = Image.new("RGB", (80, 60), "red")
    assert processor(picture, return_tensors="pt").pixel_values.shape == (1, 3, 56, 56)


@pytest.mark.parametrize(
    "size", [{"side": 56}, {}, "56", None, 0, -1, {"shortest_edge": "56"}, {"height": 5.5, "width": 5}]
)
def test_size_in_no_form(size):
    processor = AnyLlavaImageProcessorPil()
    with pytest.raises(ValueError):
        processor.size = size
    assert processor.tile_size == 336
