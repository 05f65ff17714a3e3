"""`llava train RECIPE.yaml`, as a story: model, what trains, rows, batches, memory, training, checkpoint."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import AttentionInterface, PreTrainedModel, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging
from trl import SFTConfig

from modeling_llava.acceleration.devices import format_bytes
from modeling_llava.acceleration.fused_layers import fuse_norms
from modeling_llava.acceleration.packed_attention import NAME, packed_attention_forward
from modeling_llava.checkpoints.shared_values import check_processor
from processing_llava.data.collator import LlavaDataCollator
from processing_llava.transformers_versions import CHECKPOINTING_FIELD

from .feature_cache import FeatureCache
from .packed_batches import plan_batches, read_rows, report_shared_rows
from .recipe import Recipe
from .run_folder import (
    EarlierRun,
    WholeBest,
    check_resumable,
    check_settings,
    explain_disk,
    find_checkpoint,
    lock_folder,
    refuse_earlier_run,
)
from .run_log import StreamReport, TrainingRecord
from .starting_model import count_parameters, load_model, load_processor
from .step_memory import estimate_step, free_memory
from .trainer import LlavaTrainer, is_sharded
from .trainer_fields import FREE_FIELDS, REPORTS, list_reports

logger = logging.get_logger(__name__)

TRAINER_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    CHECKPOINTING_FIELD: False,
    "max_length": None,
    "remove_unused_columns": False,
}
"""LLaVA's schedule; the recipe can set all but the last two. By default TRL cuts rows at 1024 tokens, and with them
images (TRL 1.16, trainer/sft_config.py)."""


def trainer_settings(recipe: Recipe) -> dict[str, Any]:
    """The fields of SFTConfig for a recipe.

    TRL's own default computes in bfloat16 on CPUs too (TRL 1.16, trainer/base_config.py).
    """
    has_gpu = torch.cuda.is_available()
    # TRL keeps the adapters of QLoRA in bfloat16, as its paper does (TRL 1.16, trainer/sft_trainer.py).
    bf16 = recipe.stage == "qlora" or (has_gpu and torch.cuda.is_bf16_supported())
    # A GPU would wait while images are prepared; on a CPU the same cores do both.
    machine = {"use_cpu": not has_gpu, "bf16": bf16, "dataloader_num_workers": 4 if has_gpu else 0}
    evaluation = {"eval_strategy": "epoch"} if recipe.eval_data else {}
    settings = TRAINER_DEFAULTS | machine | evaluation | recipe.trainer
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if name in recipe.trainer:
            settings[CHECKPOINTING_FIELD] = settings.pop(name)
    for name in ("adam_beta1", "adam_beta2"):
        if name in settings:
            # torch refuses a whole number beside another (torch 2.13, optim/adam.py).
            settings[name] = float(settings[name])
    return settings | {"report_to": list_reports(settings)}


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, trainer_class: type[LlavaTrainer] = LlavaTrainer
) -> Path:
    """Run a recipe.

    Args:
        resume: Go on from the last whole checkpoint in the output folder; without one, start.
        overwrite: Remove what an earlier run left in the output folder, after the first step.
        trainer_class: One with another optimizer, for example.

    Returns:
        The folder with the trained model (of a LoRA: the adapter) and its processor, which the Auto classes load.

    Raises:
        ValueError: naming the field or the row that cannot be used, the disk that takes no file, or another run in
            the output folder, earlier or at the same time.
    """
    if resume and overwrite:
        raise ValueError("got resume and overwrite; expected one of them: overwrite removes what resume goes on from")
    with contextlib.ExitStack() as stack:
        stack.enter_context(explain_disk(recipe.output_dir))
        if os.environ.get("RANK", "0") == "0":
            stack.enter_context(lock_folder(recipe.output_dir))
        checkpoint = find_checkpoint(recipe.output_dir) if resume else None
        if not overwrite:
            refuse_earlier_run(recipe.output_dir, resume=resume, checkpoint=checkpoint)
        trainer = build_trainer(recipe, trainer_class)
        if overwrite:
            trainer.add_callback(EarlierRun(recipe.output_dir))
        trainer.add_callback(TrainingRecord(recipe, trainer.train_dataset))
        if checkpoint is not None:
            check_resumable(checkpoint)
            check_settings(checkpoint, trainer.resume_settings)
            trainer.add_callback(WholeBest())
        with explain_settings(recipe, is_over=lambda: trainer.run_log.has_stepped):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_trained()
    return Path(recipe.output_dir)


def build_trainer(recipe: Recipe, trainer_class: type[LlavaTrainer] = LlavaTrainer) -> LlavaTrainer:
    """Everything up to the first step.

    Raises:
        ValueError: naming the field or the row that cannot be used.
    """
    with explain_settings(recipe):
        arguments = SFTConfig(output_dir=recipe.output_dir, **trainer_settings(recipe))
    _check_device(arguments)
    # transformers adds kubeflow where its variables are set (5.23, training_args.py).
    arguments.report_to = [name for name in arguments.report_to if name in REPORTS]
    _check_reports(arguments.report_to)
    # Adapters start from random numbers, before the Trainer sets its seed.
    set_seed(arguments.seed)
    processor = load_processor(recipe)
    model = load_model(recipe, bf16=arguments.bf16)
    base = model.get_base_model() if recipe.uses_lora else model
    check_processor(base.config, processor)
    # The norms of QLoRA have weights of 32 bits for inputs of 16 (PEFT 0.21, utils/other.py), which no single kernel
    # takes; those of a sharded model have no shape yet.
    if arguments.device.type == "cuda" and recipe.stage != "qlora" and not is_sharded(arguments):
        fuse_norms(base.base_model.language_model)
    for part, (total, trained) in count_parameters(model).items():
        logger.warning(f"{part}: {trained:,} of {total:,} parameters train")

    dataset, fates = read_rows(recipe.data, recipe, processor, seed=arguments.seed)
    eval_dataset, _ = read_rows(recipe.eval_data, recipe, processor) if recipe.eval_data else (None, None)
    if eval_dataset is not None:
        report_shared_rows(eval_dataset, dataset)

    read_features = None
    if recipe.feature_cache is not None:
        model.to(arguments.device)
        cache = FeatureCache(base, processor, recipe.feature_cache, bf16=arguments.bf16)
        for rows in (dataset, eval_dataset) if recipe.eval_data else (dataset,):
            cache.add(rows, on_bad_row=recipe.bad_rows)
        read_features = cache.read

    if isinstance(dataset, IterableDataset):
        # The Trainer takes rows that it cannot count for one epoch (transformers 5.23, trainer.py): a run that is
        # resumed after the end of a stream would begin with its first rows again. max_steps says when to stop.
        dataset = dataset.repeat(None)
    batch_sampler = plan_batches(dataset, recipe, arguments) if recipe.tokens_per_batch is not None else None
    collator = LlavaDataCollator(
        processor, packed=batch_sampler is not None, read_features=read_features, on_bad_row=recipe.bad_rows
    )
    if not {"gradient_checkpointing", "activation_checkpointing"} & recipe.trainer.keys():
        _decide_checkpointing(model, collator, dataset, recipe, arguments)
    if recipe.compile_blocks:
        compile_blocks(base, checkpointing=arguments.gradient_checkpointing)
    with explain_settings(recipe):
        return trainer_class(
            model,
            arguments,
            recipe=recipe,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            batch_sampler=batch_sampler,
            data_collator=collator,
            processing_class=processor,
            callbacks=[StreamReport(fates)] if isinstance(dataset, IterableDataset) else None,
        )


@contextlib.contextmanager
def explain_settings(recipe: Recipe, *, is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Make one line of what TRL, transformers, accelerate and torch raise for a value that they cannot use.

    Args:
        is_over: Whether a step was taken: what goes wrong then is no setting.

    Raises:
        ValueError: naming the fields of the recipe whose values they judge, instead of an error of any other kind.
    """
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        names = [name for name in FREE_FIELDS if name in recipe.trainer]
        # Those of this package say more, and memory that is short is no mistake of a value.
        # So does a worker of a data loader, which sends its traceback (torch 2.13, _utils.py): its error is of a row.
        is_clear = isinstance(error, ValueError) and (
            str(error).startswith("got ") or "DataLoader worker" in str(error)
        )
        if not names or is_over() or is_clear or isinstance(error, torch.OutOfMemoryError):
            raise
        given = ", ".join(f"trainer.{name}={recipe.trainer[name]!r}" for name in names)
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"got {given[:300]}, with which no step can be taken here ({type(error).__name__}: {reason}); expected "
            "values that this machine and these versions take: correct one, or take it out"
        ) from error


