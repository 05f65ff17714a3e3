"""Benchmarks run on one thread, and set that for the whole process."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Later tests compare with processes that have as many threads as there are cores."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
