"""The forward pass: against transformers' own classes, against a plain restatement, and against itself."""

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.configuration_llava import AnyLlavaConfig
from processing_llava.anyres_layout import plan_image
from tests.tiny import (
    IMAGE_TOKEN_ID,
    PATCH_SIZE,
    PINPOINTS,
    TEXT_CONFIGS,
    TILE_SIZE,
    VISION_CONFIGS,
    batch,
    random_images,
    text_ids,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.core

PATCHES = (TILE_SIZE // PATCH_SIZE) ** 2
IMAGE = [IMAGE_TOKEN_ID] * PATCHES


def copy_to_transformers(model: AnyLlavaForConditionalGeneration, peer: torch.nn.Module) -> None:
    """Give transformers' class our weights; what remains is the layer and the norm that it never uses."""
    state = {
        name.replace("mm_projector.0", "multi_modal_projector.linear_1").replace(
            "mm_projector.2", "multi_modal_projector.linear_2"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(".layers.3." in name or "post_layernorm" in name for name in missing)


def test_logits_equal_transformers_llava():
    model = tiny_model()
    config = LlavaConfig(
        vision_config=VISION_CONFIGS["clip"](), text_config=TEXT_CONFIGS["llama"](), image_token_index=5
    )
    peer = LlavaForConditionalGeneration(config).eval()
    copy_to_transformers(model, peer)
    pixel_values = random_images(2)
    rows = [[1, *IMAGE, *text_ids(5)], [1, *text_ids(3, seed=1), *IMAGE, *text_ids(9, seed=2)]]
    inputs = batch(rows, padding_side="left")
    inputs["input_ids"][inputs["input_ids"] == 5] = 6
    ours = model(**inputs, pixel_values=pixel_values)
    inputs["input_ids"][inputs["input_ids"] == IMAGE_TOKEN_ID] = 5
    theirs = peer(**inputs, pixel_values=pixel_values)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)


def test_logits_equal_transformers_llava_next():
    settings = {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    model = tiny_model(**settings)
    config = LlavaNextConfig(
        vision_config=VISION_CONFIGS["clip"](),
        text_config=TEXT_CONFIGS["llama"](),
        image_token_index=5,
        image_grid_pinpoints=PINPOINTS,
    )
    peer = LlavaNextForConditionalGeneration(config).eval()
    copy_to_transformers(model, peer)
    image_sizes = torch.tensor([[40, 60], [90, 30]])
    pixel_values = random_images(2, num_tiles=5)
    lengths = [layout.num_tokens for layout in model.model.plan_images(pixel_values, image_sizes)]
    rows = [[1, *[IMAGE_TOKEN_ID] * length, 7, 8] for length in lengths]
    inputs = batch(rows, padding_side="left")
    ours = model(**inputs, pixel_values=pixel_values, image_sizes=image_sizes)
    inputs["input_ids"][inputs["input_ids"] == IMAGE_TOKEN_ID] = 5
    theirs = peer(**inputs, pixel_values=pixel_values, image_sizes=image_sizes)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vision", VISION_CONFIGS)
@pytest.mark.parametrize("layer", [-1, -2, 1, [1, -2]])
def test_pruned_tower_gives_the_hidden_states_of_the_full_one(vision, layer):
    from transformers import AutoModel

    model = tiny_model(vision=vision, vision_feature_layer=layer, vision_feature_select_strategy="cls_patch")
    full = AutoModel.from_config(VISION_CONFIGS[vision]()).eval()
    missing, unexpected = full.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert not unexpected
    pixel_values = random_images(2)
    hidden_states = full(pixel_values, output_hidden_states=True).hidden_states
    layers = layer if isinstance(layer, list) else [layer]
    expected = torch.cat([hidden_states[index] for index in layers], dim=-1)
    model.model.mm_projector = torch.nn.Identity()
    features = model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(torch.stack(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vision, prefix", [("clip", 1), ("siglip", 0), ("dinov2", 1), ("dinov2_with_registers", 4)])
def test_patch_strategy_drops_exactly_the_prefix_tokens(vision, prefix):
    pixel_values = random_images(1)
    kept = tiny_model(vision=vision).get_image_features(pixel_values).pooler_output[0]
    model = tiny_model(vision=vision, vision_feature_select_strategy="cls_patch")
    full = model.get_image_features(pixel_values).pooler_output[0]
    assert len(full) == PATCHES + prefix
    torch.testing.assert_close(full[prefix:], kept)


def merge_by_loops(tiles, layout, newline):
    """The published splice order, feature by feature: overview, then each kept row with its newline."""
    side = TILE_SIZE // PATCH_SIZE
    merged = list(tiles[0])
    for row in range(layout.top, layout.bottom):
        for column in range(layout.left, layout.right):
            tile = 1 + (row // side) * layout.grid_columns + column // side
            merged.append(tiles[tile][(row % side) * side + column % side])
        if newline is not None:
            merged.append(newline)
    return torch.stack(merged)


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (28, 28), (90, 20), (20, 90), (200, 3), (3, 200)])
def test_tiles_are_merged_in_reading_order(merge, size):
    model = tiny_model(patch_merge_type=merge, image_grid_pinpoints=PINPOINTS)
    pixel_values = random_images(1, num_tiles=5)
    (layout,) = model.model.plan_images(pixel_values, torch.tensor([size]))
    features = model.get_image_features(pixel_values, torch.tensor([size])).pooler_output[0]
    tiles = model.model.encode_tiles(pixel_values[0, : layout.num_tiles]).pooler_output
    expected = tiles.flatten(0, 1) if merge == "flat" else merge_by_loops(tiles, layout, model.model.image_newline)
    assert len(features) == layout.num_tokens
    torch.testing.assert_close(features, expected)


def test_gemma_scale_flag_multiplies_the_features():
    pixel_values = random_images(1)
    plain = tiny_model("gemma").get_image_features(pixel_values).pooler_output[0]
    scaled = tiny_model("gemma", scale_image_features=True).get_image_features(pixel_values).pooler_output[0]
    torch.testing.assert_close(scaled, plain * 32**0.5)


@pytest.mark.parametrize("text", TEXT_CONFIGS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rows_in_a_batch_equal_rows_alone(text, padding_side):
    model = tiny_model(text)
    images = random_images(3)
    rows = [
        ([1, *text_ids(12)], 0),
        ([1, *IMAGE, *text_ids(5, seed=1)], 1),
        ([1, 9, *IMAGE, 10, *IMAGE, *text_ids(3, seed=2)], 2),
    ]
    together = model(**batch([ids for ids, _ in rows], padding_side=padding_side), pixel_values=images).logits
    start = 0
    for index, (ids, num_images) in enumerate(rows):
        pixel_values = images[start : start + num_images] if num_images else None
        alone = model(torch.tensor([ids]), pixel_values=pixel_values).logits[0]
        row = together[index, -len(ids) :] if padding_side == "left" else together[index, : len(ids)]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
        start += num_images


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_cached_decoding_equals_the_full_forward(text):
    model = tiny_model(text)
    pixel_values = random_images(1)
    ids = torch.tensor([[1, *IMAGE, *text_ids(8)]])
    full = model(ids, pixel_values=pixel_values).logits
    prefix = model(ids[:, :-3], pixel_values=pixel_values, use_cache=True)
    cache = prefix.past_key_values
    for position in range(ids.shape[1] - 3, ids.shape[1]):
        step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(step.logits[:, -1], full[:, position], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and transformers, in flex attention
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()  # flex attention has no backward pass on CPUs
def test_attention_implementations_agree(attention):
    model = tiny_model()
    inputs = batch([[1, *IMAGE, 5, 6], [1, *IMAGE, 7]])
    expected = model(**inputs, pixel_values=random_images(2)).logits
    model.set_attn_implementation(attention)
    assert model.model.vision_tower.config._attn_implementation == attention
    assert model.model.language_model.config._attn_implementation == attention
    logits = model(**inputs, pixel_values=random_images(2)).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)


def test_encoded_images_replace_pixel_values():
    model = tiny_model()
    pixel_values = random_images(1)
    ids = torch.tensor([[1, *IMAGE, 5]])
    encoded = model.get_image_features(pixel_values)
    expected = model(ids, pixel_values=pixel_values).logits
    torch.testing.assert_close(model(ids, mm_encoder_outputs={"image": encoded}).logits, expected)
    with pytest.raises(ValueError, match="at most one"):
        model(ids, pixel_values=pixel_values, mm_encoder_outputs={"image": encoded})


def test_loss_is_the_mean_over_supervised_positions():
    model = tiny_model()
    ids = torch.tensor([[1, *IMAGE, *text_ids(6)]])
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = ids[0, -3:]
    output = model(ids, pixel_values=random_images(1), labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, -4:-1], ids[0, -3:])
    torch.testing.assert_close(output.loss, expected)


def test_labels_at_image_tokens_are_ignored():
    model = tiny_model()
    ids = torch.tensor([[1, *IMAGE, *text_ids(6)]])
    pixel_values = random_images(1)
    expected = model(ids, pixel_values=pixel_values, labels=ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)).loss
    torch.testing.assert_close(model(ids, pixel_values=pixel_values, labels=ids).loss, expected)


def test_logits_to_keep():
    model = tiny_model()
    ids = torch.tensor([[1, *IMAGE, *text_ids(6)]])
    full = model(ids, pixel_values=random_images(1)).logits
    last = model(ids, pixel_values=random_images(1), logits_to_keep=2).logits
    torch.testing.assert_close(last, full[:, -2:])


@pytest.mark.parametrize("vision", VISION_CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(vision, checkpointing):
    model = tiny_model(
        vision=vision,
        patch_merge_type="spatial_unpad",
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="patch",
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sizes = torch.tensor([[40, 60]])
    pixel_values = random_images(1, num_tiles=5)
    (layout,) = model.model.plan_images(pixel_values, sizes)
    ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * layout.num_tokens, *text_ids(6)]])
    labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)
    model(ids, pixel_values=pixel_values, image_sizes=sizes, labels=labels, use_cache=False).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("with_image", [True, False])
def test_compiles_to_one_graph(with_image):
    model = tiny_model()
    ids = torch.tensor([[1, *(IMAGE if with_image else []), 5, 6]])
    pixel_values = random_images(1) if with_image else None
    expected = model(ids, pixel_values=pixel_values).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, pixel_values=pixel_values).logits, expected)


