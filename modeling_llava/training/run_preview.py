"""What `llava train --preview` prints: the recipe as it was resolved, what trains, the memory of a step, one batch."""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import yaml

from modeling_llava.acceleration.devices import format_bytes
from processing_llava.data.preview import format_terminal
from processing_llava.data.row_lengths import measure_row, read_image_sizes

from .recipe import Recipe
from .run import build_trainer, trainer_settings
from .starting_model import LORA_DEFAULTS, count_elements, count_parameters, part_of
from .step_memory import StepMemory, count_states, estimate_step, free_memory
from .trainer import LlavaTrainer, is_sharded
from .trainer_fields import TRAINER_FIELDS


def preview(recipe: Recipe, *, color: bool) -> Iterator[str]:
    """The sections one by one. Nothing is trained, and nothing is written but the caches of `datasets`.

    Args:
        color: Color supervised text and images in the batch; without, supervised text stands between `<<` and `>>`.

    Raises:
        ValueError: as `run.build_trainer`.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The Trainer makes its output folder, and the features of a tower would be cached.
        trainer = build_trainer(dataclasses.replace(recipe, output_dir=folder, feature_cache=None))
        yield _format_recipe(recipe, checkpointing=trainer.args.gradient_checkpointing)
        yield _format_parameters(trainer)
        yield _preview_memory(trainer, recipe)
        yield from _format_batch(trainer, color=color)


def _preview_memory(trainer: LlavaTrainer, recipe: Recipe) -> str:
    """What a step takes on this device; where the model is sharded, what is sharded.

    The whole of such a model may be more than one device holds, so it does not compute here.
    """
    arguments = trainer.args
    if is_sharded(arguments):
        states = count_states(trainer.model, optim=arguments.optim)
        return _format_states(states, num_processes=arguments.world_size)
    memory = estimate_step(
        trainer.model, trainer.data_collator, trainer.train_dataset, recipe=recipe, arguments=arguments
    )
    return _format_memory(
        memory,
        free=free_memory(trainer.model, arguments),
        checkpointing=arguments.gradient_checkpointing,
        device=str(arguments.device),
    )


def _format_recipe(recipe: Recipe, *, checkpointing: bool) -> str:
    """All fields as YAML, with the defaults of this package for SFTConfig and LoraConfig: a recipe again."""
    settings = trainer_settings(recipe) | {"activation_checkpointing": checkpointing}
    trainer = {name: value for name, value in settings.items() if name in TRAINER_FIELDS}
    lora = LORA_DEFAULTS | recipe.lora if recipe.uses_lora else {}
    fields = dataclasses.asdict(recipe) | {"lora": lora, "trainer": trainer}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _format_parameters(trainer: LlavaTrainer) -> str:
    """A table of the parts of the model: parameters, and with which learning rates how many of them train."""
    optimizer = trainer.create_optimizer()
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    trained: Counter = Counter()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name), rates[id(parameter)]] += count_elements(parameter)
    lines = [("part", "parameters", "train", "learning rate")]
    for part, (total, _) in count_parameters(trainer.model).items():
        groups = [(number, f"{rate:g}") for (name, rate), number in trained.items() if name == part] or [(0, "-")]
        lines += [(part, f"{total:,}", f"{number:,}", rate) for number, rate in groups]
    return _align(lines)


def _format_memory(memory: StepMemory, *, free: int, checkpointing: bool, device: str) -> str:
    """A table of what a step takes, without and with gradient checkpointing."""
    lines = [("memory of a step", "plain", "gradient checkpointing")]
    for name in ("weights", "gradients", "optimizer"):
        size = format_bytes(getattr(memory, name))
        lines.append((name, size, size))
    lines.append(("activations", format_bytes(memory.activations), format_bytes(memory.checkpointed)))
    sums = [format_bytes(memory.add_up(checkpointing=is_on)) for is_on in (False, True)]
    lines.append(("sum", *sums))
    state = "on" if checkpointing else "off"
    return f"{_align(lines)}{format_bytes(free)} free on {device}; gradient checkpointing is {state}\n"


def _format_states(states: dict[str, int], *, num_processes: int) -> str:
    """A table of what a model holds before it is sharded.

    Args:
        states: As `step_memory.count_states` gives it.
    """
    lines = [("memory before sharding", "whole model")]
    lines += [(name, format_bytes(size)) for name, size in (states | {"sum": sum(states.values())}).items()]
    return (
        f"{_align(lines)}FSDP and ZeRO-3 shard all of it between {num_processes} processes, ZeRO-2 gradients and "
        "optimizer; activations, and weights gathered while a layer computes, come on top and are not estimated\n"
    )


def _format_batch(trainer: LlavaTrainer, *, color: bool) -> Iterator[str]:
    """The rows of the first packed batch, or as many first rows as a padded batch has."""
    dataset, processor = trainer.train_dataset, trainer.processing_class
    if trainer.batch_sampler is not None:
        rows = (dataset[index] for index in trainer.batch_sampler.plan(0)[0])
    else:
        rows = islice(dataset, trainer.args.per_device_train_batch_size)
    limits = processor.image_processor.limits
    measured = (measure_row(row, processor, read_image_sizes(row, decode=False, limits=limits)) for row in rows)
    yield from format_terminal(measured, processor, color=color)


def _align(lines: list[tuple[Any, ...]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*lines))
    return "".join(
        line[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], others)) + "\n"
        for line in lines
    )
