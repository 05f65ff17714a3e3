"""llama.cpp as a peer: it is given the weights that ours has."""

import pytest
import torch

from benchmarks.llama_cpp import interleave_halves, is_installed, measure


def test_halves_of_each_head_are_interleaved():
    rows = torch.arange(8)[:, None].expand(8, 3)
    assert interleave_halves(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_both_compute_the_same_logits():
    if not is_installed("cpu"):
        pytest.skip("needs llama-cpp-python and gguf: pip install llama-cpp-python gguf")
    rows = measure("cpu", "tiny", 1, num_tokens=3)
    assert {row["peer_name"] for row in rows} == {"llama.cpp, F32", "llama.cpp, Q8_0"}
    assert len(rows) == 4
