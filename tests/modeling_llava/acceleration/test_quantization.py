"""`quantization=`: int8 on a CPU gives the answers of float32; what cannot run is refused in one line."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoProcessor

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.acceleration.cpu_layers import Int8Linear
from modeling_llava.acceleration.fused_layers import Columns, fuse_projections
from modeling_llava.acceleration.quantization import ON_GPU, quantize_to_int8, refuse_unchanged
from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference
from modeling_llava.tiny_llava.evaluate import evaluate
from tests.conftest import ROOT
from tests.tiny import TEXT_CONFIGS, batch, random_images, save_tiny_checkpoint, text_ids, tiny_model

HELDOUT = ROOT / "tests" / "heldout" / "questions.json"


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    image = [model.config.image_token_id] * 16
    rows = batch([[1, *image, *text_ids(20)], [1, *text_ids(9)]])
    return model(**rows, pixel_values=random_images(1)).logits[rows["attention_mask"].bool()]


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_fused_projections_compute_the_same(text):
    model = tiny_model(text)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    expected = logits_of(model)
    fuse_projections(model)
    # MPT has one matrix for all three already.
    assert any(isinstance(module, Columns) for module in model.modules()) == (text != "mpt")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_int8_stays_near_float32(text):
    model = tiny_model(text)
    expected = logits_of(model)
    quantize_to_int8(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears and not any("language_model" in name for name in linears)
    error = (logits_of(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_a_row_does_not_depend_on_the_rows_beside_it():
    torch.manual_seed(0)
    linear = Int8Linear(nn.Linear(64, 32))
    rows = torch.randn(4, 64)
    # A row whose largest element sets the scale of the kernel, whatever the others are.
    rows[:, 0], rows[:, 1] = 5, -5
    expected = linear(rows)
    rows[3] *= 1000
    torch.testing.assert_close(linear(rows)[:3], expected[:3])


def test_int8_linear_is_exact_to_its_rounding():
    torch.manual_seed(0)
    source = nn.Linear(256, 64)
    inputs = torch.randn(3, 5, 256) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    expected = source(inputs)
    int8 = Int8Linear(source)
    error = (int8(inputs) - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert error.max() < 0.03
    # More rows than are computed at once, of which each call has a scale of its own.
    rows = inputs.repeat(1, 150, 1)
    rows[..., 0], rows[..., 1] = rows.abs().amax(dim=-1), -rows.abs().amax(dim=-1)
    torch.testing.assert_close(int8(rows)[:, 500:505], int8(rows[:, 500:505]))


def count_right(**settings) -> tuple[int, int]:
    """Questions about the held-out pictures that are answered right, and all of them."""
    scores, _ = evaluate(*load_for_inference(EMBEDDED_MODEL, device="cpu", **settings), HELDOUT)
    return tuple(sum(score[key] for score in scores.values()) for key in ("correct", "total"))


@pytest.fixture(scope="module")
def right_in_float32() -> int:
    return count_right(dtype="float32")[0]


@pytest.mark.parametrize(
    "settings", [{"quantization": "int8"}, pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow)], ids=str
)
def test_the_embedded_model_answers_as_in_float32(right_in_float32, settings):
    right, total = count_right(**settings)
    assert abs(right - right_in_float32) <= total / 100


def test_int8_from_every_entrance(tmp_path):
    save_tiny_checkpoint(tmp_path)
    model, info = AnyLlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization="int8", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert type(model.lm_head) is nn.Linear
    assert model.dtype == torch.float32
    session = ChatSession(*load_for_inference(str(tmp_path), device="cpu", quantization="int8"))
    assert isinstance("".join(session.ask("What is this?", max_new_tokens=3)), str)
    assert session.statistics.num_new_tokens == 3


def test_16_bit_checkpoints_become_float32_around_int8(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path, quantization="int8")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32


def test_saving_int8_is_refused(tmp_path):
    model = tiny_model()
    quantize_to_int8(model)
    with pytest.raises(ValueError, match="packed or in int8"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantization": "int3"}, "expected one of int8, int4, fp8, nf4"),
        ({"quantization": "int8", "dtype": torch.bfloat16}, "and dtype"),
        ({"quantization": "int8", "device_map": "auto"}, "and a device_map"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AnyLlavaForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, **settings)


@pytest.mark.parametrize("quantization", ON_GPU)
def test_gpu_names_need_a_gpu_and_a_package(monkeypatch, quantization):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="on a CPU choose int8"):
        AnyLlavaForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, quantization=quantization)
    with pytest.raises(ValueError, match="on cpu; expected int8"):
        load_for_inference(EMBEDDED_MODEL, device="cpu", quantization=quantization)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = ON_GPU[quantization][0]
    with pytest.raises(ImportError, match=f"pip install {package}"):
        AnyLlavaForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, quantization=quantization)


def test_a_model_of_which_nothing_was_quantized_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="got quantization='int4' for a model of which no layer has a width"):
        refuse_unchanged(model, "int4")
    # As bitsandbytes does; torchao changes the weights.
    model.model.language_model.layers[0].mlp.up_proj.__class__ = type("Linear4bit", (nn.Linear,), {})
    refuse_unchanged(model, "nf4")


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ON_GPU)
def test_gpu_quantization_leaves_tower_projector_and_output_layer(quantization, tmp_path):
    pytest.importorskip(ON_GPU[quantization][0], reason=f"needs {ON_GPU[quantization][0]}")
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    config = AnyLlavaConfig.from_pretrained(EMBEDDED_MODEL)
    # int4 takes multiples of 128.
    config.text_config.update({"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    config.text_config.update({"num_attention_heads": 4, "num_key_value_heads": 4})
    AnyLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = load_for_inference(str(tmp_path), device="cuda", quantization=quantization)
    plain = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, weight in plain.named_parameters():
        if "language_model.layers" not in name:
            assert torch.equal(model.get_parameter(name).cpu(), weight), name
    text = "".join(ChatSession(model, processor).ask("What is this?", max_new_tokens=8))
    assert text
