"""Muon beside AdamW: who trains what, that schedules reach both, and that a run resumes."""

import copy
import sys

import pytest
import torch
from trl import SFTConfig

from modeling_llava.tiny_llava import train as tiny_train
from modeling_llava.tiny_llava.train import MuonTrainer, MuonWithAdamW, split_for_muon
from modeling_llava.training.recipe import Recipe, read_recipe
from modeling_llava.training.run import trainer_settings
from modeling_llava.training.starting_model import freeze_all_but
from processing_llava.data.data_sources import DataSource
from tests.conftest import ROOT
from tests.modeling_llava.training.conftest import write_recipe
from tests.tiny import tiny_model

RECIPES = sorted((ROOT / "modeling_llava" / "tiny_llava" / "recipes").glob("*.yaml"))


def make_optimizer(layer: torch.nn.Linear) -> MuonWithAdamW:
    return MuonWithAdamW(
        [{"params": [layer.weight], "lr": 0.1, "weight_decay": 0.0}],
        [{"params": [layer.bias], "lr": 0.2, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )


def take_step(layer: torch.nn.Linear, optimizer: MuonWithAdamW) -> None:
    layer(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_takes_the_matrices_of_projector_and_layers_and_nothing_else():
    model = tiny_model()
    recipe = Recipe(stage="finetune", model="m", data=[DataSource(path="d")], output_dir="o")
    freeze_all_but(model, recipe.trained_parts)
    trainer = object.__new__(MuonTrainer)
    trainer.recipe = recipe
    trainer.args = type("Arguments", (), {"learning_rate": 0.1, "weight_decay": 0.2})()
    matrices, others = split_for_muon(model, trainer.group_parameters(model), rate=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(parameter)] for group in matrices for parameter in group["params"]}
    left = {names[id(parameter)] for group in others for parameter in group["params"]}
    expected = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and ("mm_projector" in name or ".layers." in name) and "vision_tower" not in name
    }
    assert taken == expected
    assert taken | left == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not taken & left
    assert {group["lr"] for group in matrices} == {0.5} and {group["lr"] for group in others} == {0.1}


def test_a_schedule_scales_both():
    layer = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(layer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    take_step(layer, optimizer)
    schedule.step()
    before = copy.deepcopy(layer.state_dict())
    take_step(layer, optimizer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_a_loaded_state_goes_on_as_if_never_stopped():
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(layer)
    take_step(layer, optimizer)
    resumed = copy.deepcopy(layer)
    resumed_optimizer = make_optimizer(resumed)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_step(layer, optimizer)
    take_step(resumed, resumed_optimizer)
    torch.testing.assert_close(resumed.state_dict(), layer.state_dict())
    assert resumed_optimizer.param_groups[0] is resumed_optimizer.muon.param_groups[0]


@pytest.mark.parametrize("shards", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_sharded_model_is_refused(shards):
    trainer = object.__new__(MuonTrainer)
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    setattr(trainer, shards, True)
    with pytest.raises(ValueError, match="got Muon for a model that is sharded; expected a whole one"):
        trainer.create_optimizer()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_trainer_takes_the_recipes(path, tmp_path):
    recipe = read_recipe(path)
    arguments = SFTConfig(output_dir=str(tmp_path), **trainer_settings(recipe) | {"bf16": False})
    assert (recipe.stage, arguments.lr_scheduler_type, arguments.warmup_steps) == ("finetune", "cosine", 0.03)


def test_a_run_steps_with_both_and_writes_a_model(workspace, tmp_path, monkeypatch):
    steps = []
    for kind in (tiny_train.Muon, tiny_train.AdamW):
        monkeypatch.setattr(kind, "step", lambda self, kind=kind, step=kind.step: steps.append(kind) or step(self))
    recipe = write_recipe(workspace, output_dir=str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train", str(recipe), "trainer.max_steps=1"])
    tiny_train.main()
    assert steps == [tiny_train.Muon, tiny_train.AdamW]
    assert (tmp_path / "model.safetensors").is_file()
