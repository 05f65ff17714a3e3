"""load_for_inference: where models go, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference
from tests.modeling_llava.inference.session_models import build_transformers_own
from tests.tiny import save_tiny_checkpoint, tiny_processor


@pytest.mark.parametrize(
    "device, message",
    [("gpu", "got device='gpu'; expected cpu, or cuda:N"), ("cuda", "expected cpu, or cuda:N below the 0 GPUs")],
)
def test_a_device_that_is_not_there_is_refused(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        load_for_inference(device=device)


def test_an_adapter_says_which_base_was_not_found(tmp_path, monkeypatch):
    save_tiny_checkpoint(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = AnyLlavaForConditionalGeneration.from_pretrained("base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    tiny_processor().save_pretrained("adapter")
    load_for_inference(str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path / "adapter")
    with pytest.raises(ValueError, match="it is an adapter of 'base', to be found from"):
        load_for_inference(str(tmp_path / "adapter"))


def test_visual_tokens_of_a_checkpoint_of_transformers(tmp_path):
    for part in build_transformers_own():
        part.save_pretrained(tmp_path)
    model, processor = load_for_inference(str(tmp_path), visual_tokens=4)
    assert (model.config.visual_tokens, processor.visual_tokens) == (4, 4)


def test_loading_goes_where_it_is_told():
    model, _ = load_for_inference(EMBEDDED_MODEL, device="cpu")
    assert (type(model), model.device.type, model.dtype) == (AnyLlavaForConditionalGeneration, "cpu", torch.float32)
    assert not model.training
