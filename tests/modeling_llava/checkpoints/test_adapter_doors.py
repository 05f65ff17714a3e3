"""Every door through which an adapter enters: it is applied whole, or refused in a sentence that names the weight."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from modeling_llava import AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from modeling_llava.cli import main
from modeling_llava.inference.loading import load_for_inference
from processing_llava import AnyLlavaProcessor
from spaces_demo.models import ModelMenu
from tests import original_folders as folders
from tests.modeling_llava.checkpoints.test_original_adapters import projector_weights, with_added, write_lora
from tests.tiny import save_tiny_checkpoint, tiny_processor

PICTURE = "spaces_demo/examples/twemoji-bus.png"
OF_TRANSFORMERS = {
    "AutoModelForVision2Seq": lambda path, base: AutoModelForVision2Seq.from_pretrained(path),
    "AutoModelForVision2Seq, base_model": lambda path, base: AutoModelForVision2Seq.from_pretrained(
        path, base_model=str(base)
    ),
    "AnyLlavaForConditionalGeneration": lambda path, base: AnyLlavaForConditionalGeneration.from_pretrained(path),
    "AutoModelForImageTextToText": lambda path, base: AutoModelForImageTextToText.from_pretrained(path),
    "load_adapter": lambda path, base: load_adapter(path, base),
    "load_for_inference": lambda path, base: load_for_inference(str(path))[0],
    "ModelMenu": lambda path, base: load_in_demo(path),
}


def load_adapter(path, base):
    model = AutoModelForVision2Seq.from_pretrained(base)
    model.load_adapter(str(path))
    return model


def load_in_demo(path):
    menu = ModelMenu([str(path)], device="cpu")
    return menu.load(menu.labels[0]).model


def load_with_peft(path, base):
    return PeftModel.from_pretrained(AutoModelForVision2Seq.from_pretrained(base), str(path))


def load_second_with_peft(path, base):
    model = load_with_peft(base.parent / "plain", base)
    model.load_adapter(str(path), "second")
    model.set_adapter("second")
    return model


DOORS = OF_TRANSFORMERS | {"PeftModel": load_with_peft, "PeftModel.load_adapter": load_second_with_peft}


def command(name: str, path: Path, out: Path) -> list[str]:
    return {
        "merge": ["merge", str(path), "--out", str(out)],
        "ask": ["ask", PICTURE, "What?", "--model", str(path), "--max-new-tokens", "1"],
        "export": ["export", str(path), "--out", str(out), "--repo-id", "me/adapter", "--license", "apache-2.0"],
    }[name] + (["--base-model", "me/base"] if name == "export" else [])


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """`start` in our layout, `adapter` of PEFT with its projector and processor, and `plain` without."""
    folder = tmp_path_factory.mktemp("ours")
    save_tiny_checkpoint(folder / "start")
    model = AutoModelForVision2Seq.from_pretrained(folder / "start")
    settings = LoraConfig(
        target_modules=r"model\.language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["mm_projector"],
        init_lora_weights=False,
    )
    get_peft_model(model, settings).save_pretrained(folder / "adapter")
    tiny_processor().save_pretrained(folder / "adapter")
    save_kind("LoRA", folder / "start", folder / "plain")
    return folder


def without(words: str):
    return lambda weights: {key: value for key, value in weights.items() if words not in key}


FAULTS = {
    "nothing fits": lambda weights: {key.replace("layers.", "stack."): value for key, value in weights.items()},
    "a weight too many": lambda weights: weights | {f"{LAYER}.7.self_attn.q_proj.lora_A.weight": torch.ones(8, 32)},
    "a weight too few": without("layers.1.self_attn.q_proj.lora_B"),
    "a layer too few": without("layers.1.self_attn.q_proj"),
    "no projector": without("mm_projector"),
    "no weight": lambda weights: {},
    "no prefix": lambda weights: {key.removeprefix(PEFT): value for key, value in weights.items()},
    "prefix of DataParallel": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "prefix of a compiled model": lambda weights: {f"_orig_mod.{key}": value for key, value in weights.items()},
    "another shape": lambda weights: {
        key: torch.cat([value, value]) if "layers.1.self_attn.q_proj.lora_B" in key else value
        for key, value in weights.items()
    },
}
PEFT = "base_model.model."
LAYER = "base_model.model.model.language_model.layers"


@pytest.fixture(params=FAULTS)
def faulty(request, ours, tmp_path) -> Path:
    folder = tmp_path / "faulty"
    folder.mkdir()
    for path in (ours / "adapter").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    weights = FAULTS[request.param](load_file(folder / "adapter_model.safetensors"))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


NOT_CORE = ("load_for_inference", "ModelMenu", "AutoModelForImageTextToText", "biases of its layers")
"""Slow doors, and biases that PEFT 0.20 does not save."""


def mark_core(names) -> list:
    return [pytest.param(name, marks=[] if name in NOT_CORE else pytest.mark.core) for name in names]


@pytest.mark.parametrize("door", mark_core(OF_TRANSFORMERS))
def test_an_adapter_that_does_not_fit(ours, faulty, door):
    words = "without .* weights|without a place|of shape|no linear layer|expected a name that begins"
    with pytest.raises(ValueError, match=words) as error:
        DOORS[door](faulty, ours / "start")
    assert "\n" not in str(error.value) and "faulty" in str(error.value)


@pytest.mark.core
@pytest.mark.parametrize("door", ["PeftModel", "PeftModel.load_adapter"])
def test_an_adapter_that_does_not_fit_with_peft(ours, faulty, door):
    """A missing module of `modules_to_save` is PEFT's KeyError, and a shape torch's RuntimeError."""
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        DOORS[door](faulty, ours / "start")


@pytest.mark.parametrize("name", ["merge", "ask", "export"])
def test_an_adapter_that_does_not_fit_on_the_command_line(faulty, tmp_path, capsys, name):
    assert main(command(name, faulty, tmp_path / "out")) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("llava: got ")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists() or name == "export"


def test_an_adapter_does_not_fit_a_class_of_transformers(ours, faulty, tmp_path):
    model = AutoModelForVision2Seq.from_pretrained(ours / "start")
    model.save_pretrained(tmp_path / "built_in", layout="transformers")
    with pytest.raises(ValueError):
        AutoModelForVision2Seq.from_pretrained(faulty, base_model=str(tmp_path / "built_in"))


@pytest.mark.core
def test_a_refused_adapter_leaves_the_model_as_it_was(ours, faulty):
    model = AutoModelForVision2Seq.from_pretrained(ours / "start")
    before = model.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(ValueError):
        model.load_adapter(str(faulty))
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    model.load_adapter(str(ours / "adapter"))


@pytest.mark.parametrize("door", mark_core(DOORS))
def test_an_adapter_that_fits(ours, door):
    ids = torch.tensor([[1, 5, 6]])
    expected = load_with_peft(ours / "adapter", ours / "start").eval()(ids).logits
    torch.testing.assert_close(DOORS[door](ours / "adapter", ours / "start").eval()(ids).logits, expected)


ATTENTION = r"model\.language_model\..*\.(q_proj|v_proj)"
KINDS = {
    "LoRA": LoraConfig(target_modules=ATTENTION),
    "DoRA": LoraConfig(target_modules=ATTENTION, use_dora=True),
    "all biases": LoraConfig(target_modules=["q_proj"], bias="all"),
    "biases of its layers": LoraConfig(target_modules=["q_proj"], bias="lora_only"),
    "ranks": LoraConfig(target_modules=ATTENTION, rank_pattern={"q_proj": 3}),
    "everything": LoraConfig(target_modules="all-linear"),
    "embeddings": LoraConfig(target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"]),
    "adapted embeddings": LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "tokens": LoraConfig(target_modules=ATTENTION, trainable_token_indices=[5, 6]),
    "IA3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
PARTS_OF_KIND = {
    "LoRA": ["lora_A", "lora_B"],
    "DoRA": ["lora_magnitude_vector", "lora_A"],
    "all biases": ["vision_tower.encoder.layers.0.mlp.fc1.bias", ".bias"],
    "biases of its layers": ["vision_tower.encoder.layers.0.self_attn.q_proj.base_layer.bias"],
    "embeddings": ["embed_tokens", "lm_head"],
    "adapted embeddings": ["lora_embedding_A"],
    "tokens": ["trainable_tokens"],
    "IA3": ["layers.1."],
}


def save_kind(kind: str, start: Path, folder: Path) -> torch.Tensor:
    """An adapter as PEFT saves it; returns the logits with it."""
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForVision2Seq.from_pretrained(start), copy.deepcopy(KINDS[kind])).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    adapted.save_pretrained(folder, save_embedding_layers=kind == "adapted embeddings")
    tiny_processor().save_pretrained(folder)
    return compute(adapted)


def compute(model) -> torch.Tensor:
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, *[model.config.image_token_id] * 16, 6, 7]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits


FAST_DOORS = ("AutoModelForVision2Seq", "load_adapter", "PeftModel", "PeftModel.load_adapter")


@pytest.mark.parametrize("kind", mark_core(KINDS))
def test_what_peft_saves_is_applied_at_every_door(ours, tmp_path, kind):
    expected = save_kind(kind, ours / "start", tmp_path / "adapter")
    # PEFT puts neither another kind nor biases beside an adapter.
    for door in FAST_DOORS[:3] if kind in ("IA3", "all biases", "biases of its layers") else FAST_DOORS:
        torch.testing.assert_close(compute(DOORS[door](tmp_path / "adapter", ours / "start")), expected)
    if kind != "tokens":
        assert main(command("merge", tmp_path / "adapter", tmp_path / "merged")) == 0
        merged = AutoModelForVision2Seq.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(compute(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", mark_core(PARTS_OF_KIND))
def test_a_missing_part_is_refused_at_every_door(ours, tmp_path, kind):
    save_kind(kind, ours / "start", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    for part in PARTS_OF_KIND[kind]:
        kept = without(part)(weights)
        assert kept.keys() != weights.keys()
        save_file(kept, path, metadata={"format": "pt"})
        for door in FAST_DOORS:
            with pytest.raises((ValueError, KeyError)):
                DOORS[door](tmp_path / "adapter", ours / "start")
    assert main(command("merge", tmp_path / "adapter", tmp_path / "merged")) == 2


@pytest.mark.parametrize("kind", ["all biases", "biases of its layers"])
def test_missing_biases_on_a_base_of_transformers_own_class(ours, tmp_path, kind):
    model = AutoModelForVision2Seq.from_pretrained(ours / "start")
    model.save_pretrained(tmp_path / "base", layout="transformers")
    tiny_processor().save_pretrained(tmp_path / "base")
    expected = save_kind(kind, tmp_path / "base", tmp_path / "adapter")
    assert main(command("merge", tmp_path / "adapter", tmp_path / "merged")) == 0
    merged = AutoModelForVision2Seq.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(compute(merged), expected, rtol=1e-4, atol=1e-4)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    kept = {key: value for key, value in weights.items() if not key.endswith(".bias")}
    assert kept.keys() != weights.keys()
    save_file(kept, path, metadata={"format": "pt"})
    assert main(command("merge", tmp_path / "adapter", tmp_path / "again")) == 2


def test_an_adapter_on_a_model_without_output_layer(ours, tmp_path):
    """`lm_head` apart, its names are those of the whole model without "model."."""
    save_kind("ranks", ours / "start", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": f"(model.)?{ATTENTION[7:]}"}))
    ids = torch.tensor([[1, 5, 6]])
    expected = load_with_peft(tmp_path / "adapter", ours / "start").base_model.model.model(ids).last_hidden_state
    loaded = AutoModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).last_hidden_state, expected)


@pytest.mark.core
@pytest.mark.parametrize("base", ["start", "built_in"])
def test_what_was_attached_is_saved_and_read_again(ours, tmp_path, base):
    """Also where transformers asks for a PEFT that is not published."""
    model = AutoModelForVision2Seq.from_pretrained(ours / "start")
    model.save_pretrained(tmp_path / "built_in", layout="transformers")
    base = {"start": ours / "start", "built_in": tmp_path / "built_in"}[base]
    save_kind("DoRA", ours / "start", tmp_path / "adapter")
    loaded = AnyLlavaForConditionalGeneration.from_pretrained(base)
    loaded.load_adapter(str(tmp_path / "adapter"))
    loaded.save_pretrained(tmp_path / "again")
    again = AnyLlavaForConditionalGeneration.from_pretrained(base)
    again.load_adapter(str(tmp_path / "again"))
    assert torch.equal(compute(again), compute(loaded))


@pytest.mark.core
@pytest.mark.parametrize("door", ["AutoModelForVision2Seq", "AnyLlavaForConditionalGeneration", "load_adapter"])
def test_without_peft(ours, monkeypatch, door):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="PEFT is not installed; expected it: pip install peft$") as error:
        DOORS[door](ours / "adapter", ours / "start")
    assert type(error.value) is ImportError


@pytest.fixture
def original(tmp_path):
    """A complete LLaVA in `checkpoint` and `checkpoint-200` as its LoRA training leaves one: without config.json."""
    model = folders.write_v15(tmp_path)
    (tmp_path / "checkpoint-200").mkdir()
    added = write_lora(tmp_path / "checkpoint-200", model, base=str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint-200" / "non_lora_trainables.bin").unlink()
    return tmp_path, model, added


@pytest.mark.parametrize("door", OF_TRANSFORMERS)
def test_a_checkpoint_of_the_originals_training(original, door, caplog):
    folder, model, added = original
    inputs = folders.example_inputs(model)
    plain = folders.logits_of(model, inputs)
    expected = folders.logits_of(with_added(model, added), inputs)
    assert (expected - plain).abs().max() > 0.1
    loaded = DOORS[door](folder / "checkpoint-200", folder / "checkpoint").eval()
    torch.testing.assert_close(folders.logits_of(loaded, inputs), expected, rtol=1e-4, atol=1e-4)
    assert any("the projector is that of its base" in record.message for record in caplog.records)


def test_a_checkpoint_of_the_originals_training_with_peft(original):
    folder, _, _ = original
    with pytest.raises(ValueError, match=r"without 46 weights.*AutoModelForVision2Seq\.from_pretrained"):
        load_with_peft(folder / "checkpoint-200", folder / "checkpoint")


def test_a_checkpoint_with_its_projector(original):
    folder, model, added = original
    parts = {f"base_model.model.{key}": value + 1 for key, value in projector_weights(model).items()}
    torch.save(parts, folder / "checkpoint-200" / "non_lora_trainables.bin")
    loaded = AutoModelForVision2Seq.from_pretrained(folder / "checkpoint-200")
    assert torch.equal(loaded.model.mm_projector[0].weight, model.model.mm_projector[0].weight + 1)
    torch.save({"base_model.model.model.mm_projector.0.weight": torch.ones(3, 3)}, folder / "checkpoint-200" / PARTS)
    with pytest.raises(ValueError, match=r"mm_projector\.0\.weight of shape \[3, 3\] in .*non_lora_trainables\.bin"):
        AutoModelForVision2Seq.from_pretrained(folder / "checkpoint-200")


PARTS = "non_lora_trainables.bin"


def test_a_checkpoint_names_its_base_relative_to_itself(original):
    folder, model, _ = original
    path = folder / "checkpoint-200" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../checkpoint"}))
    AutoModelForVision2Seq.from_pretrained(folder / "checkpoint-200")
    assert type(AutoProcessor.from_pretrained(folder / "checkpoint-200")) is AnyLlavaProcessor
    assert type(AnyLlavaProcessor.from_pretrained(folder / "checkpoint-200")) is AnyLlavaProcessor
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="without base_model_name_or_path; expected base_model="):
        AutoModelForVision2Seq.from_pretrained(folder / "checkpoint-200")


@pytest.mark.parametrize("name", ["merge", "ask"])
def test_a_checkpoint_of_the_originals_training_on_the_command_line(original, name, capsys):
    folder, model, added = original
    assert main(command(name, folder / "checkpoint-200", folder / "out")) == 0
    if name == "merge":
        inputs = folders.example_inputs(model)
        found = folders.logits_of(AutoModelForVision2Seq.from_pretrained(folder / "out"), inputs)
        expected = folders.logits_of(with_added(model, added), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("words", ["layers.1.self_attn.q_proj.lora_B", "layers.1.self_attn.q_proj", "layers.1."])
@pytest.mark.parametrize("has_config", [False, True])
def test_a_part_of_an_originals_adapter_is_missing(original, words, has_config):
    folder, model, _ = original
    path = folder / "checkpoint-200" / "adapter_model.bin"
    torch.save(without(words)(torch.load(path)), path)
    if has_config:
        folders.write_config(folder / "checkpoint-200", model, vision_tower="../tower", text="llama")
    with pytest.raises(ValueError, match=r"got adapter .*checkpoint-200 without lora_[AB]\.weight of model\.language"):
        AutoModelForVision2Seq.from_pretrained(folder / "checkpoint-200")
