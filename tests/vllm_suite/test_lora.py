"""Adapters on vLLM: a LoRA as PEFT writes it, and one with its projector, split by `llava export --for vllm`."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoProcessor

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.cli import main

from .conftest import answer_here, run_vllm, write_messages
from .layouts import save_layout

LAYOUT = "clip llama spatial_unpad"
ENGINE = {"tokenizer_mode": "any_llava", "enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
REQUESTS = [
    *({"messages": write_messages("What is this?", number)} for number in range(3)),
    {"messages": write_messages("Say hello.")},
]


def save_adapter(folder, base, **settings) -> None:
    model = AnyLlavaForConditionalGeneration.from_pretrained(base)
    linear = [
        name
        for name, module in model.model.language_model.named_modules(prefix="model.language_model")
        if isinstance(module, torch.nn.Linear)
    ]
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=linear, init_lora_weights=False, **settings)
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_layout(LAYOUT, folder / "base")
    save_adapter(folder / "plain", folder / "base", alpha_pattern={"q_proj": 64})
    save_adapter(folder / "whole", folder / "base", modules_to_save=["mm_projector"])
    assert main(["export", str(folder / "whole"), "--out", str(folder / "split"), "--for", "vllm"]) == 0
    jobs = [
        {
            "name": name,
            "model": str(base),
            "requests": [*REQUESTS, *(request | {"lora": str(adapter)} for request in REQUESTS)],
            "settings": ENGINE,
        }
        for name, base, adapter in (
            ("plain", folder / "base", folder / "plain"),
            ("split", folder / "split" / "base", folder / "split" / "adapter"),
        )
    ]
    return folder, run_vllm(jobs, folder)


@pytest.mark.parametrize("name, trained, base", [("plain", "plain", "base"), ("split", "whole", "split/base")])
def test_base_and_adapter_beside_each_other(name, trained, base, answers):
    folder, results = answers
    expected = [answer_here(folder / base, REQUESTS), answer_here(folder / trained, REQUESTS)]
    assert expected[0] != expected[1]
    for found in results[name]:
        assert found[: len(REQUESTS)] == expected[0]
        assert found[len(REQUESTS) :] == expected[1]


def test_the_split_moved_the_projector(answers):
    folder, _ = answers
    before, after = (load_file(folder / place / "model.safetensors") for place in ("base", "split/base"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.mm_projector.") for name in changed)
    config = json.loads((folder / "split" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
