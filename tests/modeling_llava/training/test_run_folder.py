"""Which checkpoint is whole, which run it belongs to, who writes to a folder, and what a full disk leaves."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import Trainer

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.cli import main
from modeling_llava.records import locks
from modeling_llava.training import run_folder
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from modeling_llava.training.run_folder import (
    FILES_FILE,
    explain_disk,
    find_checkpoint,
    find_damage,
    seal_checkpoint,
    write_whole,
)
from tests.conftest import ROOT
from tests.modeling_llava.training.conftest import write_recipe

TRAINER = {
    "learning_rate": 1e-3,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
}
RUN_WITH_SMALL_FILES = """
import resource, sys
from modeling_llava.cli import main
from modeling_llava.training.run_log import RunLog

write = RunLog.on_log

def write_and_fill_the_disk(self, args, state, control, **kwargs):
    write(self, args, state, control, **kwargs)
    if state.global_step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))

RunLog.on_log = write_and_fill_the_disk
sys.exit(main(["train", sys.argv[1]]))
"""
"""`llava train` whose third checkpoint has no room: no file can become larger than some bytes."""


@pytest.mark.parametrize(
    "num_bytes",
    [pytest.param(100, marks=pytest.mark.slow), 50_000, pytest.param(250_000, marks=pytest.mark.slow)],
    ids=["config", "weights", "optimizer"],
)
def test_full_disk_ends_in_one_line_and_harms_nothing(workspace, tmp_path, num_bytes):
    recipe = write_recipe(workspace, trainer=TRAINER, output_dir=str(tmp_path / "out"))
    command = [sys.executable, "-c", RUN_WITH_SMALL_FILES, str(recipe), str(num_bytes)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"llava: got no room to write \(.+\), with [\d,]+ MiB free in .*/out; expected enough", last), last
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    assert last.endswith(f"make room, then add --resume, which goes on from {checkpoint}")
    assert find_checkpoint(tmp_path / "out") == checkpoint
    assert AutoModelForVision2Seq.from_pretrained(checkpoint).num_parameters()


def test_a_disk_that_is_full_from_the_start_is_explained_too(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    message = rf"No space left on device.* MiB free in {tmp_path}; .* goes on from the beginning"
    with pytest.raises(ValueError, match=message), explain_disk(tmp_path / "not" / "yet"):
        raise full


@pytest.mark.parametrize("error", [PermissionError(13, "no"), RuntimeError("size mismatch"), KeyError("a")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)), explain_disk(tmp_path):
        raise error


def test_a_crash_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "progress.csv"
    write_whole(path, "old")

    def write_half_and_die(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half_and_die)
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, "new and longer")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_incomplete_checkpoints_are_left_out(tmp_path):
    assert find_checkpoint(str(tmp_path)) is None
    for step in (2, 10, 11):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if step < 11:
            seal_checkpoint(folder)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("name", ["model.safetensors", "global_step2/zero.pt", "pytorch_model_fsdp_0/rank0/a.distcp"])
def test_a_checkpoint_of_processes_is_whole_with_its_folders(tmp_path, name):
    """DeepSpeed and FSDP write their shards into folders of the checkpoint."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"shard")
    seal_checkpoint(tmp_path)
    assert find_damage(tmp_path) is None
    file.write_bytes(b"other")
    assert find_damage(tmp_path) == f"{name} changed since it was written"
    file.unlink()
    assert find_damage(tmp_path) == f"{name} is missing"


def test_a_new_run_keeps_away_from_the_checkpoints_of_another(workspace, tmp_path):
    recipe = read_recipe(write_recipe(workspace, trainer=TRAINER, output_dir=str(tmp_path)))
    train(recipe)
    with pytest.raises(ValueError, match="with checkpoint-1 of an earlier run; expected none: add --resume"):
        train(recipe)
    train(recipe, resume=True)


