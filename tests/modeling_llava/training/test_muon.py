"""Muon beside AdamW: who trains what, that schedules reach both, and that a run resumes."""

import copy

import pytest
import torch

from modeling_llava.training.muon import MuonWithAdamW, split_for_muon
from modeling_llava.training.parts import freeze_all_but
from modeling_llava.training.recipe import Recipe
from modeling_llava.training.trainer import LlavaTrainer
from tests.tiny import tiny_model


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
    recipe = Recipe(stage="finetune", model="m", data=["d"], output_dir="o", muon_learning_rate=0.5)
    freeze_all_but(model, recipe.trained_parts)
    trainer = object.__new__(LlavaTrainer)
    trainer.recipe = recipe
    trainer.args = type("Arguments", (), {"learning_rate": 0.1, "weight_decay": 0.2})()
    matrices, others = split_for_muon(model, trainer._parameter_groups(model), rate=0.5)
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


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stage": "align"}, "expected 'finetune'"),
        ({"stage": "finetune", "projector_learning_rate": 1.0}, "expected one of them"),
    ],
)
def test_recipes_that_muon_does_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(model="m", data=["d"], output_dir="o", muon_learning_rate=0.1, **fields)
