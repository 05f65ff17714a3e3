"""visual_tokens: the published choice, the tokens it leaves, and that model, processor and caches agree on them."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava import AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from modeling_llava.checkpoints.layouts import write_transformers_config
from modeling_llava.export.model_repository import build_transformers_processor
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.training.feature_cache import FeatureCache
from modeling_llava.visual_tokens import choose_diverse, choose_features
from processing_llava import AnyLlavaProcessor
from processing_llava.data.collator import LlavaDataCollator
from tests import original_folders as folders
from tests.tiny import (
    IMAGE_TOKEN_ID,
    PATCH_SIZE,
    PINPOINTS,
    TILE_SIZE,
    batch,
    random_images,
    save_tiny_checkpoint,
    text_ids,
    tiny_model,
    tiny_processor,
)

PATCHES = (TILE_SIZE // PATCH_SIZE) ** 2
KEPT = 5
TILED = {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}


def random_features(num_features: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_features, 6, generator=torch.Generator().manual_seed(seed))


def choose_by_brute_force(features_ND: torch.Tensor, num_kept: int) -> list[int]:
    """Max-min cosine distance, in float64 and loops."""
    units = torch.nn.functional.normalize(features_ND.double(), dim=-1)
    distances = (2 - units @ units.T - (units @ units.T).T).tolist()
    places = range(len(features_ND))
    kept = [max(places, key=lambda place: min(distances[place][other] for other in places if other != place))]
    while len(kept) < num_kept:
        others = [place for place in places if place not in kept]
        kept.append(max(others, key=lambda place: min(distances[place][other] for other in kept)))
    return sorted(kept)


def build_pair(visual_tokens: int | None = KEPT, *, tiled: bool = False, **overrides):
    """A tiny model and its processor."""
    tiles = TILED if tiled else {}
    processor = tiny_processor(image_aspect_ratio="anyres" if tiled else "pad", visual_tokens=visual_tokens, **tiles)
    image_token_id = processor.image_token_id
    model = tiny_model(image_token_id=image_token_id, visual_tokens=visual_tokens, **tiles, **overrides)
    return model, processor


def make_picture(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    levels = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(levels.numpy()).resize(size)


def ask(text: str, *pictures: Image.Image) -> dict:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def encode(processor: AnyLlavaProcessor, *messages: dict):
    return processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("num_kept", [1, 2, 7, 16])
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_equals_brute_force(seed, num_kept):
    features = random_features(17, seed=seed)
    (kept,) = choose_features([features], num_kept)
    assert kept.tolist() == choose_by_brute_force(features, num_kept)


@pytest.mark.parametrize("num_kept, expected", [(1, [3]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_the_first_of_equals_is_taken_and_copies_come_last(num_kept, expected):
    features = torch.eye(3)[[0, 0, 1, 2, 1]]
    assert choose_features([features], num_kept)[0].tolist() == expected


def test_length_plays_no_part_and_a_feature_of_zeros_is_like_no_other():
    features = random_features(9)
    assert torch.equal(choose_diverse(features[None], 4), choose_diverse((features * torch.rand(9, 1))[None], 4))
    features[6] = 0
    assert 6 in choose_diverse(features[None], 4)[0]


def test_an_image_gets_the_same_features_in_any_company():
    images = [random_features(length, seed=length + row) for row, length in enumerate([20, 12, 20, 4, 12, 20])]
    together = choose_features(images, 6)
    assert [len(kept) for kept in together] == [6, 6, 6, 4, 6, 6]
    for image, kept in zip(images, together):
        assert torch.equal(choose_features([image], 6)[0], kept)


def test_without_a_limit_all_are_kept():
    assert [kept.tolist() for kept in choose_features([random_features(3)], None)] == [[0, 1, 2]]


def test_mixed_precision_chooses_as_full_precision():
    features = random_features(400)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(choose_diverse(features, 40), torch.tensor([choose_by_brute_force(features[0], 40)]))


def test_the_choice_compiles_to_one_graph():
    compiled = torch.compile(choose_diverse, fullgraph=True, backend="eager")
    features = random_features(12)[None]
    assert torch.equal(compiled(features, 4), choose_diverse(features, 4))


@pytest.mark.parametrize("visual_tokens", [None, PATCHES, 1000])
def test_as_many_as_there_are_changes_no_bit(visual_tokens):
    inputs = batch([[1, *[IMAGE_TOKEN_ID] * PATCHES, *text_ids(4)]])
    pixel_values = random_images(1)
    expected = tiny_model()(**inputs, pixel_values=pixel_values).logits
    model = tiny_model(visual_tokens=visual_tokens)
    assert torch.equal(model(**inputs, pixel_values=pixel_values).logits, expected)


def test_features_are_those_of_the_whole_image_in_reading_order():
    pixel_values = random_images(3)
    images = tiny_model().get_image_features(pixel_values).pooler_output
    fewer = tiny_model(visual_tokens=KEPT).get_image_features(pixel_values).pooler_output
    for features, kept in zip(images, fewer):
        assert torch.equal(kept, features[choose_by_brute_force(features.detach(), KEPT)])


def test_tiles_are_merged_before_features_are_chosen():
    sizes = torch.tensor([[28, 28], [40, 60]])
    pixel_values = random_images(2, num_tiles=5)
    images = tiny_model(**TILED).get_image_features(pixel_values, sizes).pooler_output
    model = tiny_model(**TILED, visual_tokens=40)
    small, large = model.get_image_features(pixel_values, sizes).pooler_output
    assert torch.equal(small, images[0]) and len(small) == PATCHES + 4 * 5
    assert torch.equal(large, images[1][choose_features([images[1]], 40)[0]])
    assert [layout.num_tokens for layout in model.model.plan_images(pixel_values, sizes)] == [len(small), len(large)]


def test_of_equal_newlines_one_is_kept():
    model = tiny_model(**TILED, visual_tokens=60)
    sizes = torch.tensor([[40, 60]])
    pixel_values = random_images(1, num_tiles=5)
    (kept,) = model.get_image_features(pixel_values, sizes).pooler_output
    assert len(kept) == 60
    assert (kept == model.model.image_newline).all(-1).sum() == 1


def test_logits_are_those_of_the_kept_features():
    rows = batch([[1, *[IMAGE_TOKEN_ID] * KEPT, *text_ids(4)], [1, *text_ids(3), *[IMAGE_TOKEN_ID] * KEPT, 9]])
    pixel_values = random_images(2)
    full = tiny_model()
    images = full.get_image_features(pixel_values).pooler_output
    kept = [features[choose_by_brute_force(features.detach(), KEPT)] for features in images]
    expected = full(**rows, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=kept)}).logits
    assert torch.equal(tiny_model(visual_tokens=KEPT)(**rows, pixel_values=pixel_values).logits, expected)


@pytest.mark.parametrize("tiled", [False, True])
def test_processor_and_model_agree(tiled):
    model, processor = build_pair(40 if tiled else KEPT, tiled=tiled)
    pictures = [make_picture(size=(28, 28)), make_picture(1), make_picture(2, size=(30, 90))]
    inputs = processor(
        images=[[picture] for picture in pictures], text=["<image> a", "<image>", "b <image>"], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    counts = (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert counts == ([36, 40, 40] if tiled else [KEPT] * 3)
    sizes = [picture.size[::-1] for picture in pictures]
    assert processor._get_num_multimodal_tokens(sizes)["num_image_tokens"] == counts
    assert model(**inputs).image_hidden_states.shape[0] == sum(counts)


@pytest.mark.parametrize("tiled", [False, True])
def test_cached_decoding_equals_a_full_forward_and_the_cache_is_shorter(tiled):
    model, processor = build_pair(tiled=tiled)
    question = ask("What is this?", make_picture())
    inputs = encode(processor, question)
    cache = DynamicCache()
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    logits = model(input_ids=ids, **images).logits
    length = inputs["input_ids"].shape[1]
    assert torch.equal(logits[0, length - 1 : -1].argmax(-1), ids[0, length:])
    # The last token of an answer is never an input.
    assert cache.get_seq_length() == ids.shape[1] - 1
    processor.visual_tokens = None
    full_ids = encode(processor, question)["input_ids"]
    num_features = int((full_ids == processor.image_token_id).sum())
    assert full_ids.shape[1] - length == num_features - KEPT > 0


@pytest.mark.parametrize("tiled", [False, True])
def test_a_chat_answers_as_generate_does_and_reuses_its_cache(tiled):
    model, processor = build_pair(tiled=tiled)
    session = ChatSession(model, processor)
    for turn, pictures in enumerate([[make_picture()], [], [make_picture(1)]]):
        inputs = encode(processor, *session.messages, ask(f"What {turn}?", *pictures))
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip()
        assert "".join(session.ask(f"What {turn}?", images=pictures, max_new_tokens=6)) == expected
        assert session.statistics.num_image_tokens == KEPT * (1 + (turn == 2))
        assert (session.statistics.num_reused_tokens > 0) == (turn > 0)


def test_a_chat_whose_limit_changes_forgets_the_cache_of_its_pictures():
    model, processor = build_pair(KEPT)
    session = ChatSession(model, processor)
    question = ask("What?", make_picture())
    for visual_tokens in (KEPT, 9, None, KEPT):
        model.config.visual_tokens = processor.visual_tokens = visual_tokens
        inputs = encode(processor, question)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip()
        assert "".join(session.answer([question], max_new_tokens=6)) == expected


@pytest.mark.parametrize("of_model, of_processor", [(None, KEPT), (KEPT, None), (KEPT, 7)])
def test_a_model_and_a_processor_that_disagree_are_told_of_it(of_model, of_processor):
    model, processor = build_pair(of_model)
    session = ChatSession(model, processor)
    processor.visual_tokens = of_processor
    inputs = encode(processor, ask("What is this?", make_picture()))
    num_tokens, num_features = of_processor or PATCHES, of_model or PATCHES
    message = (
        f"got {num_tokens} image tokens in row 0 and images with {num_features} features.*"
        f"load the processor with visual_tokens={of_model}, as this model"
    )
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(ValueError, match=message):
        "".join(session.ask("What?", images=[make_picture()], max_new_tokens=1))
    with pytest.raises(ValueError, match=f"visual_tokens={of_processor} for a model with visual_tokens={of_model}"):
        ChatSession(model, processor)


@pytest.mark.parametrize("visual_tokens", [0, -1, 0.5, "64"])
def test_what_is_no_number_of_tokens_is_refused(tmp_path, visual_tokens):
    with pytest.raises(ValueError, match="got visual_tokens=.*expected a whole number of at least 1"):
        tiny_model(visual_tokens=visual_tokens)
    with pytest.raises(ValueError, match="got visual_tokens=.*expected a whole number of at least 1"):
        tiny_processor(visual_tokens=visual_tokens)
    save_tiny_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="got visual_tokens=.*expected a whole number of at least 1"):
        AutoProcessor.from_pretrained(tmp_path, visual_tokens=visual_tokens)
    with pytest.raises(ValueError, match="got visual_tokens=.*expected a whole number of at least 1"):
        AutoModelForVision2Seq.from_pretrained(tmp_path, visual_tokens=visual_tokens)


def check_loaded(model, processor, visual_tokens: int | None = KEPT) -> None:
    """That both were loaded with the number, and work together."""
    assert (model.config.visual_tokens, processor.visual_tokens) == (visual_tokens, visual_tokens)
    inputs = encode(processor, ask("What is this?", make_picture()))
    num_tokens = visual_tokens or PATCHES
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == num_tokens
    assert len(model(**inputs).image_hidden_states) == num_tokens


def test_asked_for_at_loading_saved_and_loaded_again(tmp_path):
    folder, saved = save_tiny_checkpoint(tmp_path / "folder"), tmp_path / "saved"
    model = AutoModelForVision2Seq.from_pretrained(folder, visual_tokens=KEPT)
    processor = AutoProcessor.from_pretrained(folder, visual_tokens=KEPT)
    check_loaded(model, processor)
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    check_loaded(AutoModelForVision2Seq.from_pretrained(saved), AutoProcessor.from_pretrained(saved))
    # transformers hands unknown arguments to the tokenizer, too, which would store them.
    for name in ("tokenizer_config.json", "processor_config.json"):
        fields = json.loads((saved / name).read_text())
        assert fields.get("visual_tokens") == (KEPT if name == "processor_config.json" else None)
    model = AutoModelForVision2Seq.from_pretrained(saved, visual_tokens=None)
    check_loaded(model, AutoProcessor.from_pretrained(saved, visual_tokens=None), None)


def test_asked_for_of_an_original_folder(tmp_path):
    folders.write_v15(tmp_path)
    folder, saved = tmp_path / "checkpoint", tmp_path / "saved"
    model = AutoModelForVision2Seq.from_pretrained(folder, visual_tokens=KEPT)
    processor = AutoProcessor.from_pretrained(folder, visual_tokens=KEPT)
    check_loaded(model, processor)
    with pytest.raises(ValueError, match=f"got visual_tokens={KEPT}, which the layout 'original' cannot express"):
        model.save_pretrained(saved)
    model.save_pretrained(saved, layout="any_llava")
    processor.save_pretrained(saved)
    check_loaded(AutoModelForVision2Seq.from_pretrained(saved), AutoProcessor.from_pretrained(saved))


def test_asked_for_of_a_folder_of_transformers_own_classes(tmp_path):
    processor = tiny_processor()
    donor = tiny_model(image_token_id=processor.image_token_id)
    donor.save_pretrained(tmp_path, layout="transformers")
    build_transformers_processor(processor, write_transformers_config(donor.config)).save_pretrained(tmp_path)
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path, visual_tokens=KEPT)
    check_loaded(model, AnyLlavaProcessor.from_pretrained(tmp_path, visual_tokens=KEPT))
    with pytest.raises(ValueError, match=f"got visual_tokens={KEPT}, which the layout 'transformers' cannot express"):
        model.save_pretrained(tmp_path / "saved")


def test_training_on_cached_features_is_training_on_pictures(tmp_path):
    model, processor = build_pair()
    make_picture().save(tmp_path / "picture.png")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Color?"}]}
    row = {"id": "0", "images": [tmp_path / "picture.png"], "messages": [question, answer]}
    cache = FeatureCache(model, processor, tmp_path / "cache")
    cache.add([row])
    losses = []
    for read_features in (None, cache.read):
        model.zero_grad()
        loss = model(**LlavaDataCollator(processor, read_features=read_features)([row])).loss
        loss.backward()
        losses.append((loss, model.model.mm_projector[0].weight.grad))
    assert losses[0][1].abs().sum() > 0
    # Features are kept in 16 bits.
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=1e-5)
    without = FeatureCache(*build_pair(None), tmp_path / "cache")
    without.add([row])
    assert (without.folder, without.positions) == (cache.folder, cache.positions)
