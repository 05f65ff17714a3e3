"""Broken and foreign checkpoints are refused in one clear sentence that names file, weight and shapes."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from modeling_llava import AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from modeling_llava.cli import main
from processing_llava import AnyLlavaProcessor
from tests import original_folders as folders
from tests.modeling_llava.conftest import save_base
from tests.tiny import save_tiny_checkpoint, tiny_model


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folders.write_v15(tmp_path)
    return tmp_path / "checkpoint"


def change_config(checkpoint: Path, **fields) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    folders.write_torch_shards(checkpoint, weights)


def refusal(checkpoint: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        AutoModelForVision2Seq.from_pretrained(checkpoint)


def test_truncated_safetensors(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refusal(checkpoint, r"got .*model\.safetensors, which is damaged .*; expected a whole file")


def test_truncated_torch_shard(checkpoint):
    shard(checkpoint)
    path = checkpoint / "pytorch_model-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    refusal(checkpoint, r"got .*pytorch_model-00001-of-00002\.bin, which is damaged")


def test_missing_shard(checkpoint):
    shard(checkpoint)
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    refusal(checkpoint, r"index\.json, which lists pytorch_model-00002-of-00002\.bin; expected that file beside it")


def test_pickle_with_code(checkpoint, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Harmful()}, checkpoint / "pytorch_model.bin")
    refusal(checkpoint, r"pytorch_model\.bin, which holds more than tensors and would run code")
    assert not (tmp_path / "ran").exists()


def test_file_that_is_no_state_dict(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save([torch.ones(2)], checkpoint / "pytorch_model.bin")
    refusal(checkpoint, r"pytorch_model\.bin, which is no dict of tensors")


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refusal(checkpoint, "holds no language model and does not say which it was trained on; expected base_model=")


def test_missing_weight(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.mm_projector.2.weight"]
    save_file(weights, checkpoint / "model.safetensors")
    refusal(checkpoint, r"without 1 weights, model\.mm_projector\.2\.weight among them")


def test_weight_of_another_shape(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.mm_projector.0.weight"] = torch.ones(32, 25)
    save_file(weights, checkpoint / "model.safetensors")
    refusal(
        checkpoint, r"got model\.mm_projector\.0\.weight of shape \[32, 25\] in .*\.safetensors; expected \[32, 24\]"
    )


def test_an_output_layer_that_is_not_used_is_named(checkpoint, caplog):
    change_config(checkpoint, tie_word_embeddings=True)
    model = AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "model.safetensors is not used: config.json ties the output layer to model.embed_tokens" in caplog.text
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, checkpoint / "model.safetensors"
    )
    caplog.clear()
    AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert "is not used" not in caplog.text


def test_delta_of_another_size(checkpoint, tmp_path):
    tower = folders.make_tower("clip")
    other = folders.make_model(tower, text="gemma")
    other.save_pretrained(tmp_path / "other")
    folders.write_safetensors(tmp_path / "other", {"model.layers.0.mlp.up_proj.weight": torch.ones(7, 32)})
    with pytest.raises(ValueError, match=r"up_proj\.weight of shape \[48, 32\] in .* and \[7, 32\] in .*not the base"):
        AutoModelForVision2Seq.from_pretrained(checkpoint, base_model=str(tmp_path / "other"))


@pytest.mark.parametrize(
    "fields, pattern",
    [
        ({"mm_vision_tower": None}, "with mm_vision_tower=None"),
        ({"mm_hidden_size": 99}, "mm_hidden_size=99 and vision tower .* of size 24"),
        ({"mm_projector_type": "qformer2_64"}, "projector_type='qformer2_64'"),
        ({"mm_vision_select_feature": "slicefour_patch"}, "vision_feature_select_strategy='slicefour_patch'"),
        ({"mm_patch_merge_type": "maxpool2x2"}, "patch_merge_type='maxpool2x2'"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio='highres'"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "all"}, "image_grid_pinpoints='all'"),
        ({"s2": True}, "s2=True"),
        ({"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer=\[-2, -5\]; expected one integer"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer=None"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type='spatial_pool'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type='qformer'"),
        ({"mm_spatial_pool_stride": 2}, "mm_spatial_pool_stride=2"),
        ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode='average'"),
        ({"mm_newline_position": "grid"}, "mm_newline_position='grid'"),
        ({"add_faster_video": True}, "add_faster_video=True"),
        ({"add_time_instruction": True}, "add_time_instruction=True"),
        ({"force_sample": True}, "force_sample=True"),
        ({"moe": {"moe_enable": True, "num_experts": [4]}}, "moe="),
        ({"mm_video_tower": "LanguageBind/Video"}, "mm_video_tower='LanguageBind/Video'"),
        ({"mm_vision_tower_aux": "convnext"}, "mm_vision_tower_aux='convnext'"),
        ({"mm_somebodys_gate": 3}, "mm_somebodys_gate=3"),
        (
            {"architectures": ["LlavaStableLMForCausalLM"], "model_type": "llava_stablelm"},
            "model_type='llava_stablelm' and architectures=",
        ),
    ],
)
def test_settings_that_cannot_be_expressed(checkpoint, fields, pattern):
    change_config(checkpoint, **fields)
    refusal(checkpoint, pattern)


# What published dense LLaVAs, and runs of LLaVA-NeXT's code with its defaults, say beyond the fields that are read.
PUBLISHED_FIELDS = {
    "mm_resampler_type": None, "s2": False, "s2_scales": "336,672,1008", "mm_newline_position": "one_token",
    "add_faster_video": False, "faster_token_stride": 10, "force_sample": False, "mm_spatial_pool_stride": None,
    "use_pos_skipping": False, "pos_skipping_range": 4096, "mm_tunable_parts": "mm_mlp_adapter,mm_language_model",
    "mm_vision_tower_lr": 2e-6, "mm_perceiver_depth": 3, "mm_qformer_depth": 3, "vision_tower_pretrained": None,
    "image_crop_resolution": 224, "image_split_resolution": 224, "moe": {}, "pretraining_tp": 1, "max_length": 4096,
    "temperature": 0.9, "tokenizer_model_max_length": 2048, "torchscript": False, "rope_scaling": None,
}  # fmt: skip


def test_fields_of_published_checkpoints(checkpoint, caplog):
    change_config(checkpoint, **PUBLISHED_FIELDS)
    AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert "nothing is known" not in caplog.text


def test_a_field_that_nobody_knows_is_named(checkpoint, caplog):
    change_config(checkpoint, notes_of_the_author="blue")
    AutoModelForVision2Seq.from_pretrained(checkpoint)
    assert "config.json holds notes_of_the_author, of which nothing is known; no effect" in caplog.text


def test_the_processor_of_a_video_model_is_refused(checkpoint):
    change_config(checkpoint, mm_resampler_type="spatial_pool")
    with pytest.raises(ValueError, match="mm_resampler_type='spatial_pool'"):
        AnyLlavaProcessor.from_pretrained(checkpoint)


def test_unknown_tower(checkpoint):
    change_config(checkpoint, mm_vision_tower="nobody/no-such-tower")
    refusal(checkpoint, "got vision tower 'nobody/no-such-tower', which cannot be read")


def test_processor_without_tokenizer(checkpoint):
    (checkpoint / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer and does not say .*; expected base_model="):
        AutoProcessor.from_pretrained(checkpoint)


def test_unknown_template(checkpoint):
    with pytest.raises(ValueError, match="got conversation format 'vicuna_v9'"):
        AutoProcessor.from_pretrained(checkpoint, template="vicuna_v9")


@pytest.mark.parametrize(
    "layout, loader",
    [
        ("any_llava", AutoModelForVision2Seq),
        ("any_llava", AnyLlavaForConditionalGeneration),
        ("transformers", AnyLlavaForConditionalGeneration),
    ],
)
def test_a_base_for_a_complete_model_is_refused(tmp_path, layout, loader):
    tiny_model().save_pretrained(tmp_path, layout=layout)
    with pytest.raises(ValueError, match="got base_model='other' for .*which is a complete model"):
        loader.from_pretrained(tmp_path, base_model="other")


@pytest.fixture(params=["original", "any_llava", "transformers"])
def stored(request, tmp_path) -> Path:
    """A complete model in each layout, its weights in model.safetensors."""
    model = folders.write_v15(tmp_path)
    if request.param == "original":
        return tmp_path / "checkpoint"
    model.save_pretrained(tmp_path / request.param, layout=request.param)
    return tmp_path / request.param


CHANGES = {
    "no projector": lambda weights: {key: value for key, value in weights.items() if "projector" not in key},
    "one foreign weight alone": lambda weights: {"foreign.weight": torch.ones(2)},
    "another shape": lambda weights: {
        key: torch.ones(3, 5) if key.endswith("layers.0.self_attn.k_proj.weight") else value
        for key, value in weights.items()
    },
    "a weight more": lambda weights: weights | {"model.mm_projector.4.weight": torch.ones(2)},
    "a foreign weight more": lambda weights: weights | {"foo.weight": torch.ones(2)},
    "integers": lambda weights: {
        key: value.to(torch.int8) if "projector" in key and key.endswith("weight") else value
        for key, value in weights.items()
    },
}


@pytest.mark.parametrize("loader", [AutoModelForVision2Seq, AnyLlavaForConditionalGeneration])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_do_not_fit(stored, change, loader):
    weights = CHANGES[change](load_file(stored / "model.safetensors"))
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"without \d+ weights|without a place|of shape \[3, 5\]|near 0|torch\.int8"
    ) as error:
        loader.from_pretrained(stored)
    assert "\n" not in str(error.value)
    if change in ("another shape", "a weight more") and not (
        loader is AutoModelForVision2Seq and stored.name == "transformers"
    ):
        assert "model.safetensors" in str(error.value)


def test_a_tower_of_which_a_part_is_used(tmp_path):
    """As published checkpoints are stored: what lies behind the used layer is no foreign weight."""
    tiny_model().save_pretrained(tmp_path, layout="transformers")
    weights = load_file(tmp_path / "model.safetensors")
    layer = {key: value for key, value in weights.items() if ".encoder.layers.1." in key}
    for number in (3, 4):
        weights |= {key.replace(".layers.1.", f".layers.{number}."): value.clone() for key, value in layer.items()}
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for loader in (AutoModelForVision2Seq, AnyLlavaForConditionalGeneration):
        loader.from_pretrained(tmp_path)


def test_arguments_for_other_layouts(tmp_path):
    """`merge_adapter` has nothing to do for a complete model; `quantization` loads our class."""
    tiny_model().save_pretrained(tmp_path, layout="transformers")
    for merge in (True, False):
        model = AutoModelForVision2Seq.from_pretrained(tmp_path, merge_adapter=merge)
        assert type(model).__name__ == "LlavaForConditionalGeneration"
    model = AutoModelForVision2Seq.from_pretrained(tmp_path, quantization="int8")
    assert type(model) is AnyLlavaForConditionalGeneration


def test_a_shape_that_is_to_be_replaced(tmp_path):
    save_tiny_checkpoint(tmp_path)
    change = CHANGES["another shape"](load_file(tmp_path / "model.safetensors"))
    save_file(change, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoModelForVision2Seq.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


QUANTIZED = {
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}
PARTS = {"awq": "qweight", "gptq": "qweight", "bitsandbytes": "weight.absmax", "compressed-tensors": "weight_packed"}


@pytest.mark.parametrize("says_so", [True, False], ids=["config.json says so", "only its weights tell"])
@pytest.mark.parametrize("part", ["model", "base"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_weights_that_are_stored_quantized(tmp_path, method, part, says_so):
    model = folders.write_v15(tmp_path)
    save_base(model, tmp_path / "base")
    folders.write_config(tmp_path / "projector", model, vision_tower="../tower", text="llama")
    folder = tmp_path / {"model": "checkpoint", "base": "base"}[part]
    if says_so:
        change_config(folder, quantization_config=QUANTIZED[method])
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    weights[f"model.layers.0.self_attn.q_proj.{PARTS[method]}"] = torch.ones(4, 4, dtype=torch.int32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = (folder, {}) if part == "model" else (tmp_path / "projector", {"base_model": str(folder)})
    with pytest.raises(ValueError, match=rf"got .*{folder.name}, whose weights are stored quantized .*unquantized"):
        AutoModelForVision2Seq.from_pretrained(loaded[0], **loaded[1])


def test_the_layout_of_transformers_is_stored_quantized(tmp_path):
    tiny_model().save_pretrained(tmp_path, layout="transformers")
    change_config(tmp_path, quantization_config=QUANTIZED["awq"])
    with pytest.raises(ValueError, match=r"stored quantized \(awq\)"):
        AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("loader", [AutoModelForVision2Seq, AnyLlavaForConditionalGeneration])
def test_bits_as_transformers_4_took_them(stored, bits, loader):
    with pytest.raises(ValueError, match=rf"got {bits}=True; expected quantization_config=.* or quantization="):
        loader.from_pretrained(stored, **{bits: True})
    loader.from_pretrained(stored, **{bits: False})


@pytest.mark.parametrize(
    "name, reason",
    [
        ("/home/you/towers/mine", "there is no folder '/home/you/towers/mine' on this machine"),
        ("../../towers/mine", "there is no folder '../../towers/mine' on this machine"),
        ("nobody/no-such-tower", "nor in the cache of the Hub, and HF_HUB_OFFLINE forbids to ask"),
        ("mine", "nor in the cache of the Hub, and HF_HUB_OFFLINE forbids to ask"),
    ],
)
@pytest.mark.parametrize("loader", [AutoModelForVision2Seq, AutoProcessor])
def test_a_tower_that_is_not_here(checkpoint, tmp_path, name, reason, loader):
    change_config(checkpoint, mm_vision_tower=name)
    with pytest.raises(ValueError, match=rf"got vision tower '{name}', .*vision_tower= .*{reason}") as error:
        loader.from_pretrained(checkpoint)
    assert "without weights" not in str(error.value)
    loader.from_pretrained(checkpoint, vision_tower=str(tmp_path / "tower"))
    loader.from_pretrained(checkpoint, vision_tower=tmp_path / "tower")


def test_a_tower_that_is_not_here_on_the_command_line(checkpoint, tmp_path, capsys):
    change_config(checkpoint, mm_vision_tower="/home/you/towers/mine")
    arguments = ["ask", "spaces_demo/examples/twemoji-bus.png", "What?", "--model", str(checkpoint)]
    assert main([*arguments, "--max-new-tokens", "1"]) == 2
    assert "or as --vision-tower: there is no folder" in capsys.readouterr().err
    assert main([*arguments, "--max-new-tokens", "1", "--vision-tower", str(tmp_path / "tower")]) == 0


def test_a_tower_inside_a_checkpoint_under_somebodys_path(tmp_path):
    tower = folders.make_tower("clip")
    folders.save_tower(tower, tmp_path / "tower")
    model = folders.make_model(tower)
    folders.write_config(tmp_path / "checkpoint", model, vision_tower="/home/you/towers/mine", text="llama")
    folders.write_sentencepiece(tmp_path / "checkpoint")
    folders.write_safetensors(tmp_path / "checkpoint", folders.original_weights(model, tower))
    (tmp_path / "tower" / "model.safetensors").unlink()
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint", vision_tower=str(tmp_path / "tower"))
    inputs = folders.example_inputs(model)
    assert torch.equal(folders.logits_of(loaded, inputs), folders.logits_of(model, inputs))


def test_a_known_tower_under_somebodys_path(checkpoint):
    change_config(checkpoint, mm_vision_tower="/home/you/clip-vit-large-patch14-336", mm_hidden_size=1024)
    assert AutoProcessor.from_pretrained(checkpoint).image_processor.tile_size == 336


UNREACHABLE = """
import sys
from modeling_llava.cli import main
sys.exit(main(["ask", "spaces_demo/examples/twemoji-bus.png", "What?", "--model", sys.argv[1]]))
"""


@pytest.mark.parametrize("name", ["the tower", "the model"])
def test_the_hub_is_asked_once(checkpoint, name):
    change_config(checkpoint, mm_vision_tower="nobody/no-such-tower")
    model = str(checkpoint) if name == "the tower" else "nobody/no-such-model"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", UNREACHABLE, model],
            env=environment | {"HF_ENDPOINT": endpoint, "HF_HOME": str(checkpoint / "hub")},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("llava: got ")
    assert "Traceback" not in result.stderr and "Retrying" not in result.stderr
    assert f"nor in the cache of the Hub, and {endpoint} cannot be reached" in result.stderr
    assert time.monotonic() - start < 90


@pytest.mark.parametrize(
    "fields, pattern",
    [
        ({"mm_vision_tower": None}, "with mm_vision_tower=None"),
        ({"mm_vision_tower": "/home/you/mine"}, "got vision tower '/home/you/mine'"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio='highres'"),
    ],
)
def test_a_refusal_is_no_tokenizer(checkpoint, fields, pattern):
    change_config(checkpoint, **fields)
    with pytest.raises(ValueError, match=pattern):
        AutoProcessor.from_pretrained(checkpoint)
