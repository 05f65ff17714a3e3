"""Packed weights: the results of linear layers, for answering on a CPU."""

from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.acceleration import cpu_layers
from modeling_llava.acceleration.cpu_layers import PackedLinear, pack_linear_layers
from modeling_llava.acceleration.devices import is_slow_on_cpu
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference
from tests.tiny import TEXT_CONFIGS, batch, random_images, save_tiny_checkpoint, text_ids, tiny_model, tiny_processor

if not torch.backends.mkldnn.is_available():
    pytest.skip("needs a PyTorch with oneDNN", allow_module_level=True)


@pytest.fixture(autouse=True)
def pack_small_layers(monkeypatch):
    monkeypatch.setattr(cpu_layers, "SMALLEST_WEIGHT", 1)


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def logits_of(model) -> torch.Tensor:
    image = [model.config.image_token_id] * 16
    rows = batch([[1, *image, *text_ids(20)], [1, *text_ids(9)]])
    pixels = random_images(1).to(model.dtype)
    return model(**rows, pixel_values=pixels).logits[rows["attention_mask"].bool()].float().detach()


@pytest.mark.parametrize("text", TEXT_CONFIGS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_language_model_computes_the_same(text, dtype, tolerance):
    if is_slow_on_cpu(dtype):
        pytest.skip("needs a CPU with units for bfloat16")
    model = tiny_model(text)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.to(dtype)
    expected = logits_of(model)
    size, num_parameters = sum(tensor.nbytes for tensor in model.state_dict().values()), model.num_parameters()
    pack_linear_layers(model)
    assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == (
        ["lm_head"] if model.config.tie_word_embeddings else []
    )
    error = (logits_of(model) - expected).abs().max() / expected.abs().max()
    assert error < tolerance
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == size
    assert model.num_parameters() == num_parameters


def test_an_output_layer_that_is_tied_stays_tied():
    model = tiny_model("qwen2")
    expected = logits_of(model)
    pack_linear_layers(model)
    assert is_packed(model.model.language_model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(model), expected)


def test_loading_for_inference_packs_and_lets_go_of_the_file(tmp_path):
    save_tiny_checkpoint(tmp_path)
    model, processor = load_for_inference(str(tmp_path), device="cpu")
    assert is_packed(model.model.vision_tower) and is_packed(model.model.language_model)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert isinstance("".join(ChatSession(model, processor).ask("What is this?", max_new_tokens=3)), str)
    assert not is_packed(AnyLlavaForConditionalGeneration.from_pretrained(tmp_path))


def test_small_layers_stay_as_they_are(monkeypatch):
    monkeypatch.undo()
    model = tiny_model()
    pack_linear_layers(model)
    assert not is_packed(model)


def test_a_model_with_an_adapter_stays_as_it_is():
    from peft import LoraConfig

    model = tiny_model()
    model.add_adapter(LoraConfig(target_modules=r"model\.language_model\..*q_proj"))
    pack_linear_layers(model)
    assert not is_packed(model)


def test_what_answering_does_not_need_is_refused(tmp_path):
    processor = tiny_processor()
    model = tiny_model(image_token_id=processor.image_token_id)
    pack_linear_layers(model)
    with pytest.raises(ValueError, match="got a model whose weights are fused, packed or in int8"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="leave compile out"):
        ChatSession(model, processor, compile=True)
    embeds = torch.zeros(1, 3, model.config.text_config.hidden_size, requires_grad=True)
    with pytest.raises(ValueError, match="expected answers only"):
        model(inputs_embeds=embeds)


def test_the_embedded_model_gives_the_same_answers():
    packed, processor = load_for_inference(EMBEDDED_MODEL, device="cpu")
    plain = AnyLlavaForConditionalGeneration.from_pretrained(EMBEDDED_MODEL).eval()
    pictures = sorted((Path(EMBEDDED_MODEL).parents[2] / "spaces_demo" / "examples").glob("*.[pj]*g"))
    assert pictures
    for picture in pictures:
        answers = [
            "".join(ChatSession(model, processor).ask("What is this?", images=[picture])) for model in (packed, plain)
        ]
        assert answers[0] == answers[1]
