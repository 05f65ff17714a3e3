"""A base under a checkpoint: added to a delta, put under a LoRA or projector, refused for a complete model."""

import pytest
import torch

from modeling_llava import AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from modeling_llava.cli import main
from modeling_llava.inference.loading import load_for_inference
from tests import original_folders as folders
from tests.modeling_llava.checkpoints.test_original_adapters import projector_weights, with_added, write_lora
from tests.modeling_llava.conftest import save_base

PICTURE = "spaces_demo/examples/twemoji-bus.png"


def write_parts(folder):
    """A complete v1.5 model in `checkpoint`, the language model that it was made from in `base`; returns the model."""
    model = folders.write_v15(folder)
    save_base(model, folder / "base")
    return model


def write_delta(folder, model, *, change: float = 1e-3) -> None:
    """`delta`: what a fine-tune changed, norms included, with its own projector."""
    weights = folders.original_weights(model)
    generator = torch.Generator().manual_seed(5)
    for key, value in weights.items():
        if "mm_projector" not in key:
            weights[key] = change * torch.randn(value.shape, generator=generator)
    folders.write_config(folder / "delta", model, vision_tower="../tower", text="llama")
    folders.write_sentencepiece(folder / "delta")
    folders.write_safetensors(folder / "delta", weights)


DOORS = {
    "AutoModelForVision2Seq": AutoModelForVision2Seq.from_pretrained,
    "AnyLlavaForConditionalGeneration": AnyLlavaForConditionalGeneration.from_pretrained,
    "load_for_inference": lambda name, base_model: load_for_inference(str(name), base_model=str(base_model))[0],
}
COMMANDS = {
    "ask": lambda name, out: ["ask", PICTURE, "What?", "--model", name, "--max-new-tokens", "1"],
    "chat": lambda name, out: ["chat", "--model", name],
    "merge": lambda name, out: ["merge", name, "--out", out],
}


@pytest.mark.parametrize("base", ["base", "checkpoint"])
@pytest.mark.parametrize("door", DOORS)
def test_a_complete_model_takes_no_base(tmp_path, door, base):
    write_parts(tmp_path)
    with pytest.raises(ValueError, match=r"got base_model='.*; expected .*: leave (it|base_model) out"):
        DOORS[door](tmp_path / "checkpoint", base_model=tmp_path / base)


def test_a_fine_tuned_model_takes_no_base(tmp_path):
    """Its norms are near those of the base, no longer equal."""
    model = write_parts(tmp_path)
    weights = folders.original_weights(model)
    folders.write_safetensors(tmp_path / "checkpoint", {key: value * 1.05 for key, value in weights.items()})
    with pytest.raises(ValueError, match="which is a complete model"):
        AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint", base_model=str(tmp_path / "base"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_complete_model_takes_no_base_on_the_command_line(tmp_path, capsys, command):
    write_parts(tmp_path)
    arguments = COMMANDS[command](str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    assert main([*arguments, "--base-model", str(tmp_path / "base")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("llava: got base_model=") and last.endswith("leave base_model out")


@pytest.mark.parametrize("door", DOORS)
def test_a_delta_is_added_to_its_base(tmp_path, door):
    model = write_parts(tmp_path)
    write_delta(tmp_path, model)
    loaded = DOORS[door](tmp_path / "delta", base_model=tmp_path / "base")
    inputs = folders.example_inputs(model)
    found, plain = folders.logits_of(loaded, inputs), folders.logits_of(model, inputs)
    assert 0 < (found - plain).abs().max() < 0.5


def test_a_delta_without_its_base(tmp_path):
    write_delta(tmp_path, write_parts(tmp_path))
    with pytest.raises(ValueError, match=r"a delta \(its norm weights are near 0\), without its base"):
        AutoModelForVision2Seq.from_pretrained(tmp_path / "delta")
    AutoModelForVision2Seq.from_pretrained(tmp_path / "delta", delta=False)


def test_norms_that_do_not_tell(tmp_path):
    model = write_parts(tmp_path)
    write_delta(tmp_path, model)
    weights = folders.original_weights(model)
    folders.write_safetensors(tmp_path / "delta", {key: value / 2 for key, value in weights.items()})
    base = {"base_model": str(tmp_path / "base")}
    with pytest.raises(ValueError, match="do not tell whether it is a complete model or a delta.*delta=True"):
        AutoModelForVision2Seq.from_pretrained(tmp_path / "delta", **base)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "delta", delta=True, **base)
    embeddings = model.get_input_embeddings().weight
    torch.testing.assert_close(loaded.get_input_embeddings().weight, embeddings * 1.5)
    with pytest.raises(ValueError, match="which is a complete model"):
        AutoModelForVision2Seq.from_pretrained(tmp_path / "delta", delta=False, **base)


@pytest.mark.parametrize("kind", ["lora", "projector"])
@pytest.mark.parametrize("base", ["base", "checkpoint"])
def test_what_needs_a_base_gets_it(tmp_path, kind, base):
    """The base may be a language model or a complete LLaVA."""
    model = write_parts(tmp_path)
    folders.write_config(tmp_path / "result", model, vision_tower="../tower", text="llama")
    if kind == "lora":
        model = with_added(model, write_lora(tmp_path / "result", model, base="../nowhere"))
    else:
        torch.save(projector_weights(model), tmp_path / "result" / "mm_projector.bin")
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "result", base_model=str(tmp_path / base))
    inputs = folders.example_inputs(model)
    torch.testing.assert_close(
        folders.logits_of(loaded, inputs), folders.logits_of(model, inputs), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="delta=True for .*, which holds no language model"):
        AutoModelForVision2Seq.from_pretrained(tmp_path / "result", base_model=str(tmp_path / base), delta=True)


def test_a_base_that_is_not_there(tmp_path):
    model = write_parts(tmp_path)
    folders.write_config(tmp_path / "result", model, vision_tower="../tower", text="llama")
    write_lora(tmp_path / "result", model)
    with pytest.raises(ValueError, match="got '/no/such/folder' .*there is no folder"):
        AutoModelForVision2Seq.from_pretrained(tmp_path / "result", base_model="/no/such/folder")


@pytest.mark.parametrize("layout", ["any_llava", "transformers"])
@pytest.mark.parametrize("part", [{"base_model": "x"}, {"vision_tower": "x"}, {"delta": True}], ids=str)
@pytest.mark.parametrize("loader", [AutoModelForVision2Seq, AnyLlavaForConditionalGeneration])
def test_other_layouts_have_all_their_parts(tmp_path, layout, part, loader):
    write_parts(tmp_path).save_pretrained(tmp_path / "saved", layout=layout)
    with pytest.raises(ValueError, match=f"got {next(iter(part))}=.*leave it out"):
        loader.from_pretrained(tmp_path / "saved", **part)


def test_merging_a_model_without_an_adapter(tmp_path, capsys):
    write_parts(tmp_path)
    assert main(["merge", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]) == 2
    assert "a complete model without an adapter" in capsys.readouterr().err
