"""The estimate of a step's memory beside what a step holds, and what is decided from it."""

import gc
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig, TrainerCallback

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.acceleration.devices import format_bytes
from modeling_llava.training import run
from modeling_llava.training.recipe import read_recipe
from modeling_llava.training.run import build_trainer
from modeling_llava.training.starting_model import count_parameters, freeze_all_but
from modeling_llava.training.step_memory import (
    MARGIN,
    StepMemory,
    _find_costliest,
    count_states,
    estimate_step,
)
from modeling_llava.training.trainer import LlavaTrainer
from processing_llava.transformers_versions import is_checkpointing
from tests.modeling_llava.training.conftest import write_recipe
from tests.tiny import tiny_model, tiny_processor

TRAINER = {"learning_rate": 1e-3, "max_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True}


def estimate(trainer: LlavaTrainer) -> StepMemory:
    return estimate_step(
        trainer.model,
        trainer.data_collator,
        trainer.train_dataset,
        recipe=trainer.recipe,
        arguments=trainer.args,
    )


class HeldStates(TrainerCallback):
    """Bytes of gradients before the optimizer's step, and of weights and optimizer after it."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.held["gradients"] = sum(gradient.nbytes for gradient in gradients)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.held["weights"] = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        states = optimizer.optimizer.state.values()
        # Each parameter has one number more, which counts its steps.
        self.held["optimizer"] = sum(value.nbytes for state in states for value in state.values() if value.ndim)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stage": "align"},
        {"stage": "lora", "lora": {"r": 4}},
        {"train_vision_tower": True},
        {"trainer": TRAINER | {"optim": "sgd"}},
    ],
    ids=str,
)
def test_states_are_those_of_a_step(workspace, tmp_path, fields):
    recipe = read_recipe(write_recipe(workspace, **{"trainer": TRAINER} | fields, output_dir=str(tmp_path)))
    trainer = build_trainer(recipe)
    memory = estimate(trainer)
    held = HeldStates()
    trainer.add_callback(held)
    trainer.train()
    assert {name: getattr(memory, name) for name in held.held} == held.held


def test_what_deepspeed_has_sharded_is_counted_whole():
    model = tiny_model()
    freeze_all_but(model, ("mm_projector",))
    found = [(count_parameters(model), count_states(model, optim="adamw_torch"))]
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    found.append((count_parameters(model), count_states(model, optim="adamw_torch")))
    assert found[0] == found[1]


def save_wide_checkpoint(folder) -> None:
    """Large enough that what a step keeps is much more than its work space."""
    processor = tiny_processor()
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    )
    text = LlamaConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = AnyLlavaConfig(vision, text, image_token_id=processor.image_token_id)
    AnyLlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def measure_peak(trainer: LlavaTrainer) -> int:
    """Bytes that a step has allocated at most, gradients included and weights not."""
    trainer.model.train().zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(12)])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.compute_loss(trainer.model, batch).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"train_vision_tower": True},
        {"stage": "lora", "lora": {"r": 4}},
        {"tokens_per_batch": 2120},  # those of all rows
    ],
    ids=str,
)
def test_activations_are_within_a_quarter_of_a_measured_peak(workspace, tmp_path, fields):
    save_wide_checkpoint(tmp_path / "wide")
    sizes = {} if "tokens_per_batch" in fields else {"per_device_train_batch_size": 12}
    settings = {"max_steps": 1, "gradient_checkpointing": False, **sizes}
    fields = {"model": str(tmp_path / "wide"), "trainer": settings, "output_dir": str(tmp_path), **fields}
    trainer = build_trainer(read_recipe(write_recipe(workspace, **fields)))
    memory = estimate(trainer)
    plain = memory.activations + memory.gradients
    assert plain / 1.25 < measure_peak(trainer) < plain * 1.25
    trainer.model.gradient_checkpointing_enable()
    checkpointed = memory.checkpointed + memory.gradients
    assert checkpointed / 1.25 < measure_peak(trainer) < checkpointed * 1.25
    assert checkpointed < plain / 2


def test_the_estimate_leaves_the_random_state(workspace, tmp_path):
    fields = {"stage": "lora", "lora": {"r": 4, "lora_dropout": 0.5}, "trainer": TRAINER}
    trainer = build_trainer(read_recipe(write_recipe(workspace, **fields, output_dir=str(tmp_path))))
    before = torch.get_rng_state()
    estimate(trainer)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("share", "expected"), [(0.9, True), (1.1, False)])
def test_checkpointing_is_decided_from_free_memory(workspace, tmp_path, monkeypatch, caplog, share, expected):
    recipe = read_recipe(write_recipe(workspace, trainer=TRAINER, output_dir=str(tmp_path)))
    needed = estimate(build_trainer(recipe)).add_up(checkpointing=False)
    free = round(needed * MARGIN * share)
    monkeypatch.setattr(run, "free_memory", lambda model, arguments: free)
    caplog.clear()
    trainer = build_trainer(recipe)
    assert trainer.args.gradient_checkpointing is expected
    lines = [message for message in caplog.messages if "gradient checkpointing is" in message]
    assert len(lines) == 1
    assert format_bytes(needed) in lines[0] and format_bytes(free) in lines[0]
    trainer.train()
    assert is_checkpointing(trainer.model) is expected


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_the_recipe_decides_first(workspace, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(run, "free_memory", lambda model, arguments: 10**15 if value else 0)
    recipe = read_recipe(write_recipe(workspace, trainer=TRAINER | {name: value}, output_dir=str(tmp_path)))
    assert build_trainer(recipe).args.gradient_checkpointing is value


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("packing", [{}, {"tokens_per_batch": 2000}], ids=["padded", "packed"])
def test_pictures_cost_where_the_tower_trains(workspace, tmp_path, packing, trains):
    """The longest row is one without a picture; a batch of it would have no work for the tower."""
    records = json.loads((workspace / "rows.json").read_text())
    conversations = [{"from": "human", "value": "Color?" * 20}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "rows.json").write_text(json.dumps([*records, {"id": "long", "conversations": conversations}]))
    data = [{"path": str(tmp_path / "rows.json"), "image_folder": str(workspace)}]
    trainer = {"max_steps": 1, "disable_tqdm": True} if packing else TRAINER
    fields = {"trainer": trainer, "data": data, "output_dir": str(tmp_path), "train_vision_tower": trains, **packing}
    built = build_trainer(read_recipe(write_recipe(workspace, **fields)))
    row, num_tokens = _find_costliest(built.train_dataset, built.data_collator, built.recipe)
    assert bool(row["images"]) is trains
    assert num_tokens == built.data_collator([row])["input_ids"].shape[1]


@pytest.mark.parametrize(("train_vision_tower", "expected"), [(False, False), (True, True)])
def test_a_frozen_tower_has_no_gradient_with_checkpointing(workspace, tmp_path, train_vision_tower, expected):
    fields = {"stage": "lora", "lora": {"r": 2}, "train_vision_tower": train_vision_tower}
    trainer = TRAINER | {"gradient_checkpointing": True}
    trainer = build_trainer(read_recipe(write_recipe(workspace, **fields, trainer=trainer, output_dir=str(tmp_path))))
    has_gradient = []
    tower = trainer.model.get_base_model().model.vision_tower
    tower.register_forward_hook(
        lambda module, inputs, output: has_gradient.append(output.last_hidden_state.requires_grad)
    )
    trainer.train()
    assert is_checkpointing(trainer.model)
    assert has_gradient == [expected]


def test_sizes_are_written_for_people():
    assert format_bytes(3 * 2**30) == "3.0 GiB"
    assert format_bytes(1.5 * 2**20) == "1.5 MiB"


def test_nothing_that_was_counted_remains(workspace, tmp_path):
    """Outputs that their own nodes save are circles that no collector finds: they would stay for the whole run."""

    def count_graphs() -> int:
        gc.collect()
        return sum(type(item) is torch.Tensor and item.grad_fn is not None for item in gc.get_objects())

    trainer = build_trainer(read_recipe(write_recipe(workspace, trainer=TRAINER, output_dir=str(tmp_path))))
    assert count_graphs() == 0
    estimate(trainer)
    assert count_graphs() == 0
