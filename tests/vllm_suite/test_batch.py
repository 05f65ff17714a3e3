"""`llava batch --engine vllm` writes what the own engine writes. Opt-in, as the other test of this folder is."""

import json
import os
import shutil
import subprocess

import pytest

from modeling_llava.cli import main
from tests.conftest import ROOT
from tests.vllm_suite.test_greedy_tokens import PYTHON, SETTINGS, SITECUSTOMIZE, save_model

pytestmark = pytest.mark.skipif(PYTHON is None, reason="opt-in: run `make test-vllm`")


def test_a_batch_on_vllm_is_the_same_batch(tmp_path):
    save_model(tmp_path / "model")
    exported, pictures = tmp_path / "exported", tmp_path / "pictures"
    facts = ["--license", "mit", "--base-model", "someone/vicuna"]
    assert main(["export", str(tmp_path / "model"), "--out", str(exported), *facts]) == 0
    pictures.mkdir()
    for path in (ROOT / "spaces_demo" / "examples").glob("*.png"):
        shutil.copy(path, pictures)
    (pictures / "broken.png").write_bytes(b"none")
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
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
