"""`llava train RECIPE.yaml`, as a story: model, what trains, rows, batches, training, checkpoint."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoProcessor, PreTrainedModel, set_seed
from transformers.utils import logging
from trl import SFTConfig

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.packed_attention import use_packed_attention
from processing_llava import AnyLlavaProcessor
from processing_llava.collator import LlavaDataCollator
from processing_llava.row_datasets import load_rows
from processing_llava.row_lengths import measure_row, read_image_sizes

from .feature_cache import FeatureCache
from .lora import add_lora, four_bit_config
from .recipe import Recipe
from .token_budget import TokenBudgetBatchSampler
from .trainer import LlavaTrainer, count_parameters, freeze_all_but

logger = logging.get_logger(__name__)

ROWS_PER_PROCESS = 2000
"""Fewer are measured faster by one process than another one starts."""
TRAINER_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "max_length": None,
}
"""LLaVA's schedule; everything can be set in the recipe. TRL's default max_length would cut images."""


def trainer_settings(recipe: Recipe) -> dict[str, Any]:
    """The fields of SFTConfig for a recipe. TRL's own default computes in bfloat16 on processors too."""
    has_gpu = torch.cuda.is_available()
    # TRL keeps the adapters of QLoRA in bfloat16, as its paper does.
    bf16 = recipe.stage == "qlora" or (has_gpu and torch.cuda.is_bf16_supported())
    machine = {"use_cpu": not has_gpu, "bf16": bf16}
    return TRAINER_DEFAULTS | machine | recipe.trainer


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Run a recipe.

    Args:
        resume: Go on from the last complete checkpoint in the output folder; without one, start.

    Returns:
        The folder with the trained model (of a LoRA: the adapter) and its processor, which the Auto classes load.

    Raises:
        ValueError: naming the field or the row that cannot be used.
    """
    arguments = SFTConfig(output_dir=recipe.output_dir, remove_unused_columns=False, **trainer_settings(recipe))
    # Adapters start from random numbers, before the Trainer sets its seed.
    set_seed(arguments.seed)
    processor = load_processor(recipe)
    model = load_model(recipe, bf16=arguments.bf16)
    for part, (total, trained) in count_parameters(model).items():
        logger.warning(f"{part}: {trained:,} of {total:,} parameters train")

    dataset, fates = load_rows(
        recipe.data,
        seed=arguments.seed,
        processor=processor,
        max_length=recipe.max_length,
        too_long=recipe.too_long,
    )
    for fate, number in fates.items():
        logger.warning(f"{number:,} rows: {fate}")

    read_features = None
    if recipe.feature_cache is not None:
        model.to(arguments.device)
        base = model.get_base_model() if recipe.uses_lora else model
        cache = FeatureCache(base, processor, recipe.feature_cache, bf16=arguments.bf16)
        cache.add(image for row in dataset for image in row["images"])
        read_features = cache.read

    batch_sampler = None
    if recipe.tokens_per_batch is not None:
        batch_sampler = plan_batches(dataset, processor, recipe, arguments)
    trainer = LlavaTrainer(
        model,
        arguments,
        recipe=recipe,
        train_dataset=dataset,
        batch_sampler=batch_sampler,
        data_collator=LlavaDataCollator(processor, packed=batch_sampler is not None, read_features=read_features),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(recipe.output_dir) if resume else None)

    if trainer.is_world_process_zero():
        model.to(getattr(torch, recipe.output_dtype)).save_pretrained(recipe.output_dir)
        processor.save_pretrained(recipe.output_dir)
    return Path(recipe.output_dir)


def load_processor(recipe: Recipe) -> AnyLlavaProcessor:
    """The processor of the model, with the conversation format and the image mode of the recipe."""
    chosen = {} if recipe.template is None else {"template": recipe.template}
    processor = AutoProcessor.from_pretrained(recipe.model, **chosen)
    if recipe.image_aspect_ratio is not None:
        processor.image_processor.image_aspect_ratio = recipe.image_aspect_ratio
    return processor


def load_model(recipe: Recipe, *, bf16: bool) -> PreTrainedModel:
    """The model that a recipe starts from, with the parts that it trains ready to train.

    What trains is float32, also where `bf16` computes in bfloat16; what is frozen under a LoRA is then bfloat16 too.
    """
    keeps_bfloat16 = recipe.uses_lora and bf16
    model = AutoModelForVision2Seq.from_pretrained(
        recipe.model,
        dtype=torch.bfloat16 if keeps_bfloat16 else torch.float32,
        attn_implementation=recipe.attn_implementation,
        quantization_config=four_bit_config() if recipe.stage == "qlora" else None,
    )
    # Whatever was loaded, checkpoints are in our layout, so that a run can be resumed from them.
    model.config.source_config = None
    if recipe.tokens_per_batch is not None:
        use_packed_attention(model)
    if recipe.uses_lora:
        return add_lora(model, recipe.lora, trained_parts=recipe.trained_parts)
    freeze_all_but(model, recipe.trained_parts)
    return model


def find_checkpoint(output_dir: str) -> str | None:
    """The last complete checkpoint of a run; one whose writing was interrupted is left out.

    The Trainer writes trainer_state.json last.
    """
    complete = {}
    for state in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            complete[json.loads(state.read_text())["global_step"]] = str(state.parent)
        except (ValueError, KeyError):
            logger.warning(f"{state.parent} is incomplete and is left out")
    return complete[max(complete)] if complete else None


def plan_batches(
    dataset: Dataset | IterableDataset, processor: AnyLlavaProcessor, recipe: Recipe, arguments: SFTConfig
) -> TokenBudgetBatchSampler:
    """Packed batches of a data set whose rows are measured first, in several processes."""
    if not isinstance(dataset, Dataset):
        raise ValueError("got tokens_per_batch for data that is streaming; expected data on disk, or padded batches")
    measured = dataset.map(
        count_tokens,
        fn_kwargs={"processor": processor},
        num_proc=min(os.cpu_count(), 1 + len(dataset) // ROWS_PER_PROCESS),
        remove_columns=dataset.column_names,
        desc="Counting tokens",
    )
    num_tokens = measured["num_tokens"][:]
    num_epochs = math.ceil(arguments.num_train_epochs)
    if arguments.max_steps > 0:
        # No epoch has fewer batches than this, so there are no more epochs than these.
        least = math.ceil(sum(num_tokens) / recipe.tokens_per_batch)
        num_batches = arguments.max_steps * arguments.gradient_accumulation_steps * arguments.world_size
        num_epochs = math.ceil(num_batches / least)
    sampler = TokenBudgetBatchSampler(
        num_tokens,
        measured["num_images"][:],
        max_tokens=recipe.tokens_per_batch,
        max_images=recipe.images_per_batch,
        num_epochs=num_epochs,
        seed=arguments.seed,
        rank=arguments.process_index,
        num_ranks=arguments.world_size,
    )
    share = sum(num_tokens) / (sampler.num_batches * recipe.tokens_per_batch)
    logger.warning(f"{sampler.num_batches:,} packed batches an epoch, {share:.1%} full")
    return sampler


def count_tokens(row: dict[str, Any], processor: AnyLlavaProcessor) -> dict[str, int]:
    """Tokens and images of a row, from the headers of its pictures."""
    sizes = read_image_sizes(row, decode=False)
    return {"num_tokens": measure_row(row, processor, sizes).num_tokens, "num_images": len(sizes)}
