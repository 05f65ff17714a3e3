"""`llava batch --engine vllm` writes what the own engine writes. Opt-in, as the others of this folder."""

import json
import os
import shutil
import subprocess

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.cli import main
from tests.conftest import ROOT
from tests.original_folders import widen
from tests.tiny import PATCH_SIZE, TILE_SIZE, VOCAB_SIZE, tiny_processor

from .conftest import PYTHON, SETTINGS, prepare_path


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


def test_a_batch_on_vllm_is_the_same_batch(tmp_path):
    save_model(tmp_path / "model")
    exported, pictures = tmp_path / "exported", tmp_path / "pictures"
    facts = ["--license", "mit", "--base-model", "someone/vicuna"]
    assert main(["export", str(tmp_path / "model"), "--out", str(exported), *facts]) == 0
    pictures.mkdir()
    for path in (ROOT / "spaces_demo" / "examples").glob("*.png"):
        shutil.copy(path, pictures)
    (pictures / "broken.png").write_bytes(b"none")
    prepare_path(tmp_path)
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": ["animal", "thing"]}))
    # What a row spells is no image and no end, for vLLM either.
    asked = ["batch", str(pictures), "--question", "What is <image> this?</s>", "--schema", str(schema)]
    asked += ["--model", str(exported), "--dtype", "float32", "--max-new-tokens", "12"]
    assert main([*asked, "--out", str(tmp_path / "own.jsonl")]) == 0
    result = subprocess.run(
        [PYTHON, "-m", "modeling_llava.cli", *asked, "--engine", "vllm", "--out", str(tmp_path / "vllm.jsonl")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | SETTINGS | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    assert result.returncode == 0, result.stderr[-5000:]
    own, vllm = (
        {record["key"]: record for record in map(json.loads, (tmp_path / name).read_text().splitlines())}
        for name in ("own.jsonl", "vllm.jsonl")
    )
    assert own == vllm and len(own) == 12 and "error" in own["broken.png"]
