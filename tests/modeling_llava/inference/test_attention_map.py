"""Attention of an answer: the weights of a full eager forward, and where on the picture they are laid."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_llava.inference.attention_map import AnswerAttention, lay_on_picture, overlay, read_attention
from modeling_llava.inference.loading import load_for_inference
from modeling_llava.visual_tokens import choose_features
from processing_llava import AnyLlavaImageProcessorPil
from tests.conftest import ROOT
from tests.tiny import PATCH_SIZE, PINPOINTS, TILE_SIZE, tiny_model, tiny_processor

SIDE = TILE_SIZE // PATCH_SIZE
EXAMPLES = ROOT / "spaces_demo" / "examples"


def talk(*pictures: Image.Image, answer: str = "It is a red circle.") -> list[dict]:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [
        {"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def build_pair(text: str = "llama", *, aspect: str = "pad", merge: str = "flat", **overrides):
    """A tiny model and the processor that belongs to it."""
    pinpoints = PINPOINTS if aspect == "anyres" else None
    processor = tiny_processor(image_aspect_ratio=aspect, image_grid_pinpoints=pinpoints, patch_merge_type=merge)
    model = tiny_model(
        text,
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=pinpoints,
        patch_merge_type=merge,
        **overrides,
    )
    return model, processor


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen3", "gemma", "phi", "mpt"])
def test_the_weights_are_those_of_a_full_eager_forward(text):
    model, processor = build_pair(text)
    before = model.model.language_model.config._attn_implementation
    pictures = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 50), "blue")]
    messages = talk(*pictures, answer="red " * 45)
    attention = read_attention(model, processor, messages)
    assert model.model.language_model.config._attn_implementation == before

    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    model.model.language_model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True)
    weights = torch.stack(outputs.attentions)[:, 0].mean(1)  # [S, L, L]
    is_image = inputs["input_ids"][0] == processor.image_token_id
    words = processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    length = inputs["input_ids"].shape[1]
    assert attention.words == ["red"] * 45
    assert [picture.shape for picture in attention.weights] == [(2, 45, SIDE**2)] * 2
    # The answer ends with " </s>": the last word is written by the positions before its tokens.
    last = slice(length - 2 - len(words) - 1, length - 2 - 1)
    expected = weights[:, last, is_image].mean(1).split(SIDE**2, dim=-1)
    for picture, expected_picture in zip(attention.weights, expected):
        torch.testing.assert_close(picture[:, -1], expected_picture, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aspect, merge", [("pad", "flat"), ("anyres", "spatial_unpad")])
def test_features_that_were_left_out_have_no_weight(aspect, merge):
    model, processor = build_pair(aspect=aspect, merge=merge, visual_tokens=7)
    processor.visual_tokens = 7
    pictures = [Image.open(path) for path in sorted(EXAMPLES.glob("*.png"))[:2]]
    messages = talk(*pictures, answer="red " * 2)
    attention = read_attention(model, processor, messages)

    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    model.model.language_model.set_attn_implementation("eager")
    weights = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0].mean(1)  # [S, L, L]
    num_tokens = len(processor.tokenizer("red", add_special_tokens=False)["input_ids"])
    end = inputs["input_ids"].shape[1] - 2  # of the words of the answer, before " </s>"
    is_image = inputs["input_ids"][0] == processor.image_token_id
    expected = weights[:, end - num_tokens - 1 : end - 1, is_image].mean(1).split(7, dim=-1)
    features = model.model.encode_images(inputs["pixel_values"], inputs.get("image_sizes")).pooler_output
    for picture, features_ND, weights_SWN, expected_SK in zip(pictures, features, attention.weights, expected):
        (kept,) = choose_features([features_ND], 7)
        assert weights_SWN.shape[-1] == len(features_ND)
        assert weights_SWN[0, -1].count_nonzero() == 7
        torch.testing.assert_close(weights_SWN[:, -1, kept], expected_SK, atol=1e-5, rtol=1e-4)
        density = lay_on_picture(weights_SWN[0, -1], picture, model.config, processor)
        assert density.shape == picture.size[::-1] and density.sum() > 0


def test_selecting_layers_takes_their_mean():
    attention = AnswerAttention(["a"], [torch.tensor([[[0.0, 1.0]], [[4.0, 3.0]]])])
    torch.testing.assert_close(attention.select(0)[0], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(attention.select(0, slice(1, 2))[0], torch.tensor([4.0, 3.0]))


CASES = {
    "padded": ({"aspect": "pad"}, None),
    "cropped": ({"aspect": "square"}, None),
    "stretched": ({"aspect": "square"}, {"size": {"height": TILE_SIZE, "width": TILE_SIZE}, "do_center_crop": False}),
    "padded and cropped": ({"aspect": "pad"}, {"size": {"shortest_edge": 40}}),
    "tiles, flat": ({"aspect": "anyres", "merge": "flat"}, None),
    "tiles, spatial": ({"aspect": "anyres", "merge": "spatial"}, None),
    "tiles, without padding": ({"aspect": "anyres", "merge": "spatial_unpad"}, None),
    "class token": ({"aspect": "anyres", "merge": "flat", "vision_feature_select_strategy": "cls_patch"}, None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(60, 60), (120, 70), (50, 130)])
@pytest.mark.parametrize("corner", [(0.3, 0.4), (0.6, 0.35)])
def test_what_a_token_shows_is_where_its_weight_is_laid(case, size, corner):
    settings, image_settings = CASES[case]
    model, processor = build_pair(**settings)
    patch_size = model.config.vision_config.patch_size = 2
    side = model.config.patches_per_side
    fields = processor.image_processor.to_dict() | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    processor.image_processor = AnyLlavaImageProcessorPil(**fields | (image_settings or {}))

    # A white spot on black: each token weighs as much as it shows of the spot.
    left, top = round(corner[0] * size[0]), round(corner[1] * size[1])
    picture = Image.new("RGB", size)
    picture.paste("white", (left, top, left + 12, top + 12))
    inputs = processor.image_processor([picture], return_tensors="pt")
    layout = model.model.plan_images(inputs["pixel_values"], inputs.get("image_sizes"))[0]
    tiles = inputs["pixel_values"].reshape(-1, 3, TILE_SIZE, TILE_SIZE)[: layout.num_tiles].mean(1)
    patches = tiles.unflatten(2, (side, patch_size)).unflatten(1, (side, patch_size)).mean((2, 4)).flatten(1)
    # Class token and newlines show nothing; their weight must not appear anywhere.
    prefix = torch.full((len(patches), model.config.num_prefix_tokens), 7.0)
    features = torch.cat([prefix, patches], dim=1)[..., None].expand(-1, -1, model.config.text_config.hidden_size)
    if model.model.image_newline is not None:
        model.model.image_newline.data.fill_(7.0)
    weights = model.model.merge_tiles(features, layout)[:, 0].detach()

    density = lay_on_picture(weights, picture, model.config, processor)
    assert density.shape == size[::-1]
    rows, columns = np.indices(density.shape)
    assert (columns * density).sum() / density.sum() == pytest.approx(left + 5.5, abs=1)
    assert (rows * density).sum() / density.sum() == pytest.approx(top + 5.5, abs=1)


def test_weight_on_padding_is_lost_and_the_rest_is_kept():
    model, processor = build_pair()
    picture = Image.new("RGB", (80, 40))  # half of the square is padding
    grid = torch.zeros(SIDE, SIDE)
    grid[0] = 1
    assert lay_on_picture(grid.flatten(), picture, model.config, processor).sum() == 0
    even = lay_on_picture(torch.ones(SIDE**2), picture, model.config, processor)
    assert even.sum() == pytest.approx(SIDE**2 / 2, rel=0.01)
    assert even.min() == pytest.approx(even.max())


def test_weights_of_another_layout_are_refused():
    model, processor = build_pair()
    with pytest.raises(ValueError, match="got 3 weights for a picture of 16 tokens"):
        lay_on_picture(torch.ones(3), Image.new("RGB", (9, 9)), model.config, processor)


def test_overlay_glows_where_the_density_is():
    picture = Image.new("RGB", (20, 10), (0, 120, 240))
    density = np.zeros((10, 20), dtype=np.float32)
    density[:, 10:] = 0.25
    shown = np.asarray(overlay(picture, density), dtype=int)
    assert len(set(shown[0, 0])) == 1, "grey where there is none"
    assert shown[0, 15, 0] > 150
    weaker = np.asarray(overlay(picture, density, highest=1.0), dtype=int)
    assert shown[0, 0, 0] < weaker[0, 15, 0] < shown[0, 15, 0]


@pytest.fixture(scope="module")
def embedded():
    return load_for_inference()


@pytest.mark.parametrize("quadrant", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("name", ["penguin", "strawberry", "guitar"])
def test_the_embedded_model_looks_at_the_thing_it_names(embedded, name, quadrant):
    example = Image.open(EXAMPLES / f"twemoji-{name}.png").convert("RGB")
    picture = Image.new("RGB", (224, 224), example.getpixel((2, 2)))
    x, y = (112 * place for place in quadrant)
    picture.paste(example.resize((112, 112)), (x, y))
    attention = read_attention(*embedded, talk(picture, answer=f"a {name}"))
    assert attention.words == ["a", name]
    density = lay_on_picture(attention.select(1)[0], picture, embedded[0].config, embedded[1])
    assert density[y : y + 112, x : x + 112].sum() > 0.5 * density.sum()


def test_an_answer_without_pictures_has_words_and_no_maps(embedded):
    attention = read_attention(*embedded, talk(answer="Nothing to see."))
    assert attention.words == ["Nothing", "to", "see."]
    assert attention.weights == []


def test_what_cannot_be_read_is_an_error():
    model, processor = build_pair()
    with pytest.raises(ValueError, match="expected the assistant's turn last"):
        read_attention(model, processor, talk()[:1])
    with pytest.raises(ValueError, match="without words"):
        read_attention(model, processor, talk(answer=" "))
    with pytest.raises(ValueError, match="AnyLlavaForConditionalGeneration with AnyLlavaProcessor"):
        read_attention(model, processor.tokenizer, talk())
    processor.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match="marks no answers"):
        read_attention(model, processor, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
