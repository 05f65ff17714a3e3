"""`llava export --for vllm`: base and LoRA apart compute the same, and what vLLM refuses is refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from modeling_llava import AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from modeling_llava.cli import main
from tests.modeling_llava.export.conftest import train_tiny
from tests.modeling_llava.export.test_merged_adapter import save_wide_checkpoint
from tests.original_folders import example_inputs, logits_of
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LoRA alone, of a tiny model, with its processor."""
    folder = tmp_path_factory.mktemp("plain")
    save_tiny_checkpoint(folder / "start")
    model = AnyLlavaForConditionalGeneration.from_pretrained(folder / "start")
    names = [f"model.language_model.layers.{layer}.self_attn.k_proj" for layer in range(2)]
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(folder / "adapter")
    AutoProcessor.from_pretrained(folder / "start").save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("name", ["adapter", "plain"])
def test_base_and_lora_apart_compute_the_same(name, tmp_path, capsys, request):
    source, out = request.getfixturevalue(name), tmp_path / "split"
    assert main(["export", str(source), "--out", str(out), "--for", "vllm"]) == 0
    printed = capsys.readouterr().out
    assert "adapter/adapter_model.safetensors" in printed and "--max-lora-rank 8 --lora-modules NAME=" in printed
    names = load_file(out / "adapter" / "adapter_model.safetensors").keys()
    assert names and all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none"

    whole = AutoModelForVision2Seq.from_pretrained(source)
    base = AnyLlavaForConditionalGeneration.from_pretrained(out / "base")
    inputs = example_inputs(base)
    without = logits_of(base, inputs)
    apart = PeftModel.from_pretrained(base, out / "adapter")
    expected = logits_of(whole, inputs)
    assert torch.equal(logits_of(apart, inputs), expected)
    assert not torch.equal(without, expected)
    # The same pair by the adapter's own word for its base.
    assert torch.equal(logits_of(AutoModelForVision2Seq.from_pretrained(out / "adapter"), inputs), expected)
    AutoProcessor.from_pretrained(out / "adapter")


def test_a_4_bit_base_is_written_as_it_was_rounded(workspace, tmp_path):
    pytest.importorskip("bitsandbytes")
    start = save_wide_checkpoint(tmp_path / "start")
    lora = {"r": 4, "lora_alpha": 8}
    adapter = train_tiny(workspace, "qlora", model=str(start), lora=lora, output_dir=str(tmp_path / "adapter"))
    assert main(["export", str(adapter), "--out", str(tmp_path / "out"), "--for", "vllm"]) == 0
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForVision2Seq.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    apart = AutoModelForVision2Seq.from_pretrained(tmp_path / "out" / "adapter", dtype=torch.float32)
    inputs = example_inputs(merged)
    expected = logits_of(merged, inputs)
    # The merged model was rounded to 16 bits once more.
    torch.testing.assert_close(logits_of(apart, inputs), expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("base", ["someone/nothing", "nowhere"])
def test_a_base_that_is_not_there(base, plain, tmp_path, capsys):
    arguments = ["export", str(plain), "--out", str(tmp_path / "out"), "--for", "vllm", "--base-model", base]
    assert main(arguments) == 2
    assert f"llava: {base} is neither a folder nor" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_no_base(plain, tmp_path, capsys):
    changed = change_adapter(plain, tmp_path / "changed", {"base_model_name_or_path": None})
    assert main(["export", str(changed), "--out", str(tmp_path / "out"), "--for", "vllm"]) == 2
    assert "expected a base: give --base-model" in capsys.readouterr().err


def test_another_base(plain, tmp_path):
    shutil.copytree(plain.parent / "start", tmp_path / "base")
    arguments = ["export", str(plain), "--out", str(tmp_path / "out"), "--for", "vllm"]
    assert main([*arguments, "--base-model", str(tmp_path / "base")]) == 0


FIELDS = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [1],
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "fan_in_fan_out": True,
    "use_qalora": True,
}


def change_adapter(source, folder, fields=(), weights=None):
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    base = str(source.parent / "start")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base} | dict(fields)))
    if weights:
        tensors = load_file(folder / "adapter_model.safetensors") | weights
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("field", FIELDS)
def test_what_vllm_refuses_is_refused_by_field(field, plain, tmp_path, capsys):
    task = {"task_type": "CAUSAL_LM"}  # PEFT warns of aLoRA for any other
    changed = change_adapter(plain, tmp_path / "changed", task | {field: FIELDS[field]})
    assert main(["export", str(changed), "--out", str(tmp_path / "out"), "--for", "vllm"]) == 2
    error = capsys.readouterr().err
    assert f"got {field}={FIELDS[field]!r} in {changed}/adapter_config.json" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "weight",
    [
        "model.mm_projector.0.lora_A.weight",
        "model.vision_tower.encoder.layers.0.self_attn.k_proj.lora_B.weight",
        "model.language_model.embed_tokens.lora_embedding_A",
        "model.language_model.layers.0.self_attn.k_proj.lora_magnitude_vector",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.self_attn.k_proj.bias",
        "lm_head.lora_A.weight",
        "lm_head.weight",
    ],
)
def test_what_is_no_lora_of_the_language_model_is_refused_by_name(weight, plain, tmp_path, capsys):
    changed = change_adapter(plain, tmp_path / "changed", weights={f"base_model.model.{weight}": torch.zeros(4, 4)})
    assert main(["export", str(changed), "--out", str(tmp_path / "out"), "--for", "vllm"]) == 2
    assert f"got {weight} in " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base(plain, tmp_path, capsys):
    save_tiny_checkpoint(tmp_path / "base", text="mistral")
    arguments = ["export", str(plain), "--out", str(tmp_path / "out"), "--for", "vllm"]
    assert main([*arguments, "--base-model", str(tmp_path / "base")]) == 2
    assert "this weight belongs to another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--for", "sglang"], "got --for sglang; expected vllm"),
        (["--for", "vllm", "--layout", "original"], "got --layout with --for vllm"),
        (["--for", "vllm", "--layout", "gguf"], "got --layout gguf and --for vllm"),
        (["--for", "vllm", "--license", "mit"], "got --license with --for vllm"),
        (["--for", "vllm", "--quantize", "q8_0"], "got an option for GGUF files"),
        (["--for", "vllm", "--base-model", "a", "--base-model", "b"], "expected one base"),
    ],
)
def test_wrong_options(arguments, message, plain, tmp_path, capsys):
    assert main(["export", str(plain), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_is_no_adapter(plain, tmp_path, capsys):
    arguments = ["export", str(plain.parent / "start"), "--out", str(tmp_path / "out"), "--for", "vllm"]
    assert main(arguments) == 2
    assert "expected an adapter of PEFT" in capsys.readouterr().err