def test_image_tokens_without_images_are_refused():
    model = tiny_model()
    ids = torch.tensor([[1, *IMAGE, 5]])
    with pytest.raises(ValueError, match="got 16 image tokens in row 0 and no image features.*pass pixel_values"):
        model(ids)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([10, 22], "got 10 image tokens in row 0 and images with 16 features"),
        ([16, 15], "got 15 image tokens in row 1 and images with 16 features"),
        ([32, 16], "got 16 image tokens in row 1 and images with 0 features"),
        ([16, 0], "1 images have no place in the text"),
    ],
)
def test_rows_and_images_must_agree(tokens, message):
    model = tiny_model()
    inputs = batch([[1, *[IMAGE_TOKEN_ID] * count, 5] for count in tokens])
    with pytest.raises(ValueError, match=message):
        model(**inputs, pixel_values=random_images(2))
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, pixel_values=random_images(2), max_new_tokens=2)


def test_rows_and_encoded_images_must_agree():
    """One total is not enough: a row would get features of another row's image."""
    model = tiny_model(patch_merge_type="spatial_unpad", image_grid_pinpoints=PINPOINTS)
    sizes = torch.tensor([[40, 60], [60, 30]])
    encoded = model.get_image_features(random_images(2, num_tiles=5), sizes, return_dict=True)
    small, large = sorted(len(features_ND) for features_ND in encoded.pooler_output)
    assert small < large
    counts = [len(features_ND) for features_ND in encoded.pooler_output]
    rows = batch([[1, *[IMAGE_TOKEN_ID] * count, 5] for count in counts])
    model(**rows, mm_encoder_outputs={"image": encoded})
    swapped = batch([[1, *[IMAGE_TOKEN_ID] * count, 5] for count in reversed(counts)])
    with pytest.raises(ValueError, match=f"got {counts[1]} image tokens in row 0 and images with"):
        model(**swapped, mm_encoder_outputs={"image": encoded})


