"""GGUF files: towers rebuilt from them, what they say, and what is refused before anything is written.

llama.cpp itself reads them in tests/llama_cpp_suite.
"""

import os
import stat
import sys

import pytest
import torch
import torch.nn.functional as F

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.cli import main
from modeling_llava.export.gguf_templates import adapt_template
from modeling_llava.export.gguf_text import interleave_halves
from processing_llava.templates import load_template
from tests.modeling_llava.export.gguf_folders import export, gguf, read, read_exported, save
from tests.original_folders import (
    make_model,
    make_tower,
    original_weights,
    save_tower,
    write_config,
    write_safetensors,
    write_sentencepiece,
    write_v15,
)
from tests.tiny import (
    PINPOINTS,
    random_images,
    save_tiny_checkpoint,
    tiny_config,
    tiny_model,
    tiny_processor,
)

pytestmark = pytest.mark.core


def norm(values, tensors, name, settings):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return F.layer_norm(values, weight.shape, weight, bias, settings["clip.vision.attention.layer_norm_epsilon"])


def linear(values, tensors, name):
    return F.linear(values, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def encode(settings, tensors, pixels):
    """What a llama.cpp without issue #25814 computes of pictures, from its file and nothing else."""
    get = lambda name: settings[f"clip.vision.{name}"]  # noqa: E731
    states = F.conv2d(
        pixels, tensors["v.patch_embd.weight"], tensors.get("v.patch_embd.bias"), stride=get("patch_size")
    )
    states = states.flatten(2).transpose(1, 2)
    has_class = "v.class_embd" in tensors
    if has_class:
        states = torch.cat([tensors["v.class_embd"].expand(len(states), 1, -1), states], dim=1)
    states = states + tensors["v.position_embd.weight"]
    if has_class:
        states = norm(states, tensors, "v.pre_ln", settings)
    heads = get("attention.head_count")
    found = []
    for layer in range(max(get("feature_layer"))):
        assert layer < get("block_count")
        block = f"v.blk.{layer}"
        normed = norm(states, tensors, f"{block}.ln1", settings)
        query, key, value = (
            linear(normed, tensors, f"{block}.attn_{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in "qkv"
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        states = states + linear(attended, tensors, f"{block}.attn_out")
        hidden = linear(norm(states, tensors, f"{block}.ln2", settings), tensors, f"{block}.ffn_up")
        use_gelu = settings["clip.use_gelu"]
        hidden = F.gelu(hidden, approximate="tanh") if use_gelu else hidden * torch.sigmoid(1.702 * hidden)
        states = states + linear(hidden, tensors, f"{block}.ffn_down")
        if layer + 1 in get("feature_layer"):
            found.append(states)
    features = torch.cat(found, dim=-1)[:, int(has_class) :]
    return linear(F.gelu(linear(features, tensors, "mm.0")), tensors, "mm.2")


TOWERS = {
    "clip": {"vision": "clip"},
    "siglip": {"vision": "siglip"},
    "the last layer": {"vision": "clip", "vision_feature_layer": -1},
    "several layers": {"vision": "clip", "vision_feature_layer": [1, -3, -1]},
    "scaled": {"vision": "siglip", "scale_image_features": True},
    "float16": {"vision": "clip", "dtype": torch.float16},
    "bfloat16": {"vision": "siglip", "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_rebuilt_from_its_file(name, tmp_path):
    model = save(tmp_path / "model", **TOWERS[name])
    precision = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(model.dtype, "f32")
    assert export(tmp_path / "model") == 0
    _, (settings, tensors) = read_exported(tmp_path / "out", dtype=precision)
    pixels = random_images(2)
    with torch.no_grad():
        expected = model.float().get_image_features(pixels).pooler_output
    torch.testing.assert_close(encode(settings, tensors, pixels), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_gemma_scales_what_enters_it_so_that_the_file_does_not(tmp_path):
    pixels = random_images(1)
    for scales in (False, True):
        folder = tmp_path / str(scales)
        model = save(folder / "model", "gemma", scale_image_features=scales)
        assert export(folder / "model") == 0
        _, (settings, tensors) = read_exported(folder / "out")
        with torch.no_grad():
            (expected,) = model.get_image_features(pixels).pooler_output
        entering = encode(settings, tensors, pixels)[0] * model.config.text_config.hidden_size**0.5
        torch.testing.assert_close(entering, expected, rtol=1e-5, atol=1e-5)


def test_the_option_moves_the_class_token_and_says_so(tmp_path, capsys):
    save(tmp_path / "model", vision="clip")
    assert export(tmp_path / "model") == 0
    _, (settings, tensors) = read_exported(tmp_path / "out")
    assert "stock llama.cpp computes pictures of CLIP towers wrongly" in settings["general.description"]
    (tmp_path / "out").rename(tmp_path / "right")
    assert export(tmp_path / "model", "--for-llama-cpp-with-issue-25814") == 0
    _, (moved_settings, moved) = read_exported(tmp_path / "out")
    assert "issues/25814" in moved_settings["general.description"]
    assert "without that fault computes nonsense" in moved_settings["general.description"]
    position = "v.position_embd.weight"
    torch.testing.assert_close(moved[position], torch.cat([tensors[position][1:], tensors[position][:1]]))
    for name in tensors.keys() - {position}:
        torch.testing.assert_close(moved[name], tensors[name])
    assert "note: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_the_language_model_is_in_its_file(text, tmp_path):
    model = save(tmp_path / "model", text)
    assert export(tmp_path / "model", "--license", "mit") == 0
    (settings, tensors), _ = read_exported(tmp_path / "out")
    architecture = settings["general.architecture"]
    assert architecture == {"mistral": "llama"}.get(text, text)
    config = model.config.text_config
    assert settings["general.license"] == "mit"
    assert settings[f"{architecture}.block_count"] == config.num_hidden_layers
    assert settings[f"{architecture}.attention.head_count_kv"] == config.num_key_value_heads
    assert ("output.weight" in tensors) != model.config.tie_word_embeddings
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "language_model" in name or (name == "lm_head.weight" and not model.config.tie_word_embeddings)
    )
    state = model.model.language_model.state_dict()
    layer = "layers.1.self_attn"
    width = len(state[f"{layer}.q_proj.weight"]) // config.num_attention_heads
    query = state[f"{layer}.q_proj.weight"]
    if architecture == "llama":
        query = query.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
    torch.testing.assert_close(tensors["blk.1.attn_q.weight"], query)
    torch.testing.assert_close(tensors["blk.1.ffn_down.weight"], state["layers.1.mlp.down_proj.weight"])
    torch.testing.assert_close(tensors["output_norm.weight"], state["norm.weight"] + float(text == "gemma"))


def test_neighbours_turn_as_halves_did():
    """Products of queries and keys are the same: transformers turns halves, and llama.cpp neighbours."""
    heads, width = 2, 8
    query, key = torch.randn(2, 3, heads * width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.arange(3)[:, None, None] * 100.0 ** -(torch.arange(4) / 4)

    def turn(first, second):
        return first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()

    def by_halves(states):
        first, second = states.unflatten(-1, (heads, 2, -1)).unbind(-2)
        return torch.cat(turn(first, second), dim=-1)

    def by_neighbours(states):
        states = interleave_halves(states.T, width).T.unflatten(-1, (heads, -1, 2))
        return torch.cat(turn(*states.unbind(-1)), dim=-1)

    expected = (by_halves(query) * by_halves(key)).sum(-1)
    torch.testing.assert_close((by_neighbours(query) * by_neighbours(key)).sum(-1), expected)


def test_a_mistral_ends_where_its_window_would_matter(tmp_path):
    model = tiny_model("mistral", "siglip")
    model.config.text_config.sliding_window = 128
    model._built_config.text_config.sliding_window = 128
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model") == 0
    (settings, _), _ = read_exported(tmp_path / "out")
    assert settings["llama.context_length"] == 128


def test_folders_of_other_layouts_give_the_same_files(tmp_path):
    model = write_v15(tmp_path)
    facts = ["--license", "mit", "--base-model", "a/b", "--layout", "transformers"]
    assert main(["export", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "theirs"), *facts]) == 0
    pixels = random_images(1)
    with torch.no_grad():
        expected = torch.stack(model.get_image_features(pixels).pooler_output)
    for layout in ("checkpoint", "theirs"):
        assert export(tmp_path / layout) == 0
        (text_settings, text), (settings, tensors) = read_exported(tmp_path / "out")
        torch.testing.assert_close(encode(settings, tensors, pixels), expected, rtol=1e-5, atol=1e-5)
        # transformers' layout has a row for its image token.
        torch.testing.assert_close(text["token_embd.weight"][:32000], model.get_input_embeddings().weight.detach())
        assert len(text_settings["tokenizer.ggml.tokens"]) == len(text["token_embd.weight"])
        assert text_settings["tokenizer.chat_template"] == adapt_template(load_template("vicuna_v1"))
        (tmp_path / "out").rename(tmp_path / f"{layout}-gguf")


def test_an_original_folder_on_siglip_is_as_its_tower_says(tmp_path):
    tower = make_tower("siglip")
    save_tower(tower, tmp_path / "tower")
    model = make_model(tower)
    write_config(tmp_path / "model", model, vision_tower="../tower", text="llama")
    write_sentencepiece(tmp_path / "model")
    write_safetensors(tmp_path / "model", original_weights(model))
    assert export(tmp_path / "model") == 0
    _, (settings, tensors) = read_exported(tmp_path / "out")
    pixels = random_images(1)
    with torch.no_grad():
        (expected,) = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(encode(settings, tensors, pixels)[0], expected, rtol=1e-5, atol=1e-5)
    assert "pads pictures that are not square with (122, 116, 104)" in settings["general.description"]


def test_q8_0_is_for_matrices_of_whole_blocks(tmp_path):
    model = save(tmp_path / "model")
    assert export(tmp_path / "model", "--quantize", "q8_0") == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "out-q8_0.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == kinds["output_norm.weight"] == "F32"  # rows of 48
    _, tensors = read(tmp_path / "out" / "out-q8_0.gguf")
    expected = model.lm_head.weight.detach()
    torch.testing.assert_close(tensors["output.weight"], expected, rtol=0, atol=expected.abs().max().item() / 200)
    assert {
        tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "mmproj-out-f32.gguf").tensors
    } == {"F32"}


def test_q4_k_m_is_made_by_the_program_of_llama_cpp(tmp_path, monkeypatch, capsys):
    save(tmp_path / "model")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert export(tmp_path / "model", "--quantize", "q4_k_m") == 2
    assert "expected it on PATH: install llama.cpp" in capsys.readouterr().err
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f'#!{sys.executable}\nimport shutil, sys\nassert sys.argv[3] == "Q4_K_M"\n'
                       "shutil.copyfile(*sys.argv[1:3])\n")  # fmt: skip
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert export(tmp_path / "model", "--quantize", "q4_k_m") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["Modelfile", "mmproj-out-f32.gguf", "out-q4_k_m.gguf"]
    program.write_text(f'#!{sys.executable}\nimport sys\nprint("no room", file=sys.stderr)\nsys.exit(1)\n')
    (tmp_path / "out").rename(tmp_path / "first")
    assert export(tmp_path / "model", "--quantize", "q4_k_m") == 2
    assert "got no room from llama-quantize" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


REFUSED = {
    "vision_config.model_type": {"vision": "dinov2"},
    "text_config.model_type": {"text": "mpt"},
    "projector_type": {"projector_type": "linear"},
    "vision_feature_select_strategy": {"vision": "clip", "vision_feature_select_strategy": "cls_patch"},
    "image_grid_pinpoints": {"image_grid_pinpoints": PINPOINTS},
    "visual_tokens": {"visual_tokens": 4},
    "vision_feature_layer": {"vision_feature_layer": [-1, -2]},
    "crop_size": {"pictures": {"crop_size": {"height": 20, "width": 20}}},
    "size": {"pictures": {"size": {"shortest_edge": 30}}},
    "image_aspect_ratio": {"pictures": {"image_aspect_ratio": "square"}},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_llama_cpp_lacks_is_refused_by_field(field, tmp_path, capsys):
    save(tmp_path / "model", **REFUSED[field])
    assert export(tmp_path / "model") == 2
    assert f"\nllava: got {field}=" in f"\n{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


CHANGED = {
    "hidden_act": "gelu",
    "use_sliding_window": True,
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "a_field_of_next_year": 3,
}


@pytest.mark.parametrize("field", CHANGED)
def test_a_field_that_has_no_place_is_refused_whatever_it_is(field, tmp_path, capsys):
    """Qwen 3 has all of them, or would have."""
    config = tiny_config("qwen3", "siglip")
    text = config.text_config.to_dict() | {"layer_types": None, field: CHANGED[field]}
    config = AnyLlavaConfig(config.vision_config, text, image_token_id=config.image_token_id)
    AnyLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model") == 2
    assert f"got text_config.{field}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_without_effect_and_folders_with_files_are_refused(tmp_path, capsys):
    save(tmp_path / "model")
    model = str(tmp_path / "model")
    assert export(tmp_path / "model", "--quantize", "q5_1") == 2
    assert "expected one of q8_0, q4_k_m" in capsys.readouterr().err
    assert export(tmp_path / "model", "--repo-id", "me/a\nPARAMETER x") == 2
    assert "as the name of GGUF files" in capsys.readouterr().err
    assert export(tmp_path / "model", "--card", "x.yaml") == 2
    assert "got --card with --layout gguf" in capsys.readouterr().err
    assert export(tmp_path / "model", "--for-llama-cpp-with-issue-25814") == 2
    assert "expected a CLIP tower" in capsys.readouterr().err
    assert main(["export", model, "--out", str(tmp_path / "out"), "--quantize", "q8_0"]) == 2
    assert "without --layout gguf" in capsys.readouterr().err
    assert main(["push", model, "--repo-id", "me/x", "--layout", "gguf"]) == 2
    assert "llava export" in capsys.readouterr().err
    assert main(["export", model, "--out", model, "--layout", "gguf"]) == 2
    assert "which holds files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    save_tiny_checkpoint(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export(tmp_path / "model") == 2
    assert "pip install 'anyllava[gguf]'" in capsys.readouterr().err


def test_an_adapter_is_merged_first(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(adapter), "--out", "out", "--layout", "gguf", "--repo-id", "me/squares"]) == 0
    files = ["Modelfile", "mmproj-squares-f32.gguf", "squares-f32.gguf"]
    assert sorted(os.listdir("out")) == files
    assert "FROM ./squares-f32.gguf\nFROM ./mmproj-squares-f32.gguf\n" in (tmp_path / "out/Modelfile").read_text()
