"""FateCounts: how many rows had which fate, whichever process has read them."""

from collections.abc import Iterator, Mapping

import torch
from torch.utils.data import get_worker_info

from .row_lengths import CUT, DROPPED, FITS, KEPT, PART, SKIPPED, SPELLED

_COLUMNS = {fate: column for column, fate in enumerate((FITS, KEPT, PART, DROPPED, SKIPPED, CUT, SPELLED))}
_MOST_WORKERS = 1024


class FateCounts(Mapping[str, int]):
    """Counts of a process and of the workers of its data loaders; a fate that no row had is not in them.

    Streaming rows are read by workers, which would count for themselves alone. Each adds to a row of its own in memory
    that they share, so that no lock is needed.
    """

    def __init__(self) -> None:
        self._numbers = torch.zeros(1 + _MOST_WORKERS, len(_COLUMNS), dtype=torch.int64).share_memory_()

    def add(self, fate: str) -> None:
        worker = get_worker_info()
        self._numbers[0 if worker is None else 1 + worker.id, _COLUMNS[fate]] += 1

    def clear(self) -> None:
        self._numbers.zero_()

    def __getitem__(self, fate: str) -> int:
        number = int(self._numbers[:, _COLUMNS[fate]].sum())
        if number == 0:
            raise KeyError(fate)
        return number

    def __iter__(self) -> Iterator[str]:
        return (fate for fate, number in zip(_COLUMNS, self._numbers.sum(dim=0).tolist()) if number)

    def __len__(self) -> int:
        return sum(1 for _ in self)