def _check_device(arguments: SFTConfig) -> None:
    """Refuse what has an effect on a GPU alone.

    Raises:
        ValueError: naming the field.
    """
    if arguments.device.type == "cpu":
        for name in ("fp16", "activation_offloading"):
            if getattr(arguments, name):
                raise ValueError(
                    f"got trainer.{name}=True on a CPU, where it has no effect; expected false: take it out"
                )


def _check_reports(names: list[str]) -> None:
    """Refuse a logger that is not installed, before the model is loaded.

    Raises:
        ValueError: naming it.
    """
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise ValueError(
                f"got trainer.report_to={name!r}, which is not installed; expected it, or none: pip install {name}"
            )


def _decide_checkpointing(
    model: PreTrainedModel,
    collator: LlavaDataCollator,
    dataset: Dataset | IterableDataset,
    recipe: Recipe,
    arguments: SFTConfig,
) -> None:
    """Turn gradient checkpointing on in `arguments` if a step would not fit into the memory of the device."""
    if is_sharded(arguments):
        logger.warning("gradient checkpointing is off: the memory of a sharded model is not estimated")
        return
    memory = estimate_step(model, collator, dataset, recipe=recipe, arguments=arguments)
    free = free_memory(model, arguments)
    # All processes must compute alike, and the fullest device decides.
    is_needed = not all(gather_object([memory.fits(free)]))
    arguments.gradient_checkpointing = arguments.activation_checkpointing = is_needed
    logger.warning(
        f"gradient checkpointing is {'on' if is_needed else 'off'}: a step without it needs about "
        f"{format_bytes(memory.add_up(checkpointing=False))}, and {format_bytes(free)} are free on {arguments.device}"
    )


def compile_blocks(model: PreTrainedModel, *, checkpointing: bool) -> None:
    """Let torch compile the blocks of the language model, once for all of them, when they are first used.

    `torch_compile` of TrainingArguments compiles everything else too, and again for batches of other shapes. The
    attention of packed rows stays as it is: the compiler would take every set of lengths for a new program.

    Args:
        checkpointing: The compiler gives up on a block that is computed again and has something left out in it; its
            attention and its MLP are then compiled each for itself.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention_forward))
    for block in model.base_model.language_model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            for part in block.children() if checkpointing else [block]:
                part.compile()
