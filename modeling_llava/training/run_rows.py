"""The rows of a run: those of its recipe, without an end where they stream, and as packed batches."""

import math
import os
from collections.abc import Sequence

from datasets import Dataset, IterableDataset
from transformers.utils import logging
from trl import SFTConfig

from processing_llava.data.data_sources import DataSource
from processing_llava.data.fate_counts import FateCounts
from processing_llava.data.row_datasets import load_rows
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.text_encoder import list_special_tokens

from .recipe import Recipe
from .token_budget import TokenBudgetBatchSampler

logger = logging.get_logger(__name__)


def read_rows(
    sources: Sequence[DataSource], recipe: Recipe, processor: AnyLlavaProcessor, *, seed: int = 0
) -> tuple[Dataset | IterableDataset, FateCounts]:
    """The rows of some sources of a recipe, and what became of them, which is logged.

    Raises:
        ValueError: naming a row that cannot be used, or if none is left.
    """
    is_measured = recipe.max_length is not None or recipe.tokens_per_batch is not None or recipe.bad_rows == "skip"
    dataset, fates = load_rows(
        sources,
        seed=seed,
        processor=processor if is_measured else None,
        max_length=recipe.max_length,
        too_long=recipe.too_long,
        on_bad_row=recipe.bad_rows,
        num_proc=os.cpu_count(),
        special_tokens=list_special_tokens(processor.tokenizer),
        learn_tokens=processor.learn_tokens,
    )
    name = "eval_data" if sources is recipe.eval_data else "data"
    for fate, number in fates.items():
        logger.warning(f"{number:,} rows of {name}: {fate}")
    if next(iter(dataset), None) is None:
        found = ", ".join(f"{number:,} {fate}" for fate, number in fates.items()) or "none at all"
        raise ValueError(f"got no row in {name} ({found}); expected at least one: raise max_length, or correct data")
    return dataset, fates


def repeat_stream(dataset: IterableDataset, arguments: SFTConfig) -> IterableDataset:
    """Streaming rows without an end.

    Where the Trainer does not know the number of rows, it knows of one epoch only: a run that is resumed after the end
    of a stream would begin with its first rows again.

    Raises:
        ValueError: if nothing says when to stop.
    """
    if arguments.max_steps <= 0:
        raise ValueError("got streaming data, whose rows are not counted; expected a number of steps: set max_steps")
    return dataset.repeat(None)


def plan_batches(dataset: Dataset | IterableDataset, recipe: Recipe, arguments: SFTConfig) -> TokenBudgetBatchSampler:
    """Packed batches of a data set whose rows were measured."""
    if not isinstance(dataset, Dataset):
        raise ValueError("got tokens_per_batch for data that is streaming; expected data on disk, or padded batches")
    lengths = dataset.with_format(None)
    num_tokens = lengths["num_tokens"][:]
    num_epochs = math.ceil(arguments.num_train_epochs)
    if arguments.max_steps > 0:
        # No epoch has fewer batches than this, so there are no more epochs than these.
        least = math.ceil(sum(num_tokens) / recipe.tokens_per_batch)
        num_batches = arguments.max_steps * arguments.gradient_accumulation_steps * arguments.world_size
        num_epochs = math.ceil(num_batches / least)
    sampler = TokenBudgetBatchSampler(
        num_tokens,
        lengths["num_images"][:],
        max_tokens=recipe.tokens_per_batch,
        max_images=recipe.images_per_batch,
        num_epochs=num_epochs,
        seed=arguments.seed,
        rank=arguments.process_index,
        num_ranks=arguments.world_size,
        batches_per_step=arguments.world_size * arguments.gradient_accumulation_steps,
        row_ids=lengths["id"],
    )
    share = sum(num_tokens) / (sampler.num_batches * recipe.tokens_per_batch)
    logger.warning(f"{sampler.num_batches:,} packed batches an epoch, {share:.1%} full")
    return sampler
