"""Every row once, no batch too large, few holes, the same order for the same seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llava.training.packed_batches import TokenBudgetBatchSampler


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 3)), min_size=1, max_size=2500),
    seed=st.integers(0, 5),
    max_images=st.sampled_from([None, 3, 10]),
)
def test_every_row_once_within_both_limits(rows, seed, max_images):
    lengths, images = zip(*rows)
    sampler = TokenBudgetBatchSampler(lengths, images, max_tokens=128, max_images=max_images, seed=seed)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    assert len(sampler) == len(batches)
    for batch in batches:
        assert 0 < sum(lengths[row] for row in batch) <= 128
        assert max_images is None or sum(images[row] for row in batch) <= max_images


def mixture(num_rows: int) -> tuple[list[int], list[int]]:
    """Lengths as in LLaVA's instruction data: two thirds with an image of 576 tokens, one third text."""
    lengths = [(576 if row % 3 else 0) + 20 + row * 7919 % 400 for row in range(num_rows)]
    return lengths, [int(row % 3 > 0) for row in range(num_rows)]


def test_batches_are_nearly_full():
    lengths, images = mixture(5000)
    sampler = TokenBudgetBatchSampler(lengths, images, max_tokens=8192)
    assert sum(lengths) / (len(sampler) * 8192) > 0.97


def test_batches_are_mixed():
    """A batch is a sample of the data, not of one length: its mean length is near that of all rows."""
    lengths, images = mixture(5000)
    mean = sum(lengths) / len(lengths)
    batches = list(TokenBudgetBatchSampler(lengths, images, max_tokens=16384))
    means = [sum(lengths[row] for row in batch) / len(batch) for batch in batches]
    assert sum(0.7 * mean < batch_mean < 1.4 * mean for batch_mean in means) > 0.95 * len(means)


def test_order_depends_on_seed_and_epoch_alone():
    lengths, images = mixture(500)
    first = TokenBudgetBatchSampler(lengths, images, max_tokens=4096, seed=1)
    again = TokenBudgetBatchSampler(lengths, images, max_tokens=4096, seed=1)
    assert list(first) == list(first) == list(again)
    first.set_epoch(1)
    assert list(first) != list(again)
    first.set_epoch(0)
    assert list(first) == list(again)


def test_rows_that_cannot_fit():
    with pytest.raises(ValueError, match="got row 1 with 300 tokens for batches of at most 128"):
        TokenBudgetBatchSampler([100, 300], [0, 0], max_tokens=128)
    with pytest.raises(ValueError, match="got row 'b' with 300 tokens"):
        TokenBudgetBatchSampler([100, 300], [0, 0], max_tokens=128, row_ids=["a", "b"])
    with pytest.raises(ValueError, match="got a row with 5 images for batches of at most 4"):
        TokenBudgetBatchSampler([100, 30], [0, 5], max_tokens=128, max_images=4)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=60, max_size=400), num_ranks=st.integers(1, 3))
def test_every_epoch_has_as_many_batches_on_every_process(lengths, num_ranks):
    samplers = [
        TokenBudgetBatchSampler(
            lengths, [0] * len(lengths), max_tokens=200, num_epochs=3, rank=rank, num_ranks=num_ranks
        )
        for rank in range(num_ranks)
    ]
    for epoch in range(3):
        seen = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler) == len(samplers[0])
            assert all(0 < sum(lengths[row] for row in batch) <= 200 for batch in batches)
            seen += [row for batch in batches for row in batch]
        assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_processes_have_like_batches_at_the_same_time(num_ranks):
    lengths, images = mixture(20000)
    samplers = [
        TokenBudgetBatchSampler(lengths, images, max_tokens=8192, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    for counts, limit in ((images, 1.03), (lengths, 1.03)):
        work = torch.tensor([[sum(counts[row] for row in batch) for batch in sampler] for sampler in samplers]).float()
        assert (work.max(dim=0).values / work.mean(dim=0)).mean() < limit


def test_steps_come_in_random_order():
    """Not first those without pictures, and last those that are full of them."""
    lengths, images = mixture(20000)
    batches = TokenBudgetBatchSampler(lengths, images, max_tokens=8192, num_ranks=4).plan(0)
    work = torch.tensor([sum(images[row] for row in batch) for batch in batches]).float()
    places = torch.arange(len(work)).float()
    assert torch.corrcoef(torch.stack([work, places]))[0, 1].abs() < 0.1


def test_one_process_that_gathers_batches_takes_the_steps_of_several():
    lengths, images = mixture(970)
    settings = {"max_tokens": 4096, "batches_per_step": 4}
    ranks = [list(TokenBudgetBatchSampler(lengths, images, **settings, rank=rank, num_ranks=2)) for rank in range(2)]
    alone = list(TokenBudgetBatchSampler(lengths, images, **settings))
    # An odd number of them would be made even for two processes.
    assert len(alone) % 2 == 0
    assert alone == [batch for step in zip(*ranks) for batch in step]


def test_too_few_rows_for_the_processes():
    with pytest.raises(ValueError, match="got 2 rows for 4 batches"):
        TokenBudgetBatchSampler([5, 5], [0, 0], max_tokens=10, num_ranks=4)