FINISHED = TRAINER | {"max_steps": 1, "save_strategy": "no"}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_a_trained_model_is_not_written_over_unless_that_is_asked_for(workspace, tmp_path, capsys, stage, resume):
    lora = {"lora": {"r": 2}} if stage == "lora" else {}
    recipe = write_recipe(workspace, stage=stage, trainer=FINISHED, output_dir=str(tmp_path / "out"), **lora)
    out = train(read_recipe(recipe))
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["train", str(recipe), "trainer.seed=7", *["--resume"] * resume]) == 2
    name = "adapter_config.json" if stage == "lora" else "config.json"
    message = f"with {name} of an earlier run; expected no model in it: add --overwrite to remove it, or choose"
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    # Of the model that a run starts from, nothing may stay beside one of another kind.
    other = ["stage=finetune", "lora="] if stage == "lora" else ["stage=lora", "lora.r=2"]
    assert main(["train", str(recipe), "--overwrite", *other]) == 0
    kinds = {"adapter_config.json", "config.json"} & {path.name for path in out.iterdir()}
    assert kinds == {"config.json" if stage == "lora" else "adapter_config.json"}
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "training_record.json"])
def test_whatever_is_left_of_a_model_is_named(workspace, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"with {name} of an earlier run; expected no model in it"):
        train(read_recipe(write_recipe(workspace, trainer=FINISHED, output_dir=str(tmp_path))))


