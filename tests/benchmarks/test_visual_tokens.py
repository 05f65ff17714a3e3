"""The benchmark of visual_tokens: its baselines keep what they say, and its smallest run writes its results."""

import json
import sys

import pytest
import torch

from benchmarks.visual_tokens import BLOCKS, build_choices, choose_strided, main, pool

GRID = torch.arange(64.0)[:, None]


@pytest.mark.parametrize("block", BLOCKS.values())
def test_every_method_keeps_as_many(block):
    for choose in build_choices().values():
        assert choose(torch.randn(64, 5), block).shape == (64 // (block[0] * block[1]), 5)


def test_blocks_lie_on_the_grid_of_the_image():
    assert choose_strided(GRID, (2, 4))[:3, 0].tolist() == [10, 14, 26]
    assert pool(GRID, (2, 4))[:3, 0].tolist() == [5.5, 9.5, 21.5]


def test_random_features_keep_their_order_and_differ_from_image_to_image():
    choose = build_choices()["random"]
    first, second = choose(GRID, (2, 2)), choose(GRID, (2, 2))
    assert first.tolist() == sorted(first.tolist())
    assert not torch.equal(first, second)
    assert torch.equal(build_choices()["random"](GRID, (2, 2)), first)


@pytest.mark.slow
def test_the_smallest_run_writes_its_results(tmp_path, monkeypatch, capsys):
    options = ["--samples", "1", "--size", "tiny", "--rounds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["visual_tokens", *options])
    main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["accuracy"]) == list(results["times"]) == list(BLOCKS)
    full = results["accuracy"]["100 %"]
    assert len(full) == 4 and all(scores == full["DivPrune"] for scores in full.values())
    assert [row["tokens"] for row in results["times"].values()] == [576, 288, 144, 72]
    assert (tmp_path / "visual_tokens.png").read_bytes().startswith(b"\x89PNG")
    assert "| DivPrune, all questions |" in capsys.readouterr().out
