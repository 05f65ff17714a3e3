"""Every published layout of the original LLaVA loads, and computes what a model built directly of its weights does."""

import json
import logging

import PIL.Image
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, pipeline
from trl.trainer.utils import create_model_from_path

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration, AnyLlavaModel, AutoModelForVision2Seq
from processing_llava.templates import load_template
from tests import original_folders as folders

pytestmark = pytest.mark.core


def assert_same(found, expected) -> None:
    inputs = folders.example_inputs(expected)
    inputs_found = dict(inputs)
    # The ids of the image token may differ: only the places of the images matter.
    is_image = inputs["input_ids"] == expected.config.image_token_id
    inputs_found["input_ids"] = inputs["input_ids"].masked_fill(is_image, found.config.image_token_id)
    assert torch.equal(folders.logits_of(found, inputs_found), folders.logits_of(expected, inputs))


def test_v1_with_linear_projector_and_start_and_end_tokens(tmp_path):
    tower = folders.make_tower("clip")
    folders.save_tower(tower, tmp_path / "tower")
    model = folders.make_model(tower, vocab_size=32003, projector_type="linear")
    checkpoint = tmp_path / "checkpoint"
    # The field of the patch token did not exist yet, and means that there is one.
    fields = {"mm_use_im_patch_token": None, "mm_use_im_start_end": True, "image_aspect_ratio": None}
    folders.write_config(checkpoint, model, vision_tower="../tower", text="llama", mm_patch_merge_type=None, **fields)
    folders.write_sentencepiece(checkpoint)
    torch.save(folders.original_weights(model), checkpoint / "pytorch_model.bin")

    loaded = AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert_same(loaded, model)
    processor = AutoProcessor.from_pretrained(checkpoint)
    added = processor.tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>", "<image>"])
    assert added == [32000, 32001, 32002, 32003]
    assert loaded.config.image_token_id == processor.image_token_id == 32003
    assert processor.image_processor.image_aspect_ratio == "square"
    assert processor.chat_template == load_template("llava_v0", image="<im_start><image><im_end>")


