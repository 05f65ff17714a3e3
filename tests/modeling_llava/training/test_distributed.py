"""Two processes, or steps that gather several batches, take the same steps as one process with all rows at once."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import train
from modeling_llava.training.trainer import check_sharding, prepare_sharding
from tests import original_folders as folders
from tests.conftest import ROOT
from tests.modeling_llava.training.conftest import write_recipe
from tests.tiny import save_tiny_checkpoint, tiny_model

pytestmark = pytest.mark.slow

LAUNCH = ROOT / "modeling_llava" / "training" / "launch"
LLAVA, LLAVA_AS_ON_GPUS = "modeling_llava.cli", "tests.modeling_llava.training.process_worker"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WITH_FSDP = ["accelerate.commands.launch", "--config_file", str(LAUNCH / "fsdp2.yaml"), "--num_processes", "2"]
ON_CPU = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
TRAINER = {"learning_rate": 3e-3, "logging_steps": 1, "disable_tqdm": True, "bf16": False}
TRAINER |= {"gradient_checkpointing": False}
PADDED = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
"""Two rows a batch: three would be the same three in every batch."""
STEPS = TRAINER | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
ONE, TWO = {"use_cpu": True, "gradient_accumulation_steps": 2}, {"use_cpu": False}
"""What one process, and two, are told so that they take the same steps."""

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, and a compiler for it"
)


def run_recipe(folder: Path, out: Path, **fields) -> Path:
    return train(read_recipe(write_recipe(folder, output_dir=str(out), **fields)))


def launch(launcher: list[str], program: str, recipe: Path, *, resume: bool = False) -> None:
    """Run a recipe in two processes, as README says."""
    command = [sys.executable, "-m", *launcher, "-m", program, "train", str(recipe), *["--resume"] * resume]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]


def losses_of(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4, msg=name)


def assert_same_steps(found: Path, expected: Path) -> None:
    records = [json.loads((folder / "training_record.json").read_text()) for folder in (found, expected)]
    assert records[0]["parameters"] == records[1]["parameters"]
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-5)
    assert_close(weights_of(found), weights_of(expected))
    assert weights_of(found / "checkpoint-2").keys() == weights_of(expected / "checkpoint-2").keys()
    half = AutoModelForVision2Seq.from_pretrained(found / "checkpoint-2")
    expected_half = AutoModelForVision2Seq.from_pretrained(expected / "checkpoint-2")
    inputs = folders.example_inputs(half)
    torch.testing.assert_close(
        folders.logits_of(half, inputs), folders.logits_of(expected_half, inputs), rtol=1e-3, atol=1e-3
    )


def forget_second_half(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """As if the run had ended at its first checkpoint; what it had computed after it comes back."""
    losses, weights = losses_of(folder), weights_of(folder)
    shutil.rmtree(folder / "checkpoint-4")
    next(folder.glob("*model.safetensors")).unlink()
    return losses, weights


def test_four_small_batches_a_step_are_one_large_one(workspace, tmp_path):
    """12 rows: 3 at a time and four batches a step, or all at once. Only the mean over all tokens makes them equal."""
    trainer = TRAINER | PADDED | {"num_train_epochs": 2}
    large = run_recipe(workspace, tmp_path / "large", trainer=trainer | {"per_device_train_batch_size": 12})
    small = trainer | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    assert_close(weights_of(run_recipe(workspace, tmp_path / "small", trainer=small)), weights_of(large))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"stage": "align"},
        {"stage": "align", "feature_cache": "cache"},
        {"stage": "align", "train_vision_tower": True},
        {"stage": "lora", "lora": {"r": 2, "lora_dropout": 0.0, "target_modules": ".*(tower|language_model).*q_proj"}},
        {"stage": "finetune"},
    ],
    ids=str,
)
def test_two_processes_take_batches_of_texts(workspace, tmp_path, fields, checkpointing):
    """One has pictures and the other has none, then both have none; each step is that of one process."""
    records = json.loads((workspace / "rows.json").read_text())
    texts = [record["conversations"][1:] for record in records]
    question = {"from": "human", "value": "Color?"}
    for index, answer in enumerate(texts):
        if index >= 2:
            records[index] = {"id": f"text {index}", "conversations": [question, *answer]}
    (tmp_path / "rows.json").write_text(json.dumps(records))
    fields = fields | {"data": [{"path": str(tmp_path / "rows.json"), "image_folder": str(workspace)}]}
    if "feature_cache" in fields:
        fields["feature_cache"] = str(tmp_path / "cache")
    trainer = STEPS | PADDED | {"gradient_checkpointing": checkpointing, "use_cpu": True}
    one = run_recipe(workspace, tmp_path / "one", trainer=trainer | ONE, **fields)
    recipe = write_recipe(workspace, output_dir=str(tmp_path / "two"), trainer=trainer, **fields)
    launch(TORCHRUN, LLAVA, recipe)
    assert_same_steps(tmp_path / "two", one)


@pytest.mark.parametrize("packing", [{}, {"tokens_per_batch": 300}])
def test_two_processes_are_one_with_twice_the_batches(workspace, tmp_path, packing):
    trainer = TRAINER | {"num_train_epochs": 2} | ({} if packing else PADDED)
    expected = run_recipe(workspace, tmp_path / "one", trainer=trainer | ONE, **packing)
    trainer |= {"use_cpu": True}
    launch(TORCHRUN, LLAVA, write_recipe(workspace, output_dir=str(tmp_path / "two"), trainer=trainer, **packing))
    assert_close(weights_of(tmp_path / "two"), weights_of(expected))
    losses = [
        [entry["loss"] for entry in json.loads((folder / "training_record.json").read_text())["losses"]]
        for folder in (tmp_path / "two", expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("stage", ["finetune", "tied", "lora"])
def test_sharded_processes_are_one(workspace, tiled_start, tmp_path, stage):
    """Padded batches of a whole model, packed ones with adapters, tower and newline; and all go on where they end."""
    if stage == "finetune":
        fields, trainer = {}, STEPS | PADDED
    elif stage == "tied":
        fields = {"model": str(save_tiny_checkpoint(tmp_path / "tied", "qwen2"))}
        trainer = STEPS | PADDED
    else:
        fields = {"stage": "lora", "lora": {"r": 4, "lora_dropout": 0.0}, "train_vision_tower": True}
        fields |= {"model": str(tiled_start), "tokens_per_batch": 500}
        trainer = STEPS
    one = run_recipe(workspace, tmp_path / "one", trainer=trainer | ONE, **fields)
    two = tmp_path / "two"
    recipe = write_recipe(workspace, output_dir=str(two), trainer=trainer | TWO, **fields)
    launch(WITH_FSDP, LLAVA_AS_ON_GPUS, recipe)
    assert_same_steps(two, one)

    losses, weights = forget_second_half(two)
    launch(WITH_FSDP, LLAVA_AS_ON_GPUS, recipe, resume=True)
    assert losses_of(two) == losses
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(two).items())


@pytest.mark.parametrize("fields", [{}, {"train_vision_tower": True}, {"feature_cache": "cache"}], ids=str)
def test_sharded_processes_take_batches_without_pictures(workspace, tmp_path, fields):
    """Two rows with pictures for one process, two without for the other, which must come to the same layers."""
    records = json.loads((workspace / "rows.json").read_text())
    question = {"from": "human", "value": "Color?"}
    for index, record in enumerate(records):
        if index // 2 % 2:
            records[index] = {"id": f"text {index}", "conversations": [question, record["conversations"][1]]}
    (tmp_path / "rows.json").write_text(json.dumps(records))
    data = [{"path": str(tmp_path / "rows.json"), "image_folder": str(workspace)}]
    fields = {"data": data} | {name: str(tmp_path) if name == "feature_cache" else True for name in fields}
    one = run_recipe(workspace, tmp_path / "one", trainer=STEPS | PADDED | ONE, **fields)
    two = tmp_path / "two"
    recipe = write_recipe(workspace, output_dir=str(two), trainer=STEPS | PADDED | TWO, **fields)
    launch(WITH_FSDP, LLAVA_AS_ON_GPUS, recipe)
    assert_same_steps(two, one)


@needs_deepspeed
@pytest.mark.parametrize("stage", ["lora", "finetune"])
def test_deepspeed_processes_are_one(workspace, tiled_start, tmp_path, stage):
    """ZeRO-2 with adapters, ZeRO-3 with a whole model."""
    if stage == "lora":
        name, fields = "deepspeed_zero2.json", {"stage": "lora", "lora": {"r": 4, "lora_dropout": 0.0}}
        fields |= {"model": str(tiled_start)}
    else:
        name, fields = "deepspeed_zero3.json", {"train_vision_tower": True}
    trainer = STEPS | PADDED
    one = run_recipe(workspace, tmp_path / "one", trainer=trainer | ONE, **fields)
    two = tmp_path / "two"
    trainer |= TWO | {"deepspeed": str(LAUNCH / name)}
    recipe = write_recipe(workspace, output_dir=str(two), trainer=trainer, **fields)
    launch(TORCHRUN, LLAVA_AS_ON_GPUS, recipe)
    assert_same_steps(two, one)

    losses, _ = forget_second_half(two)
    launch(TORCHRUN, LLAVA_AS_ON_GPUS, recipe, resume=True)
    assert losses_of(two) == losses


def test_deepspeed_files_are_read():
    assert HfDeepSpeedConfig(str(LAUNCH / "deepspeed_zero2.json")).is_zero2()
    config = HfDeepSpeedConfig(str(LAUNCH / "deepspeed_zero3.json"))
    assert config.is_zero3()
    assert config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fsdp_version": 1}, "got fsdp_version: 1; expected 2"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "got fsdp_state_dict_type: SHARDED_STATE_DICT; expected FULL"),
        ({"cpu_ram_efficient_loading": True}, "got fsdp_cpu_ram_efficient_loading: true; expected false"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_settings_that_would_lose_weights_are_refused(settings, message):
    settings = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False} | settings
    with pytest.raises(ValueError, match=message):
        check_sharding(FullyShardedDataParallelPlugin(**settings), stage="finetune")


def test_a_4_bit_model_is_not_sharded():
    settings = {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
    check_sharding(plugin, stage="lora")
    with pytest.raises(ValueError, match="got stage 'qlora' for FSDP"):
        check_sharding(plugin, stage="qlora")


def test_sums_are_not_rounded_to_16_bits():
    settings = {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16", **settings)
    prepare_sharding(tiny_model(), plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
