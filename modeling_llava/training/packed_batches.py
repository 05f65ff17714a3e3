"""The rows of a run, and packed batches of them with about equally many tokens, filled like bins.

What is surprising: rows are put into batches in random order and never sorted, which would fill batches a little
better: a batch stays a random sample this way. And every epoch has equally many batches, since the Trainer takes the
number of the first epoch for all (transformers 5.23, trainer.py): the rows of a batch too many would be lost. Batches
that are computed beside each other, one by each process, are alike in images and tokens: the slowest of them decides
how long a step takes.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset, IterableDataset
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.utils import logging
from trl import SFTConfig

from processing_llava.data.data_sources import DataSource
from processing_llava.data.row_datasets import FateCounts, count_shared_rows, load_rows
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.prompt_ids import list_special_tokens

from .recipe import Recipe

logger = logging.get_logger(__name__)


def read_rows(
    sources: Sequence[DataSource], recipe: Recipe, processor: AnyLlavaProcessor, *, seed: int = 0
) -> tuple[Dataset | IterableDataset, FateCounts]:
    """The rows of some sources of a recipe, and what became of those that are too long or bad, which is logged.

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
        with_digests=bool(recipe.eval_data),
    )
    name = "eval_data" if sources is recipe.eval_data else "data"
    for fate, number in fates.items():
        logger.warning(f"{number:,} rows of {name}: {fate}")
    if next(iter(dataset), None) is None:
        found = ", ".join(f"{number:,} {fate}" for fate, number in fates.items()) or "none at all"
        raise ValueError(f"got no row in {name} ({found}); expected at least one: raise max_length, or correct data")
    return dataset, fates


def report_shared_rows(eval_dataset: Dataset, dataset: Dataset | IterableDataset) -> None:
    """Say how many rows are evaluated and trained on, as their loss tells nothing of other rows."""
    if isinstance(dataset, IterableDataset):
        logger.warning("rows of eval_data were not looked for among streaming data: keep them apart")
        return
    number = count_shared_rows(eval_dataset, dataset)
    if number:
        logger.warning(
            f"{number:,} of {len(eval_dataset):,} rows of eval_data are trained on too, so that their loss tells "
            "nothing of other rows: correct path and split of eval_data"
        )


@dataclass
class _Batch:
    """Rows, and what they add up to."""

    rows: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_images: int = 0


class TokenBudgetBatchSampler(BatchRebalanceSampler):
    """Batches with at most `max_tokens` tokens and `max_images` images, every row once in each epoch.

    The order depends on seed and epoch alone, so a run that is resumed sees the same batches. It extends the one class
    whose batches the Trainer takes as they are, for each process its own (transformers 5.23, trainer.py).

    Args:
        lengths: Tokens of each row, image features counted.
        num_images: Images of each row.
        max_tokens: The largest sum of lengths in a batch.
        max_images: The largest number of images in a batch; None for any. It balances the work of the tower.
        num_epochs: Epochs that will be run.
        seed: Seed of the shuffling.
        rank: Which process asks; process r takes every `num_ranks`-th batch, from the r-th on.
        num_ranks: Number of processes.
        batches_per_step: Batches that the optimizer takes together, of all processes; a multiple of `num_ranks`. One
            process that gathers as many takes the same steps as several.
        row_ids: Id of each row, for messages; None names rows by their positions.

    Raises:
        ValueError: if a row alone is larger than a batch may be.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        num_images: Sequence[int],
        *,
        max_tokens: int,
        max_images: int | None = None,
        num_epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        batches_per_step: int = 1,
        row_ids: Sequence[str] | None = None,
    ) -> None:
        longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if longest is not None and lengths[longest] > max_tokens:
            name = longest if row_ids is None else repr(row_ids[longest])
            raise ValueError(
                f"got row {name} with {lengths[longest]} tokens for batches of at most {max_tokens}; expected "
                "shorter rows: raise tokens_per_batch, or lower max_length"
            )
        if max_images is not None and max(num_images, default=0) > max_images:
            raise ValueError(
                f"got a row with {max(num_images)} images for batches of at most {max_images}; expected fewer: raise "
                "images_per_batch"
            )
        self.lengths = lengths
        self.num_images = num_images
        self.max_tokens = max_tokens
        self.max_images = max_images
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.batches_per_step = max(batches_per_step, num_ranks)
        self.epoch = 0
        most = max(len(self._fill(epoch)) for epoch in range(num_epochs))
        self.num_batches = -(-most // num_ranks) * num_ranks
        if self.num_batches > len(lengths):
            raise ValueError(
                f"got {len(lengths)} rows for {self.num_batches} batches; expected at least one row for each batch of "
                f"each of {num_ranks} processes"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def plan(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch for all processes, in order; `num_batches` in every epoch."""
        batches = self._fill(epoch)
        while len(batches) < self.num_batches:
            longest = max(batches, key=len)
            batches.append([longest.pop() for _ in range(len(longest) // 2)])
        size = self.batches_per_step
        if size > 1:
            batches.sort(key=self._measure)
        num_steps = len(batches) // size
        generator = torch.Generator().manual_seed(self.seed + epoch)
        # The emptiest come last, and a schedule should not end on them.
        order = torch.randperm(num_steps, generator=generator).tolist()
        steps = [batches[step * size : (step + 1) * size] for step in order]
        # An epoch ends on a step that is not whole.
        return [batch for step in steps for batch in step] + batches[num_steps * size :]

    def _measure(self, rows: list[int]) -> tuple[int, int]:
        return sum(self.num_images[row] for row in rows), sum(self.lengths[row] for row in rows)

    def _fill(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        closed: list[_Batch] = []
        open_batches: list[_Batch] = []
        for row in torch.randperm(len(self.lengths), generator=generator).tolist():
            fitting = [batch for batch in open_batches if self._fits(batch, row)]
            if fitting:
                batch = max(fitting, key=lambda batch: batch.num_tokens)
            else:
                # More open batches leave fewer holes, and take longer to plan.
                if len(open_batches) == 16:
                    fullest = max(open_batches, key=lambda batch: batch.num_tokens)
                    open_batches.remove(fullest)
                    closed.append(fullest)
                batch = _Batch()
                open_batches.append(batch)
            batch.rows.append(row)
            batch.num_tokens += self.lengths[row]
            batch.num_images += self.num_images[row]
        return [batch.rows for batch in closed + open_batches]

    def _fits(self, batch: _Batch, row: int) -> bool:
        if batch.num_tokens + self.lengths[row] > self.max_tokens:
            return False
        return self.max_images is None or batch.num_images + self.num_images[row] <= self.max_images

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.plan(self.epoch)[self.rank :: self.num_ranks])

    def __len__(self) -> int:
        return self.num_batches // self.num_ranks


def plan_batches(dataset: Dataset, recipe: Recipe, arguments: SFTConfig) -> TokenBudgetBatchSampler:
    """Packed batches of rows that were measured."""
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
