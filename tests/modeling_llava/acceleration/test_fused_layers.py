"""Fused norms: the outputs, names and gradients of transformers' norms, in one kernel."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from modeling_llava.acceleration.fused_layers import RMS_NORMS, Columns, fuse_norms
from modeling_llava.inference.loading import load_for_inference, prepare_for_answering
from tests.tiny import save_tiny_checkpoint, text_ids, tiny_model


def list_norms(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, (nn.RMSNorm, *RMS_NORMS))]


def compute(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.tensor([text_ids(30)])
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return outputs.logits, gradients


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_gradients_and_names_stay(text):
    model, fused = tiny_model(text), tiny_model(text)
    for norm in (module for one in (model, fused) for module in one.modules() if isinstance(module, RMS_NORMS)):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    fuse_norms(fused.model.language_model)
    assert set(list_norms(fused)) == {nn.RMSNorm}
    assert len(list_norms(fused)) == len(list_norms(model)) >= 5
    assert not any(module.training for module in fused.modules())
    assert list(fused.state_dict()) == list(model.state_dict())
    logits, gradients = compute(fused)
    expected_logits, expected_gradients = compute(model)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_in_16_bits_it_is_nearer_to_32_bits():
    torch.manual_seed(0)
    norm = nn.Sequential(tiny_model().model.language_model.norm)
    nn.init.normal_(norm[0].weight)
    norm.bfloat16()
    hidden = torch.randn(64, 32).bfloat16()
    theirs = norm(hidden).float()
    fuse_norms(norm)
    ours = norm(hidden).float()
    exact = norm.float()(hidden.float())
    assert (ours - exact).abs().mean() < 0.9 * (theirs - exact).abs().mean()


def test_norms_of_another_kind_stay():
    gemma = tiny_model("gemma")
    before = [type(module) for module in gemma.modules()]
    fuse_norms(gemma)
    assert [type(module) for module in gemma.modules()] == before


@pytest.mark.parametrize("device, is_fused", [("meta", True), ("cpu", False)])
def test_models_that_do_not_answer_on_a_cpu_are_fused(tmp_path, device, is_fused):
    save_tiny_checkpoint(tmp_path)
    model, _ = load_for_inference(str(tmp_path), device=device)
    assert model.device == torch.device(device)
    assert (nn.RMSNorm in list_norms(model)) == is_fused
    assert any(isinstance(module, Columns) for module in model.modules()) == is_fused


def test_fusing_keeps_tokens():
    model = tiny_model("qwen3")
    expected = model.generate(torch.tensor([text_ids(30)]), max_new_tokens=8, do_sample=False)
    prepare_for_answering(model, torch.device("cuda"))
    assert model.generate(torch.tensor([text_ids(30)]), max_new_tokens=8, do_sample=False).equal(expected)


def test_projections_with_an_adapter_stay():
    model = tiny_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    prepare_for_answering(model, torch.device("cuda"))
    assert nn.RMSNorm in list_norms(model)
    assert not any(isinstance(module, Columns) for module in model.modules())
