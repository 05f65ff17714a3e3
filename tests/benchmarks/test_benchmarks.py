import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import __main__ as command
from benchmarks.llama_cpp import is_installed
from benchmarks.report import HEADLINES, read_results, render, render_headlines, render_table
from benchmarks.roofline import count_operations, find_share
from benchmarks.timing import compare, interleave
from tests.conftest import ROOT

LIMITS = {"float32": {"bytes_per_second": 10e9, "operations_per_second": 100e9}}


def test_a_row_holds_medians_their_ratio_and_its_spread():
    row = compare("decode", [1.0, 2.0, 4.0], [4.0, 4.0, 4.0], unit="tokens/s", amount=10, note="equal")
    assert row == {
        "name": "decode",
        "ours": 5.0,
        "peer": 2.5,
        "ratio": 2.0,
        "spread": [1.0, 4.0],
        "unit": "tokens/s",
        "peer_name": "transformers",
        "note": "equal",
    }


@pytest.mark.parametrize("unit, expected", [("s", 2.0), ("ms", 2000.0), ("MB", 2e-6)])
def test_a_row_converts_to_its_unit(unit, expected):
    assert compare("work", [2.0], [3.0], unit=unit)["ours"] == pytest.approx(expected)


def test_jobs_take_turns_and_a_first_round_does_not_count():
    calls, ticks = [], iter(range(100))
    jobs = {"ours": lambda: calls.append("ours"), "peer": lambda: calls.append("peer")}
    seconds = interleave(jobs, rounds=2, device="cpu", clock=lambda device: next(ticks))
    assert calls == ["ours", "peer"] * 3
    assert seconds == {"ours": [1, 1], "peer": [1, 1]}


@pytest.mark.parametrize(
    "work, expected",
    [
        ({"ours": 2.0, "unit": "s", "bytes": 10e9, "operations": 10e9}, 0.5),
        ({"ours": 2.0, "unit": "s", "bytes": 1e9, "operations": 100e9}, 0.5),
        ({"ours": 100.0, "unit": "ms", "bytes": 1e9}, 1.0),
        # Bytes of one token.
        ({"ours": 5.0, "unit": "tokens/s", "bytes": 1e9}, 0.5),
        ({"ours": 5.0, "unit": "tokens/s"}, None),
    ],
)
def test_the_share_of_the_limit(work, expected):
    assert find_share(work, LIMITS, device="cpu") == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("is_causal, expected", [(False, 2 * 2 * 2 * 3 * 8 * 8 * 16), (True, 2 * 2 * 3 * 8 * 8 * 16)])
def test_attention_is_counted_on_a_cpu(is_causal, expected):
    tensor = torch.randn(2, 3, 8, 16)
    with torch.no_grad():
        job = partial(scaled_dot_product_attention, tensor, tensor, tensor, is_causal=is_causal)
        assert count_operations(job) == expected


def test_a_table_prints_figure_ratio_spread_and_share():
    row = compare("prefill", [0.5], [1.0], bytes=1e9, note="equal logits")
    assert render_table([row], limits=LIMITS, device="cpu").splitlines()[-1] == (
        "| prefill | s | 0.5 | 1 | 2.00 (2.00 to 2.00) | 20% | transformers | equal logits |"
    )


def test_a_report_begins_with_the_newest_row_to_quote_and_names_where_the_peer_is_better():
    (part, name, peer), meaning = next(iter(HEADLINES.items()))

    def build_run(date: str, *, ours: float) -> dict:
        row = compare(name, [ours], [1.0], unit="s") | {"peer_name": peer}
        return {"date": date, "size": "mid", "device": "cpu", "hardware": "2 cores", "parts": {part: [row]}}

    headlines = render_headlines([build_run("2026-11-02", ours=0.5), build_run("2026-11-01", ours=4.0)])
    assert f"| {meaning} | 0.5 s | 1 s | 2.0 | {peer} | {part}: {name} | mid on cpu: 2 cores |" in headlines
    assert f"The peer is better in: {name} ({peer}) 0.25." in headlines
    assert headlines.count(meaning) == 1


def test_a_file_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"date": "2026-11-23"}))
    with pytest.raises(ValueError, match="python -m benchmarks"):
        read_results(path)


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="got --only chat,poetry; expected some of"):
        command.choose_parts("chat,poetry")
    with pytest.raises(ValueError, match="with a choice behind decoding, captioning, training"):
        command.choose_parts("chat:1")
    assert command.choose_parts("chat,memory,chat") == {"chat": {}, "memory": {}}
    chosen = {"decoding": {"batches": (1, 8)}, "training": {"stages": ("lora",)}}
    assert command.choose_parts("decoding:1,decoding:8,training:lora") == chosen


def test_a_part_that_fails_is_named_and_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def measure(self, device: str, size: str, rounds: int) -> Iterator[dict]:
            yield compare("first turn", [1.0], [2.0], bytes=1e9)
            if self.name == "benchmarks.loading":
                raise RuntimeError("no room\non the disk")

    monkeypatch.setattr(command, "import_module", Part)
    monkeypatch.setattr(command, "measure_limits", lambda device: LIMITS)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "loading,chat", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 1
    results = read_results(tmp_path / "results.json")
    assert results["failed"] == {"loading": "RuntimeError: no room"}
    for part in ("loading", "chat"):
        assert [row["name"] for row in results["parts"][part]] == ["first turn"]
    assert results["command"] == f"python -m benchmarks --only loading,chat --out {tmp_path}"
    report = render([tmp_path / "results.json"], tables=[])
    assert "## mid on cpu: loading, chat\n" in report
    assert "loading failed: RuntimeError: no room" in report


@pytest.mark.slow
def test_the_smallest_size_runs_and_is_reported(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--size", "tiny", "--rounds", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    results = read_results(tmp_path / "results.json")
    expected = [part for part in command.PARTS if part != "llama_cpp" or is_installed("cpu")]
    assert list(results["parts"]) == expected
    rows = [row for part in results["parts"].values() for row in part]
    for row in rows:
        for figure in (row["ours"], row["peer"], row["ratio"], *row["spread"]):
            assert math.isfinite(figure) and figure > 0, row
    for limit in results["limits"].values():
        assert all(math.isfinite(figure) and figure > 0 for figure in limit.values())
    report = render([tmp_path / "results.json"], tables=[])
    assert all(f"| {row['name']} |" in report for row in rows)
    assert results["command"] in report.replace("\n", " ")
    assert (tmp_path / "ratios.png").stat().st_size and (tmp_path / "limits.png").stat().st_size
