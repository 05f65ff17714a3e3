"""What the original leaves behind when it does not train everything: LoRA folders, projectors, deltas."""

import importlib.metadata
import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from modeling_llava import AutoModelForVision2Seq
from tests import original_folders as folders
from tests.tiny import TEXT_CONFIGS

pytestmark = pytest.mark.core

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_lora(folder, model, *, base: str = "../base", targets=LORA_TARGETS, **settings) -> dict[str, torch.Tensor]:
    """The files of a LoRA run; returns what the adapter adds to each weight of ours."""
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": targets, **settings}
    adapter_config = {"base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "peft_type": "LORA"}
    adapter_config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "modules_to_save": None, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
    weights, added = {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, module in model.model.language_model.named_modules():
        if name.split(".")[-1] in targets:
            down = torch.randn(settings["r"], module.in_features, generator=generator)
            up = torch.randn(module.out_features, settings["r"], generator=generator)
            weights[f"base_model.model.model.{name}.lora_A.weight"] = down
            weights[f"base_model.model.model.{name}.lora_B.weight"] = up
            added[f"model.language_model.{name}.weight"] = up @ down * settings["lora_alpha"] / settings["r"]
    torch.save(weights, folder / "adapter_model.bin")
    trained = {f"base_model.model.{key}": value for key, value in projector_weights(model).items()}
    torch.save(trained, folder / "non_lora_trainables.bin")
    return added


def projector_weights(model) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if key.startswith("model.mm_projector.")}


def with_added(model, added: dict[str, torch.Tensor]):
    state = model.state_dict()
    for key, value in added.items():
        state[key] = state[key] + value
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("given_base", [True, False])
@pytest.mark.parametrize("merge_adapter", [True, False])
def test_lora(run, merge_adapter, given_base):
    folder, model = run
    added = write_lora(folder / "result", model, base="../nowhere" if given_base else "../base")
    base = {"base_model": str(folder / "base")} if given_base else {}
    loaded = AutoModelForVision2Seq.from_pretrained(folder / "result", merge_adapter=merge_adapter, **base)
    inputs = folders.example_inputs(model)
    plain = folders.logits_of(model, inputs)
    expected = folders.logits_of(with_added(model, added), inputs)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(folders.logits_of(loaded, inputs), expected, rtol=1e-4, atol=1e-4)
    has_adapter = any("lora_" in name for name, _ in loaded.named_parameters())
    assert has_adapter != merge_adapter
    assert not any("lora_" in name for name, _ in loaded.model.vision_tower.named_parameters())
    processor = AutoProcessor.from_pretrained(folder / "result", **base)
    assert processor.image_token_id == loaded.config.image_token_id


def test_kept_adapter_can_be_trained_on(run):
    folder, model = run
    write_lora(folder / "result", model)
    loaded = AutoModelForVision2Seq.from_pretrained(folder / "result", merge_adapter=False)
    if importlib.metadata.version("peft") < MIN_PEFT_VERSION:
        pytest.skip(f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION} before it does this")
    loaded.enable_adapters()
    inputs = folders.example_inputs(model)
    loaded.train()
    loaded(**inputs, labels=inputs["input_ids"].clamp(max=31999)).loss.backward()
    gradients = {name for name, parameter in loaded.named_parameters() if parameter.grad is not None}
    assert all(".language_model." in name for name in gradients if "lora_" in name)


def test_lora_over_a_complete_llava(run):
    """A LoRA that was trained on a finished LLaVA names that one as its base."""
    folder, model = run
    folders.write_config(folder / "base", model, vision_tower="../tower", text="llama")
    (folder / "base" / "model.safetensors").unlink()
    folders.write_safetensors(folder / "base", folders.original_weights(model))
    added = write_lora(folder / "result", model)
    loaded = AutoModelForVision2Seq.from_pretrained(folder / "result")
    inputs = folders.example_inputs(model)
    expected = folders.logits_of(with_added(model, added), inputs)
    torch.testing.assert_close(folders.logits_of(loaded, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_projector_alone(run, prefix):
    folder, model = run
    weights = {key.replace("model.", prefix, 1): value for key, value in projector_weights(model).items()}
    torch.save(weights, folder / "result" / "mm_projector.bin")
    loaded = AutoModelForVision2Seq.from_pretrained(folder / "result", base_model=str(folder / "base"))
    inputs = folders.example_inputs(model)
    assert torch.equal(folders.logits_of(loaded, inputs), folders.logits_of(model, inputs))
    with pytest.raises(ValueError, match="base_model="):
        AutoModelForVision2Seq.from_pretrained(folder / "result")


def test_projector_with_start_and_end_tokens(run):
    """Such a run stored the token embeddings too, which the base has fewer of."""
    folder, model = run
    fields = {"mm_use_im_start_end": True, "mm_use_im_patch_token": True, "vocab_size": 32003}
    folders.write_config(folder / "result", model, vision_tower="../tower", text="llama", **fields)
    embeddings = torch.cat([model.get_input_embeddings().weight, torch.randn(3, 32)]).detach()
    weights = projector_weights(model) | {"model.embed_tokens.weight": embeddings}
    torch.save(weights, folder / "result" / "mm_projector.bin")
    loaded = AutoModelForVision2Seq.from_pretrained(folder / "result", base_model=str(folder / "base"))
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
    mean = model.lm_head.weight.mean(dim=0)
    torch.testing.assert_close(loaded.lm_head.weight[-1], mean)
    assert loaded.config.image_token_id == 32003


def test_delta(run, caplog):
    """A delta may have more tokens than its base; those are its own."""
    folder, model = run
    tower = folders.make_tower("clip")
    target = folders.make_model(tower, vocab_size=32003, seed=7)
    base = folders.original_weights(model)
    delta = folders.original_weights(target)
    for key in delta:
        if key in base and "mm_projector" not in key and "inv_freq" not in key:
            delta[key] = delta[key].clone()
            delta[key][: len(base[key])] -= base[key]
    fields = {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}
    folders.write_config(folder / "delta", target, vision_tower="../tower", text="llama", **fields)
    folders.write_sentencepiece(folder / "delta", "<im_patch>", "<im_start>", "<im_end>")
    folders.write_torch_shards(folder / "delta", delta)
    loaded = AutoModelForVision2Seq.from_pretrained(folder / "delta", base_model=str(folder / "base"))
    for (name, found), expected in zip(loaded.named_parameters(), target.parameters()):
        torch.testing.assert_close(found, expected, msg=name)
    assert any("sum of the delta" in record.message for record in caplog.records)


def test_adapter_of_another_architecture(run):
    folder, model = run
    write_lora(folder / "result", model)
    path = folder / "result" / "adapter_model.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({key.replace("q_proj", "c_attn"): value for key, value in weights.items()}, path)
    with pytest.raises(ValueError, match=r"result without lora_A\.weight of .*q_proj; .* of another model"):
        AutoModelForVision2Seq.from_pretrained(folder / "result")


def test_adapter_of_another_size(run):
    folder, model = run
    write_lora(folder / "result", model)
    path = folder / "result" / "adapter_model.bin"
    weights = {key: torch.cat([value, value], dim=1) for key, value in torch.load(path, weights_only=True).items()}
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"lora_A\.weight of shape \[4, 96\] in .*model\.bin; expected \[4, 48\]"):
        AutoModelForVision2Seq.from_pretrained(folder / "result")


def test_wrong_base(run):
    folder, model = run
    write_lora(folder / "result", model)
    config = TEXT_CONFIGS["llama"]()
    config.vocab_size, config.hidden_size = 32000, 48
    LlamaForCausalLM(config).save_pretrained(folder / "other")
    folders.write_sentencepiece(folder / "other")
    with pytest.raises(
        ValueError, match=r"of shape \[\d+, 48\] in .*other.*; expected \[\d+, 32\]|\[48\] in .*\[32\]"
    ):
        AutoModelForVision2Seq.from_pretrained(folder / "result", base_model=str(folder / "other"))


def change_adapter(folder, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("merge_adapter", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"q_proj": 10**7}},
        {"r": 10**9},
        {"r": 64},
        {"r": "a"},
        {"lora_alpha": "a"},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_settings_that_are_not_those_of_the_weights(run, fields, merge_adapter):
    """Found before PEFT builds layers of that size, or matches without an end."""
    folder, model = run
    write_lora(folder / "result", model)
    change_adapter(folder / "result", **fields)
    with pytest.raises(ValueError, match="^got .*; expected "):
        AutoModelForVision2Seq.from_pretrained(folder / "result", merge_adapter=merge_adapter)


@pytest.mark.parametrize("merge_adapter", [True, False])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_pattern_that_python_would_match_without_an_end(run, field, merge_adapter):
    folder, model = run
    write_lora(folder / "result", model)
    change_adapter(folder / "result", **{field: "(.*)*(.*)*x"})
    AutoModelForVision2Seq.from_pretrained(folder / "result", merge_adapter=merge_adapter)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
@pytest.mark.parametrize("filename", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_integers_are_no_weights_of_an_adapter_or_a_projector(run, filename, dtype):
    folder, model = run
    write_lora(folder / "result", model)
    path = folder / "result" / filename
    torch.save({key: value.to(dtype) for key, value in torch.load(path).items()}, path)
    with pytest.raises(
        ValueError, match=rf"got .* in .*{filename}, of torch.{'int8' if dtype == torch.int8 else 'bool'}"
    ):
        AutoModelForVision2Seq.from_pretrained(folder / "result")


@pytest.mark.parametrize("over", ["a language model", "a complete LLaVA"])
def test_half_of_a_projector(run, over):
    """The other half would be that of the base, or another one."""
    folder, model = run
    write_lora(folder / "result", model)
    if over == "a complete LLaVA":
        (folder / "result" / "config.json").unlink()
        folders.write_safetensors(folder / "base", folders.original_weights(model))
        folders.write_config(folder / "base", model, vision_tower="../tower", text="llama")
    path = folder / "result" / "non_lora_trainables.bin"
    trained = torch.load(path)
    trained.pop("base_model.model.model.mm_projector.0.bias")
    torch.save(trained, path)
    with pytest.raises(ValueError, match=r"without 1 weights, model\.mm_projector\.0\.bias among them"):
        AutoModelForVision2Seq.from_pretrained(folder / "result")


def test_weights_that_are_no_numbers(run):
    folder, model = run
    write_lora(folder / "result", model)
    for filename in ("adapter_model.bin", "non_lora_trainables.bin"):
        path = folder / "result" / filename
        weights = torch.load(path)
        key = min(weights)
        torch.save(weights | {key: torch.full_like(weights[key], torch.nan)}, path)
        with pytest.raises(ValueError, match=rf"got {key} in .*{filename} with NaN"):
            AutoModelForVision2Seq.from_pretrained(folder / "result")
        torch.save(weights, path)


def test_peft_adapters_of_this_package_are_left_to_peft(run, tmp_path):
    folder, model = run
    model.save_pretrained(tmp_path / "full", layout="any_llava")
    peft_model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj"))
    peft_model.base_model.model.config.name_or_path = str(tmp_path / "full")
    peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "full")
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "adapter")
    assert any("lora_" in name for name, _ in loaded.named_parameters())
