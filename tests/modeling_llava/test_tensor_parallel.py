"""The tensor-parallel plan, on two processes that each hold half of the language model's matrices."""

import json
import subprocess
import sys

import torch

from tests import original_folders as folders
from tests.conftest import ROOT
from tests.tiny import tiny_model

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from transformers import DistributedConfig
from modeling_llava import AutoModelForVision2Seq
from tests import original_folders as folders
from tests.tiny import tiny_model

torch.set_num_threads(1)
plan = DistributedConfig(tp_plan="auto", tp_size=2)
model = AutoModelForVision2Seq.from_pretrained(sys.argv[1], distributed_config=plan)
inputs = folders.example_inputs(tiny_model())
logits = folders.logits_of(model, inputs)
logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
weight = model.model.language_model.layers[0].self_attn.q_proj.weight
if dist.get_rank() == 0:
    result = {"logits": logits[0].tolist(), "local": list(weight.to_local().shape), "whole": list(weight.shape)}
    open(sys.argv[2], "w").write(json.dumps(result))
# A process can abort at its end otherwise: torch's threads still hold tensors when Python is gone.
dist.destroy_process_group()
"""


def test_two_processes_compute_what_one_computes(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "model"), str(tmp_path / "result.json")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    rows, columns = result["whole"]
    assert result["local"] == [rows // 2, columns]
    expected = folders.logits_of(model, folders.example_inputs(model))[0]
    torch.testing.assert_close(torch.tensor(result["logits"]), expected, rtol=1e-4, atol=1e-5)