def test_features_are_spliced_without_copying_the_embeddings():
    model = tiny_model()
    ids = torch.tensor([[1, *IMAGE, 5, 6]])
    embedded, read = [], []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    pixel_values = random_images(1)
    expected = model(ids, pixel_values=pixel_values).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids, pixel_values=pixel_values).logits, expected)
    assert read[1].data_ptr() == embedded[1].data_ptr()
    assert read[0].data_ptr() != embedded[0].data_ptr()


def test_a_frozen_tower_has_no_gradient_but_its_pictures_may():
    model = tiny_model()
    model.model.vision_tower.requires_grad_(False)
    model.enable_input_require_grads()
    pixel_values = random_images(1)
    assert not model.model.run_tower(pixel_values).last_hidden_state.requires_grad
    pixel_values.requires_grad_()
    model.model.run_tower(pixel_values).last_hidden_state.sum().backward()
    assert pixel_values.grad.abs().sum() > 0


def test_tiled_images_need_their_sizes():
    model = tiny_model(patch_merge_type="spatial_unpad", image_grid_pinpoints=PINPOINTS)
    with pytest.raises(ValueError, match="no image_sizes"):
        model.get_image_features(random_images(1, num_tiles=5))
    with pytest.raises(ValueError, match="image_grid_pinpoints is None"):
        tiny_model().get_image_features(random_images(1, num_tiles=5))