def test_a_run_that_broke_off_without_a_checkpoint_can_begin_again(workspace, tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss\n1,2.0\n")
    (tmp_path / "checkpoint-1").mkdir()
    train(read_recipe(write_recipe(workspace, trainer=FINISHED, output_dir=str(tmp_path))), resume=True)


def test_a_run_that_cannot_begin_removes_nothing(workspace, tmp_path):
    recipe = read_recipe(write_recipe(workspace, trainer=TRAINER, output_dir=str(tmp_path)))
    train(recipe)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="got resume and overwrite"):
        train(recipe, resume=True, overwrite=True)
    recipe.data = []
    with pytest.raises(ValueError, match="at least one source"):
        train(recipe, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(workspace, tmp_path):
    trainer = TRAINER | {"max_steps": 1, "save_only_model": True}
    recipe = read_recipe(write_recipe(workspace, trainer=trainer, output_dir=str(tmp_path)))
    train(recipe)
    with pytest.raises(ValueError, match="checkpoint-1, which holds weights alone .* expected its optimizer too"):
        train(recipe, resume=True)


FAILURES = {
    "optimizer": ["trainer.optim=sgd", "trainer.optim_args=momentum=high"],
    "schedule": ["trainer.lr_scheduler_kwargs={waves: 1}"],
    "rate": ["trainer.learning_rate=-1"],
    "pictures": ["data.0.path={lost}"],
    "compiler": ["trainer.torch_compile_mode=x"],
    "offloading": ["trainer.activation_offloading=true"],
    "no effect": ["trainer.optim_args=a=1"],
    "fp16": ["trainer.fp16=true"],
}


@pytest.mark.parametrize("name", FAILURES)
def test_nothing_is_removed_before_a_first_step(workspace, tmp_path, capsys, name):
    """Wherever a new run fails: in its recipe, in its optimizer and schedule, or in its first batch."""
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    for file in ("model.safetensors", "config.json", "progress.csv", "checkpoint-1/trainer_state.json"):
        (out / file).write_text("mine")
    records = json.loads((workspace / "rows.json").read_text())
    (tmp_path / "lost.json").write_text(json.dumps([record | {"image": "lost.png"} for record in records]))
    recipe = write_recipe(workspace, trainer=TRAINER | {"gradient_checkpointing": False}, output_dir=str(out))
    settings = [setting.replace("{lost}", str(tmp_path / "lost.json")) for setting in FAILURES[name]]
    assert main(["train", str(recipe), "--overwrite", *settings]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("llava: got ")
    kept = [path for path in out.rglob("*") if path.is_file() and path.read_text() == "mine"]
    assert len(kept) == 4


def spoil(path: Path, way: str) -> None:
    data = path.read_bytes()
    if way == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": data[:middle], "flipped": flipped}[way])


@pytest.fixture(scope="module")
def run_with_checkpoints(workspace, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    trainer = TRAINER | {"max_steps": 2}
    return train(
        read_recipe(write_recipe(workspace, stage="lora", lora={"r": 2}, trainer=trainer, output_dir=str(out)))
    )


def test_any_damage_is_seen_and_named(run_with_checkpoints, tmp_path, caplog):
    out = shutil.copytree(run_with_checkpoints, tmp_path / "out")
    latest, older = out / "checkpoint-2", out / "checkpoint-1"
    files = [path for path in latest.rglob("*") if path.is_file()]
    assert {"optimizer.pt", "trainer_state.json", "adapter_model.safetensors"} <= {path.name for path in files}
    assert find_checkpoint(out) == str(latest)
    for path in files:
        whole = path.read_bytes()
        for way in ("missing", "empty", "truncated", "flipped"):
            caplog.clear()
            spoil(path, way)
            assert find_checkpoint(out) == str(older), (path.name, way)
            assert "checkpoint-2 is left out" in caplog.text
            assert path.name in caplog.text or path.name == FILES_FILE
            path.write_bytes(whole)
    assert find_checkpoint(out) == str(latest)


def test_a_run_goes_on_from_the_whole_checkpoint_before(workspace, run_with_checkpoints, tmp_path, caplog):
    out = shutil.copytree(run_with_checkpoints, tmp_path / "out")
    expected = (out / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    spoil(out / "checkpoint-2" / "optimizer.pt", "truncated")
    fields = {"stage": "lora", "lora": {"r": 2}, "trainer": TRAINER | {"max_steps": 2, "save_total_limit": 1}}
    train(read_recipe(write_recipe(workspace, **fields, output_dir=str(out))), resume=True)
    assert "checkpoint-2 is left out: optimizer.pt changed since it was written" in caplog.text
    assert find_checkpoint(out) == str(out / "checkpoint-2")
    assert (out / "checkpoint-2" / "adapter_model.safetensors").read_bytes() == expected


HOLD = """
import sys, time
from modeling_llava.training.run_folder import lock_folder
with lock_folder(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_run_at_the_same_time_is_told_of_the_first(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert any("locked" in line for line in holder.stdout)
    recipe = write_recipe(workspace, trainer=FINISHED, output_dir=str(out))
    for options in ([], ["--resume"], ["--overwrite"]):
        assert main(["train", str(recipe), *options]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"to which process {holder.pid} on {socket.gethostname()} writes; expected one run at a time" in error
    holder.kill()
    holder.wait()
    holder.stdout.close()
    # A process that was killed holds nothing.
    train(read_recipe(recipe))
    assert not (out / ".lock.json").exists()


def test_a_disk_that_cannot_be_locked_is_one_warning(tmp_path, caplog, monkeypatch):
    def refuse(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with run_folder.lock_folder(tmp_path / "out"):
        pass
    assert "out' cannot be locked ([Errno 37] No locks available)" in caplog.text


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("place", ["lock", "checkpoint"])
def test_a_disk_that_takes_no_files_is_one_line(workspace, tmp_path, capsys, monkeypatch, number, place):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    if place == "lock":
        monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    else:
        monkeypatch.setattr(Trainer, "save_model", refuse)
    recipe = write_recipe(workspace, trainer=TRAINER, output_dir=str(tmp_path / "out"))
    assert main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "which cannot be written" in error and "goes on from the beginning" in error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        RuntimeError("Parent directory out/checkpoint-1 does not exist."),
        SafetensorError("Error while serializing: I/O error: No such file or directory (os error 2)"),
    ],
)
def test_an_output_folder_that_vanished_is_one_line(tmp_path, error):
    message = "got output_dir .*, which is gone .* mount it again"
    with pytest.raises(ValueError, match=message), explain_disk(tmp_path / "out"):
        raise error
