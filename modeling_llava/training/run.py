"""`llava train RECIPE.yaml`, as a story: model, what trains, rows, batches, training, checkpoint."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoProcessor
from transformers.utils import logging
from trl import SFTConfig

from modeling_llava import AutoModelForVision2Seq
from processing_llava.collator import LlavaDataCollator
from processing_llava.conversations import read_conversations

from .recipe import Recipe
from .trainer import LlavaTrainer, freeze_all_but

logger = logging.get_logger(__name__)

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


def train(recipe: Recipe) -> Path:
    """Run a recipe.

    Returns:
        The folder with the trained model and its processor, which the Auto classes load.

    Raises:
        ValueError: naming the field or the row that cannot be used.
    """
    processor = AutoProcessor.from_pretrained(recipe.model)
    # Weights are trained in float32; `bf16: true` in the recipe computes in bfloat16 beside them.
    model = AutoModelForVision2Seq.from_pretrained(
        recipe.model, dtype=torch.float32, attn_implementation=recipe.attn_implementation
    )

    for part, (total, trained) in freeze_all_but(model, recipe.trained_parts).items():
        logger.warning(f"{part}: {trained:,} of {total:,} parameters train")

    rows = [row for source in recipe.data for row in read_conversations(source.path, source.image_folder)]
    logger.warning(f"{len(rows):,} rows from {', '.join(source.path for source in recipe.data)}")

    settings = TRAINER_DEFAULTS | {"use_cpu": not torch.cuda.is_available()} | recipe.trainer
    trainer = LlavaTrainer(
        model,
        SFTConfig(output_dir=recipe.output_dir, remove_unused_columns=False, **settings),
        recipe=recipe,
        train_dataset=Dataset.from_list(rows),
        data_collator=LlavaDataCollator(processor, max_length=recipe.max_length),
        processing_class=processor,
    )
    trainer.train()

    model.to(getattr(torch, recipe.output_dtype)).save_pretrained(recipe.output_dir)
    processor.save_pretrained(recipe.output_dir)
    return Path(recipe.output_dir)
