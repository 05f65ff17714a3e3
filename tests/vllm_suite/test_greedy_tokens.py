"""vLLM on an exported folder: the same greedy tokens. Opt-in, since vLLM wants an environment of its own:
`make test-vllm` makes it and names its Python in ANYLLAVA_VLLM_PYTHON.
"""

import json
import os
import subprocess

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlamaConfig

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.cli import main
from tests.original_folders import widen
from tests.tiny import PATCH_SIZE, TILE_SIZE, VOCAB_SIZE, tiny_processor

PYTHON = os.environ.get("ANYLLAVA_VLLM_PYTHON")
NUM_TOKENS = 12
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
SCRIPT = """
import json
import sys

import PIL.Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, picture, prompt, num_tokens = sys.argv[1:]
    engine = LLM(model=folder, dtype="float32", max_model_len=256, enforce_eager=True)
    request = {"prompt": prompt, "multi_modal_data": {"image": PIL.Image.open(picture).convert("RGB")}}
    settings = SamplingParams(temperature=0, max_tokens=int(num_tokens), ignore_eos=True)
    print("TOKENS", json.dumps(list(engine.generate(request, settings)[0].outputs[0].token_ids)))
"""

# PyPI's torchvision is built for CUDA. Beside a torch for processors it lacks its own operators, of which its import
# demands two by name; vLLM imports it and calls neither. Python runs a file of this name first in each process.
SITECUSTOMIZE = """
import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

pytestmark = pytest.mark.skipif(PYTHON is None, reason="opt-in: run `make test-vllm`")


def save_model(folder) -> None:
    """Heads are 64 wide: vLLM's attention takes no smaller ones."""
    processor = tiny_processor()
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE_SIZE,
        patch_size=PATCH_SIZE,
    )
    torch.manual_seed(0)
    model = AnyLlavaForConditionalGeneration(AnyLlavaConfig(vision, text, image_token_id=processor.image_token_id))
    widen(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def test_vllm_answers_with_the_same_greedy_tokens(tmp_path):
    save_model(tmp_path / "model")
    exported = tmp_path / "exported"
    facts = ["--license", "mit", "--base-model", "someone/vicuna"]
    assert main(["export", str(tmp_path / "model"), "--out", str(exported), *facts]) == 0
    levels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photo = PIL.Image.fromarray(levels)
    photo.save(tmp_path / "photo.png")

    processor = AutoProcessor.from_pretrained(exported)
    content = [{"type": "image", "image": photo}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos does
    generated = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    expected = generated[0, inputs["input_ids"].shape[1] :].tolist()

    (tmp_path / "ask.py").write_text(SCRIPT)
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    result = subprocess.run(
        [PYTHON, "ask.py", str(exported), "photo.png", prompt, str(NUM_TOKENS)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | SETTINGS | {"PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-5000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("TOKENS ")]
    assert json.loads(line.removeprefix("TOKENS ")) == expected