@pytest.mark.parametrize("projector_type", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_v15_in_torch_shards(tmp_path, projector_type, caplog):
    tower = folders.make_tower("clip")
    folders.save_tower(tower, tmp_path / "tower")
    model = folders.make_model(tower, projector_type=projector_type)
    checkpoint = tmp_path / "checkpoint"
    folders.write_config(checkpoint, model, vision_tower="../tower", text="llama")
    folders.write_sentencepiece(checkpoint)
    folders.write_torch_shards(checkpoint, folders.original_weights(model), num_shards=3)

    with caplog.at_level(logging.WARNING):
        assert_same(AutoModelForVision2Seq.from_pretrained(checkpoint), model)
    lines = [record.message for record in caplog.records if "vision tower of" in record.message]
    assert len(lines) == 1 and str(tmp_path / "tower") in lines[0]


@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial", "flat"])
def test_v16_with_its_own_tower(tmp_path, merge, caplog):
    tower = folders.make_tower("clip", seed=5)
    folders.save_tower(folders.make_tower("clip", seed=6), tmp_path / "tower")
    pinpoints = [[height, width] for width, height in folders.PINPOINTS_WIDTH_FIRST]
    model = folders.make_model(tower, patch_merge_type=merge, image_grid_pinpoints=pinpoints)
    checkpoint = tmp_path / "checkpoint"
    fields = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": str(folders.PINPOINTS_WIDTH_FIRST)}
    folders.write_config(checkpoint, model, vision_tower="../tower", text="llama", **fields)
    folders.write_sentencepiece(checkpoint)
    weights = folders.original_weights(model, tower)
    # Some flat checkpoints of LLaVA-NeXT carry one that is never used.
    weights.setdefault("model.image_newline", torch.ones(32))
    folders.write_safetensors(checkpoint, weights)

    with caplog.at_level(logging.WARNING):
        loaded = AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert_same(loaded, model)
    assert any("vision tower of the checkpoint" in record.message for record in caplog.records)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.image_processor.image_grid_pinpoints == pinpoints == loaded.config.image_grid_pinpoints
    assert processor.patch_merge_type == merge


def test_llava_med_with_a_tower_that_its_own_loader_ignores(tmp_path):
    """Mistral, padded images, no tiles; the tower lies inside although unfreeze_mm_vision_tower is false."""
    tower = folders.make_tower("clip", seed=5)
    folders.save_tower(folders.make_tower("clip", seed=6), tmp_path / "tower")
    model = folders.make_model(tower, text="mistral")
    checkpoint = tmp_path / "checkpoint"
    folders.write_config(checkpoint, model, vision_tower="../tower", text="mistral")
    folders.write_sentencepiece(checkpoint)
    folders.write_safetensors(checkpoint, folders.original_weights(model, tower))
    assert_same(AutoModelForVision2Seq.from_pretrained(checkpoint), model)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.image_processor.image_aspect_ratio == "pad"
    assert processor.chat_template == load_template("mistral_instruct")


def test_class_token_is_kept_on_request(tmp_path):
    tower = folders.make_tower("clip")
    folders.save_tower(tower, tmp_path / "tower")
    model = folders.make_model(tower, vision_feature_select_strategy="cls_patch")
    folders.write_config(tmp_path / "checkpoint", model, vision_tower="../tower", text="llama")
    folders.write_sentencepiece(tmp_path / "checkpoint")
    folders.write_safetensors(tmp_path / "checkpoint", folders.original_weights(model))

    assert_same(AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint"), model)
    assert AutoProcessor.from_pretrained(tmp_path / "checkpoint").num_prefix_tokens == 1


@pytest.mark.parametrize(
    "added_tokens, text, template",
    [
        ((), "mistral", "mistral_instruct"),
        (("<|im_start|>", "<|im_end|>"), "llama", "chatml_direct"),
        (("<|im_start|>", "<|im_end|>"), "qwen2", "qwen"),
        (("<|start_header_id|>", "<|eot_id|>"), "llama", "llama_3"),
        (("<start_of_turn>", "<end_of_turn>"), "gemma", "gemma"),
    ],
)
def test_text_models_and_their_formats(tmp_path, added_tokens, text, template):
    tower = folders.make_tower("clip")
    folders.save_tower(tower, tmp_path / "tower")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    vocab_size = folders.write_fast_tokenizer(checkpoint, *added_tokens)
    scale = {"scale_image_features": True} if text == "gemma" else {}
    model = folders.make_model(tower, text=text, vocab_size=vocab_size, **scale)
    folders.write_config(checkpoint, model, vision_tower="../tower", text=text)
    folders.write_safetensors(checkpoint, folders.original_weights(model))

    loaded = AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert_same(loaded, model)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.chat_template == load_template(template)
    assert processor.image_token_id == loaded.config.image_token_id
    if added_tokens:
        turn_end = processor.tokenizer.convert_tokens_to_ids(added_tokens[1])
        assert turn_end in loaded.generation_config.eos_token_id
    chosen = AutoProcessor.from_pretrained(checkpoint, template="plain")
    assert chosen.chat_template == load_template("plain")


def test_siglip_tower_without_its_last_layer(tmp_path):
    """LLaVA-NeXT deletes the last layer of a SigLIP tower, stores the rest, and ignores the selected layer."""
    tower = folders.make_tower("siglip")
    folders.save_tower(tower, tmp_path / "tower")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    vocab_size = folders.write_fast_tokenizer(checkpoint, "<|im_start|>", "<|im_end|>")
    # Its vocabulary is padded beyond the tokenizer's.
    model = folders.make_model(tower, text="qwen2", vocab_size=vocab_size + 10)
    folders.write_config(
        checkpoint, model, vision_tower="../tower", text="qwen2", mm_vision_select_layer=-1, model_type="llava"
    )
    weights = folders.original_weights(model, tower)
    removed = ("encoder.layers.3.", ".head.", "post_layernorm")
    weights = {key: value for key, value in weights.items() if not any(part in key for part in removed)}
    folders.write_safetensors(checkpoint, weights)

    loaded = AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert_same(loaded, model)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert loaded.config.image_token_id == processor.image_token_id == vocab_size


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llava", "architectures": None},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"},
    ],
)
def test_recognition_by_shape(tmp_path, fields):
    model = folders.write_v15(tmp_path)
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    assert_same(AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint"), model)
    assert_same(AnyLlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint"), model)


def test_every_auto_class_finds_it(tmp_path):
    model = folders.write_v15(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    assert isinstance(AutoConfig.from_pretrained(checkpoint), AnyLlavaConfig)
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, device_map="auto", dtype=torch.float32)
    assert_same(loaded, model)
    base = AnyLlavaModel.from_pretrained(checkpoint)
    inputs = folders.example_inputs(model)
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        assert torch.equal(hidden, model.model(**inputs).last_hidden_state)


def test_dtype_is_that_of_the_checkpoint_if_asked(tmp_path):
    folders.write_v15(tmp_path)
    path = tmp_path / "checkpoint" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": "float16"}))
    assert AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint", dtype="auto").dtype == torch.float16
    assert AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).dtype == torch.float32


def test_our_configuration_is_not_read_from_it_directly(tmp_path):
    folders.write_v15(tmp_path)
    with pytest.raises(ValueError, match=r"expected AutoConfig\.from_pretrained"):
        AnyLlavaConfig.from_pretrained(tmp_path / "checkpoint")


def test_mpt(tmp_path):
    """The original's own class for it cannot run; the checkpoints are fine."""
    tower = folders.make_tower("clip")
    folders.save_tower(tower, tmp_path / "tower")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    vocab_size = folders.write_fast_tokenizer(checkpoint, "<|im_start|>", "<|im_end|>")
    model = folders.make_model(tower, text="mpt", vocab_size=vocab_size)
    folders.write_config(checkpoint, model, vision_tower="../tower", text="mpt")
    weights = folders.original_weights(model)
    weights = {key.replace("model.", "transformer.", 1): value for key, value in weights.items()}
    folders.write_safetensors(checkpoint, weights)
    assert_same(AutoModelForVision2Seq.from_pretrained(checkpoint), model)
    assert AutoProcessor.from_pretrained(checkpoint).chat_template == load_template("mpt")


def test_disk_offload(tmp_path):
    model = folders.write_v15(tmp_path)
    places = {
        "model.vision_tower": "cpu",
        "model.mm_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "disk",
    }
    loaded = AutoModelForVision2Seq.from_pretrained(
        tmp_path / "checkpoint", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert_same(loaded, model)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which has no wheel for every machine")
    folders.write_v15(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint", quantization_config=quantization)
    linear = loaded.model.language_model.layers[0].self_attn.q_proj
    assert type(linear).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert type(loaded.lm_head).__name__ == "Linear"
    if bits == 8:  # its 4-bit kernel for processors takes no matrix this small
        assert folders.logits_of(loaded, folders.example_inputs(loaded)).isfinite().all()


def test_pipeline_and_trl_take_the_folder(tmp_path):
    folders.write_v15(tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path / "checkpoint"))
    picture = {"type": "image", "image": PIL.Image.new("RGB", (40, 30))}
    message = {"role": "user", "content": [picture, {"type": "text", "text": "What is this?"}]}
    answer = ask(text=[message], max_new_tokens=3)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert type(create_model_from_path(str(tmp_path / "checkpoint"))) is AnyLlavaForConditionalGeneration