def test_embeddings_with_images_need_an_embedded_image_token():
    model = tiny_model(image_token_id=5)
    ids = torch.tensor([[1, *[5] * PATCHES, 7]])
    embeds = model.get_input_embeddings()(ids)
    pixel_values = random_images(1)
    expected = model(ids, pixel_values=pixel_values).logits
    torch.testing.assert_close(model(inputs_embeds=embeds, pixel_values=pixel_values).logits, expected)
    with pytest.raises(ValueError, match="has no embedding"):
        tiny_model()(inputs_embeds=embeds, pixel_values=pixel_values)


def test_an_identity_projector_gives_the_features_of_the_tower(tmp_path):
    vision = VISION_CONFIGS["clip"]()
    vision.hidden_size = 32
    config = AnyLlavaConfig(vision, TEXT_CONFIGS["llama"](), image_token_id=IMAGE_TOKEN_ID, projector_type="identity")
    model = AnyLlavaForConditionalGeneration(config).eval()
    pixel_values = random_images(1)
    features = model.model.select_features(model.model.run_tower(pixel_values))
    assert torch.equal(model.get_image_features(pixel_values, return_dict=True).pooler_output[0], features[0])
    model.save_pretrained(tmp_path)
    loaded = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[1, *IMAGE, 5]]), "pixel_values": pixel_values}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
def test_save_and_load_are_bit_exact(tmp_path, merge):
    model = tiny_model("phi", patch_merge_type=merge, image_grid_pinpoints=PINPOINTS)
    model.save_pretrained(tmp_path)
    loaded, info = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, ours), (other_name, theirs) in zip(model.named_parameters(), loaded.named_parameters()):
        assert name == other_name
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"projector_type": "mlp0x_gelu"}, "projector_type='mlp0x_gelu'"),
        ({"projector_type": "identity"}, "size 24 and a text model of size 32"),
        ({"vision_feature_layer": 5}, "the tower has 4 layers"),
        ({"vision_feature_layer": []}, "expected one or several indices"),
        ({"vision_feature_select_strategy": "default"}, "expected one of patch, cls_patch"),
        ({"patch_merge_type": "unpad"}, "expected one of flat, spatial, spatial_unpad"),
        (
            {
                "patch_merge_type": "spatial",
                "image_grid_pinpoints": PINPOINTS,
                "vision_feature_select_strategy": "cls_patch",
            },
            "no place in a grid",
        ),
    ],
)
def test_configurations_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


def test_layouts_of_model_and_processor_are_the_same_function():
    model = tiny_model(patch_merge_type="spatial_unpad", image_grid_pinpoints=PINPOINTS)
    (layout,) = model.model.plan_images(random_images(1, num_tiles=5), [[40, 60]])
    assert layout == plan_image(
        40,
        60,
        tile_size=TILE_SIZE,
        patches_per_side=TILE_SIZE // PATCH_SIZE,
        pinpoints=tuple(map(tuple, PINPOINTS)),
        patch_merge_type="spatial_unpad",
    )


def test_language_models_that_change_their_logits_are_refused():
    with pytest.raises(ValueError, match="got a language model with final_logit_softcapping=30.0"):
        AnyLlavaConfig(text_config={"model_type": "gemma2"})


def test_a_configuration_is_checked_when_a_model_is_made_of_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got visual_tokens=0"):
        AnyLlavaForConditionalGeneration.from_pretrained(tmp_path, visual_tokens=0)


def test_one_layer_in_a_list_is_that_layer():
    """The original code has one index only, and would look a list up."""
    assert tiny_config(vision_feature_layer=[-2]).vision_feature_layer == -2
    assert tiny_config(vision_feature_layer=(1, -2)).vision_feature_layer == [1, -2]
