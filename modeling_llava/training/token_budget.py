"""Batches of about equally many tokens, filled like bins.

What is surprising: rows are put into batches in random order and never sorted, which would fill batches a little
better. A batch stays a random sample this way; batches of one length nearly stop a small model from learning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import Sampler

MAX_OPEN = 16
"""Batches that are being filled at a time: more leave fewer holes, and take longer to plan."""


@dataclass
class Batch:
    """Rows, and what they add up to."""

    rows: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_images: int = 0


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches with at most `max_tokens` tokens and `max_images` images, every row once in each epoch.

    The order depends on seed and epoch alone, so a run that is resumed sees the same batches.

    Args:
        lengths: Tokens of each row, image features counted.
        num_images: Images of each row.
        max_tokens: The largest sum of lengths in a batch.
        max_images: The largest number of images in a batch; None for any. It balances the work of the tower.
        seed: Of the shuffling.

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
        seed: int = 0,
    ) -> None:
        longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if longest is not None and lengths[longest] > max_tokens:
            raise ValueError(
                f"got row {longest} with {lengths[longest]} tokens for batches of at most {max_tokens}; expected "
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
        self.epoch = 0
        self._planned: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def plan(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, in order."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        closed: list[Batch] = []
        open_batches: list[Batch] = []
        for row in torch.randperm(len(self.lengths), generator=generator).tolist():
            fitting = [batch for batch in open_batches if self._fits(batch, row)]
            if fitting:
                batch = max(fitting, key=lambda batch: batch.num_tokens)
            else:
                if len(open_batches) == MAX_OPEN:
                    fullest = max(open_batches, key=lambda batch: batch.num_tokens)
                    open_batches.remove(fullest)
                    closed.append(fullest)
                batch = Batch()
                open_batches.append(batch)
            batch.rows.append(row)
            batch.num_tokens += self.lengths[row]
            batch.num_images += self.num_images[row]
        # The emptiest come last here, and a schedule should not end on them.
        batches = [batch.rows for batch in closed + open_batches]
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]

    def _fits(self, batch: Batch, row: int) -> bool:
        if batch.num_tokens + self.lengths[row] > self.max_tokens:
            return False
        return self.max_images is None or batch.num_images + self.num_images[row] <= self.max_images

    def _current(self) -> list[list[int]]:
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, self.plan(self.epoch))
        return self._planned[1]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())
