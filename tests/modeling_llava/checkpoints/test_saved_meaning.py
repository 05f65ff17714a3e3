"""What is saved computes what was in memory, or the field that a layout has no place for is named.

Every field of the configurations is changed, one at a time, in a model that is then saved in every layout.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, BitsAndBytesConfig, MixtralConfig, PreTrainedConfig

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from modeling_llava.acceleration.cpu_layers import pack_linear_layers
from modeling_llava.acceleration.fused_layers import fuse_projections
from modeling_llava.acceleration.quantization import KEPT_MODULES
from modeling_llava.checkpoints.weight_names import LAYOUTS
from tests import original_folders as folders
from tests.tiny import _TEXT, PINPOINTS, TEXT_CONFIGS, VISION_CONFIGS, VOCAB_SIZE

TEXTS = TEXT_CONFIGS | {"mixtral": lambda: MixtralConfig(**_TEXT, num_key_value_heads=2, num_local_experts=3)}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
COMMON = {
    "hidden_act": ["gelu"],
    "rms_norm_eps": [0.1],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 50.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        LLAMA3_ROPE,
    ],
    "head_dim": [4],
    "num_key_value_heads": [1],
    "num_attention_heads": [8],
    "num_hidden_layers": [1],
    "hidden_size": [48],
    "intermediate_size": [40],
    "vocab_size": [VOCAB_SIZE + 7],
}
"""Tried on Llama."""
TEXT_CHANGES = {
    "llama": COMMON | {"attention_bias": [True], "mlp_bias": [True]},
    "mistral": {"sliding_window": [4]},
    "mixtral": {"sliding_window": [4], "num_experts_per_tok": [1], "num_local_experts": [2]},
    "qwen2": {"sliding_window": [4], "layer_types": [["sliding_attention", "full_attention"]]},
    "gemma": {"attention_bias": [True], "hidden_act": ["gelu_python"]},
}
TOGETHER = {
    "layer_types": {"use_sliding_window": True, "sliding_window": 4},
    "sliding_window": {"use_sliding_window": True},
}
"""Fields without which another one has no effect."""
VISION_CHANGES = {
    "clip": {
        "hidden_act": ["gelu"],
        "layer_norm_eps": [0.5],
        "num_attention_heads": [2],
        "num_hidden_layers": [3],
        "hidden_size": [32],
        "intermediate_size": [40],
        "image_size": [14],
        "patch_size": [14],
        "num_channels": [1],
    }
}
VISION_CHANGES["siglip"] = {"hidden_act": ["gelu"], "num_hidden_layers": [3]}
LLAVA_CHANGES = {
    "image_token_id": [VOCAB_SIZE - 1, VOCAB_SIZE + 9],
    "projector_type": ["linear", "mlp1x_gelu", "mlp3x_gelu"],
    "vision_feature_layer": [-1, 2, [1, 3], [2]],
    "vision_feature_select_strategy": ["cls_patch"],
    "patch_merge_type": ["spatial", "spatial_unpad"],
    "image_grid_pinpoints": [PINPOINTS, PINPOINTS[::-1]],
    "visual_tokens": [3],
    "scale_image_features": [True, False],
    "lm_head_bias": [True],
    "tie_word_embeddings": [True, False],
}
# What decides training, output or generation alone, or repeats another field.
INERT = {
    "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_factor", "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings",
    "max_window_layers", "model_type", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "pretraining_tp", "problem_type", "projection_dim", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "text_config", "tie_word_embeddings", "transformers_version", "use_cache",
    "use_sliding_window", "vision_config", "vision_use_head", "_name_or_path", "use_bidirectional_attention",
}  # fmt: skip


def list_changes(table: dict) -> list[tuple]:
    return [(kind, field, value) for kind, fields in table.items() for field in fields for value in fields[field]]


def build(*, text: str = "llama", vision: str = "clip", part: str | None = None, changes: dict | None = None):
    """A model with changed fields in one part of its configuration."""
    text_config, vision_config, settings = TEXTS[text](), VISION_CONFIGS[vision](), dict(changes or {})
    if part is not None:
        config = {"text_config": text_config, "vision_config": vision_config}[part]
        changed = config.to_dict() | settings
        config = type(config).from_dict(changed)
        text_config, vision_config = (config, vision_config) if part == "text_config" else (text_config, config)
        settings = {}
    torch.manual_seed(3)
    settings = {"image_token_id": VOCAB_SIZE} | settings
    config = AnyLlavaConfig(vision_config, text_config, **settings)
    model = AnyLlavaForConditionalGeneration(config).eval()
    folders.widen(model)
    return model


def compute(model, *, num_columns: int | None = None) -> torch.Tensor:
    config = model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    tile = (config.num_channels, config.image_size, config.image_size)
    if model.config.image_grid_pinpoints is None:
        images = {"pixel_values": torch.randn(1, *tile, generator=generator)}
    else:
        sizes = torch.tensor([[28, 56]])
        images = {"pixel_values": torch.randn(1, 3, *tile, generator=generator), "image_sizes": sizes}
    num_tokens = model.model.plan_images(**images)[0].num_tokens
    ids = torch.tensor([[1, 5, 9, *[model.config.image_token_id] * num_tokens, 7, 12, 40]])
    return folders.logits_of(model, {"input_ids": ids, **images})[..., :num_columns]


def check(tmp_path, model, layout: str | None, field: str, *, vision: str = "clip") -> None:
    """Save, load and compare; or a refusal that names the field."""
    if layout == "original" and not model.config.vision_config.name_or_path:
        folders.save_tower(folders.make_tower(vision), tmp_path / "tower")
        model.config.vision_config.name_or_path = str(tmp_path / "tower")
    expected = compute(model)
    settings = {} if layout is None else {"layout": layout}
    try:
        model.save_pretrained(tmp_path / "saved", **settings)
    except ValueError as error:
        assert f"got {field}=" in str(error), error
        assert "cannot express" in str(error), error
        return
    again = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(compute(again, num_columns=expected.shape[-1]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text, field, value", list_changes(TEXT_CHANGES))
def test_a_field_of_the_language_model(tmp_path, text, field, value, layout):
    model = build(text=text, part="text_config", changes={field: value} | TOGETHER.get(field, {}))
    # As the original computes; transformers' class does not.
    model.config.scale_image_features = text == "gemma" and layout == "original"
    check(tmp_path, model, layout, f"text_config.{field}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vision, field, value", list_changes(VISION_CHANGES))
def test_a_field_of_the_tower(tmp_path, vision, field, value, layout):
    settings = {"hidden_size": {"num_attention_heads": 4}}.get(field, {})
    model = build(vision=vision, part="vision_config", changes={field: value} | settings)
    check(tmp_path, model, layout, f"vision_config.{field}", vision=vision)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text, vision", [("llama", "clip"), ("gemma", "siglip")])
@pytest.mark.parametrize("_, field, value", list_changes({"": LLAVA_CHANGES}))
def test_a_field_of_the_llava(tmp_path, text, vision, _, field, value, layout):
    changes = {field: value}
    if field == "patch_merge_type":
        changes["image_grid_pinpoints"] = PINPOINTS
    if field == "image_grid_pinpoints":
        changes["patch_merge_type"] = "spatial_unpad"
    if text == "gemma":
        changes.setdefault("scale_image_features", layout == "original")
    check(tmp_path, build(text=text, vision=vision, changes=changes), layout, field, vision=vision)


def test_no_field_was_forgotten():
    """A new version of transformers may bring fields: each is tried here, or known to change nothing."""
    for text, changes in TEXT_CHANGES.items():
        assert set(TEXTS[text]().to_dict()) <= set(COMMON) | set(changes) | INERT, text
    for vision, changes in VISION_CHANGES.items():
        assert set(VISION_CONFIGS[vision]().to_dict()) <= set(VISION_CHANGES["clip"]) | set(changes) | INERT, vision
    fields = set(AnyLlavaConfig().to_dict()) - set(PreTrainedConfig().to_dict())
    assert fields - INERT <= set(LLAVA_CHANGES)


LOADED = {
    "text_config.rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "text_config.rms_norm_eps": 0.1,
    "text_config.hidden_act": "gelu",
    "vision_config.hidden_act": "gelu",
    "vision_config.layer_norm_eps": 0.5,
    "vision_feature_layer": -3,
    "vision_feature_select_strategy": "cls_patch",
    "visual_tokens": 3,
    "scale_image_features": True,
    "image_token_id": 31999,
}


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("field", LOADED)
def test_a_change_of_a_loaded_original(tmp_path, field, layout):
    """Through `config=`; the default layout keeps what the folder said but for the change."""
    folders.write_v15(tmp_path)
    before = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config = AutoConfig.from_pretrained(tmp_path / "checkpoint")
    part, _, name = field.rpartition(".")
    setattr(getattr(config, part) if part else config, name, LOADED[field])
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint", config=config).eval()
    check(tmp_path, model, layout, field)
    saved = tmp_path / "saved" / "config.json"
    if layout is None and saved.exists():
        after = json.loads(saved.read_text())
        changed = {key for key in before | after if before.get(key) != after.get(key)}
        assert len(changed - {"rope_parameters", "rope_theta"}) == 1


def test_a_change_after_loading(tmp_path):
    """The model computes from its configuration, so that it may change at any time."""
    folders.write_v15(tmp_path)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint").eval()
    model.config.image_grid_pinpoints = PINPOINTS
    check(tmp_path, model, None, "image_grid_pinpoints")
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert after["image_aspect_ratio"] == "anyres"
    model.config.visual_tokens = 3
    with pytest.raises(ValueError, match="got visual_tokens=3, which the layout 'original' cannot express"):
        model.save_pretrained(tmp_path / "twice")


def list_late_changes() -> list[tuple]:
    parts = {"": LLAVA_CHANGES, "text_config": TEXT_CHANGES["llama"], "vision_config": VISION_CHANGES["clip"]}
    return [(part, field, values[0]) for part, fields in parts.items() for field, values in fields.items()]


@pytest.mark.parametrize("merge_type", ["flat", "spatial_unpad"])
@pytest.mark.parametrize("part, field, value", list_late_changes())
def test_a_field_that_is_changed_after_loading(tmp_path, part, field, value, merge_type):
    """It is computed, or refused, or written as computed: what is read again computes the same."""
    model = build(changes={"patch_merge_type": merge_type, "image_grid_pinpoints": PINPOINTS})
    setattr(getattr(model.config, part) if part else model.config, field, value)
    try:
        model.save_pretrained(tmp_path)
    except ValueError as error:
        assert f"{field}=" in str(error)
        return
    again = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(compute(again), compute(model), rtol=1e-5, atol=1e-5)


def test_what_training_and_generation_change_may_be_saved(tmp_path):
    model = build()
    model.config.text_config.use_cache = model.config.use_cache = False
    model.config.text_config.pad_token_id = 7
    model.resize_token_embeddings(VOCAB_SIZE + 8)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(compute(AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)), compute(model))


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("with_processor", [False, True])
def test_resized_embeddings(tmp_path, layout, with_processor):
    """New tokens of the tokenizer have rows; the image token keeps its id."""
    folders.write_v15(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint").eval()
    processor.tokenizer.add_tokens(["<loc_1>", "<loc_2>"], special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer))
    if with_processor:
        processor.save_pretrained(tmp_path / "saved")
    check(tmp_path, model, layout, "text_config.vocab_size")
    again = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.image_token_id == processor.image_token_id
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    if with_processor:
        found = AutoProcessor.from_pretrained(tmp_path / "saved")
        assert found.tokenizer.convert_tokens_to_ids(["<loc_1>", "<loc_2>"]) == [32001, 32002]
        assert found.image_token_id == again.config.image_token_id


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_tying_that_the_configuration_denies(tmp_path, tied, layout):
    """A configuration that was changed after the layers were tied, or not."""
    model = build(changes={"tie_word_embeddings": tied})
    model.config.tie_word_embeddings = not tied
    folders.save_tower(folders.make_tower("clip"), tmp_path / "tower")
    model.config.vision_config.name_or_path = str(tmp_path / "tower")
    with pytest.raises(ValueError, match=f"got tie_word_embeddings={not tied} in the configuration of a model whose"):
        model.save_pretrained(tmp_path / "saved", layout=layout)


QUANTIZED = ["int8", "packed", "fused", "bitsandbytes-4", "bitsandbytes-8"]


def quantize(folder, kind: str):
    """A loaded model with other weights than those that were stored."""
    load = functools.partial(AnyLlavaForConditionalGeneration.from_pretrained, folder)
    if kind == "int8":
        return load(quantization="int8")
    if kind.startswith("bitsandbytes"):
        bits = {"4": {"load_in_4bit": True}, "8": {"load_in_8bit": True}}[kind[-1]]
        skipped = {"llm_int8_skip_modules": KEPT_MODULES}
        return load(quantization_config=BitsAndBytesConfig(**bits, **skipped), dtype=torch.float32)
    model = load(dtype=torch.float32)
    {"packed": pack_linear_layers, "fused": fuse_projections}[kind](model)
    return model


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("loaded", LAYOUTS)
def test_quantized_models_are_read_back_or_refused(tmp_path, loaded, kind):
    text_config = TEXTS["llama"]().to_dict() | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = build(part="text_config", changes=text_config)
    folders.save_tower(folders.make_tower("clip"), tmp_path / "tower")
    model.config.vision_config.name_or_path = str(tmp_path / "tower")
    model.save_pretrained(tmp_path / "source", layout=loaded)
    quantized = quantize(tmp_path / "source", kind).eval()
    written = []
    for layout in (None, *LAYOUTS):
        out = tmp_path / f"saved-{layout}"
        try:
            quantized.save_pretrained(out, **({} if layout is None else {"layout": layout}))
        except ValueError as error:
            assert "; expected " in str(error)
            assert not out.exists()
            assert not (layout == "any_llava" and kind.startswith("bitsandbytes"))
            continue
        written.append(out)
    expected = compute(quantized)
    for out in written:
        again = AnyLlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
        found = compute(again, num_columns=expected.shape[-1])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if kind == "bitsandbytes-4":
        with pytest.raises(ValueError, match="in 4 bits that has computed on a CPU"):
            quantized.save_pretrained(tmp_path / "late", layout="any_llava")


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("is_inside", [False, True])
def test_saving_from_somewhere_else(tmp_path, monkeypatch, layout, is_inside):
    """Loaded by a relative path, whose tower is named by one; no path of this machine is written."""
    truth = folders.write_v15(tmp_path)
    if is_inside:
        weights = folders.original_weights(truth, folders.make_tower("clip"))
        folders.write_safetensors(tmp_path / "checkpoint", weights)
    monkeypatch.chdir(tmp_path)
    model = AutoModelForVision2Seq.from_pretrained("checkpoint").eval()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    check(tmp_path, model, layout, "nothing")
    for path in (tmp_path / "saved").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    model.save_pretrained("../again/deeper", **({} if layout is None else {"layout": layout}))
    again = AnyLlavaForConditionalGeneration.from_pretrained(Path("../again/deeper"))
    torch.testing.assert_close(compute(again, num_columns=32000), compute(model), rtol=1e-5, atol=1e-5)


def test_a_tower_relative_to_the_working_directory(tmp_path, monkeypatch):
    model = folders.write_v15(tmp_path)
    folders.write_config(tmp_path / "checkpoint", model, vision_tower="tower", text="llama")
    monkeypatch.chdir(tmp_path)
    loaded = AutoModelForVision2Seq.from_pretrained("checkpoint")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    check(tmp_path, loaded, None, "nothing")


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("gone", ["checkpoint", "tower"])
def test_the_source_is_gone(tmp_path, layout, gone):
    folders.write_v15(tmp_path)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint").eval()
    shutil.rmtree(tmp_path / gone)
    if layout in (None, "original"):
        with pytest.raises(ValueError, match=rf"got a model loaded from .*{gone}, which is no longer there; expected"):
            model.save_pretrained(tmp_path / "saved", **({} if layout is None else {"layout": layout}))
    else:
        check(tmp_path, model, layout, "nothing")


def test_saving_over_the_source(tmp_path):
    folders.write_v15(tmp_path)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint").eval()
    expected = compute(model)
    model.save_pretrained(tmp_path / "checkpoint")
    assert torch.equal(compute(AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint")), expected)
