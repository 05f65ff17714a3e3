"""The dtype that a checkpoint is loaded in where nobody says so."""

import json
from pathlib import Path

import pytest
import torch

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.acceleration import devices
from modeling_llava.acceleration.devices import _list_cgroup_bytes
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


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def write_group(folder: Path, names: tuple[str, str, str], *, limit: str, usage: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {files}\n")


@pytest.mark.parametrize(
    ("line", "inside", "names"),
    [
        ("0::/", "", V2),
        ("0::/user.slice/run.scope", "user.slice/run.scope", V2),
        ("0::/kubepods/of-the-host", "", V2),
        ("4:cpu,memory:/docker/abc", "memory/docker/abc", V1),
        ("4:memory:/docker/of-the-host", "memory", V1),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, line, inside, names):
    """The group of the process, wherever it stands, and those around it."""
    process = tmp_path / "cgroup"
    process.write_text(f"9:cpuset:/elsewhere\n{line}\n")
    root = tmp_path / "sys"
    write_group(root / inside, names, limit=str(8 * 2**30), usage=5 * 2**30, files=2**30)
    assert _list_cgroup_bytes(root, process) == [4 * 2**30]


def test_the_smallest_limit_around_a_process_counts(tmp_path):
    process = tmp_path / "cgroup"
    process.write_text("0::/a/b\n")
    root = tmp_path / "sys"
    write_group(root, V2, limit="max", usage=1, files=0)
    write_group(root / "a", V2, limit="1000", usage=100, files=0)
    write_group(root / "a/b", V2, limit="5000", usage=100, files=0)
    assert min(_list_cgroup_bytes(root, process)) == 900
    write_group(root / "a", V2, limit="max", usage=1, files=0)
    assert _list_cgroup_bytes(root, process) == [4900]
    assert _list_cgroup_bytes(root, tmp_path / "no such system") == []


def test_free_memory_is_that_of_the_container(monkeypatch):
    monkeypatch.setattr(devices, "_list_cgroup_bytes", lambda: [12345])
    assert devices.count_free_bytes(torch.device("cpu")) == 12345
