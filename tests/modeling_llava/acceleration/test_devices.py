"""The dtype that a checkpoint is loaded in where nobody says so."""

import json

import pytest
import torch

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.auto import AutoModelForVision2Seq
from modeling_llava.inference.loading import load_for_inference
from tests.original_folders import write_v15
from tests.tiny import save_tiny_checkpoint, tiny_model


def pretend(monkeypatch, *, units: bool, gpu: bool = False) -> None:
    """Run as on a CPU with or without units for bfloat16, and beside a GPU or not."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)


@pytest.fixture(scope="module", params=["any_llava", "transformers"])
def checkpoints(request, tmp_path_factory):
    """One model stored in every dtype."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tiny_model(image_token_id=299).to(dtype).save_pretrained(
            folder / str(dtype).removeprefix("torch."), layout=request.param
        )
    return folder


@pytest.mark.parametrize(
    "stored, units, gpu, expected",
    [
        ("bfloat16", False, False, torch.float32),
        ("bfloat16", True, False, torch.bfloat16),
        ("bfloat16", False, True, torch.bfloat16),
        ("float16", True, False, torch.float32),
        ("float16", True, True, torch.float16),
        ("float32", False, False, torch.float32),
    ],
)
def test_a_slow_cpu_gets_float32(monkeypatch, checkpoints, stored, units, gpu, expected):
    pretend(monkeypatch, units=units, gpu=gpu)
    loaded = AnyLlavaForConditionalGeneration.from_pretrained(checkpoints / stored)
    assert loaded.dtype == loaded.config.dtype == expected


@pytest.mark.parametrize(
    "choice", [{"dtype": "auto"}, {"dtype": torch.bfloat16}, {"torch_dtype": "auto"}, {"device_map": "cpu"}], ids=str
)
def test_a_choice_is_kept(monkeypatch, checkpoints, choice):
    pretend(monkeypatch, units=False)
    loaded = AnyLlavaForConditionalGeneration.from_pretrained(checkpoints / "bfloat16", **choice)
    assert loaded.dtype == torch.bfloat16


def test_original_checkpoints_and_auto_classes(monkeypatch, tmp_path):
    pretend(monkeypatch, units=False)
    write_v15(tmp_path)
    config = tmp_path / "checkpoint" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": "bfloat16"}))
    assert AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint").dtype == torch.float32
    assert AutoModelForVision2Seq.from_pretrained(tmp_path / "checkpoint", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("units", [False, True])
def test_answering_on_the_cpu_beside_a_gpu(monkeypatch, tmp_path, units):
    save_tiny_checkpoint(tmp_path)
    model = AnyLlavaForConditionalGeneration.from_pretrained(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    pretend(monkeypatch, units=units, gpu=True)
    loaded, _ = load_for_inference(str(tmp_path), device="cpu")
    assert loaded.dtype == (torch.bfloat16 if units else torch.float32)
