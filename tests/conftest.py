"""What every test may use: where the reference outputs lie. No test reaches the network."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

ROOT = Path(__file__).resolve().parents[1]

GOLDENS = ROOT / "tests" / "goldens"
"""Reference outputs small enough for the repository."""

SHARED_GOLDENS = ROOT.parent / "shared" / "goldens"
"""All reference outputs, checkpoints included; not everywhere present."""


def list_versions() -> list[str]:
    """Installed versions of what setup.cfg gives a range for, beside those that all tests run with."""
    tested = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    floors = (ROOT / ".ci" / "constraints-floor.txt").read_text()
    return [
        f"{name} {version(name)}" + ("" if version(name).split("+")[0] == pin else f" (all tests run with {pin})")
        for name, pin in tested
        if f"{name}==" in floors
    ]


def pytest_report_header() -> list[str]:
    return [f"versions: {', '.join(list_versions())}"]


def pytest_terminal_summary(terminalreporter, exitstatus: int) -> None:
    """Name the release that may have broken something."""
    others = [line for line in list_versions() if "(" in line]
    if exitstatus == pytest.ExitCode.TESTS_FAILED and others:
        terminalreporter.write_line(f"FAILED with other versions than those of constraints.txt: {', '.join(others)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_goldens() -> Path:
    """The folder of all reference outputs; a stranger's machine skips the test, CI fails without it."""
    if not SHARED_GOLDENS.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI has no {SHARED_GOLDENS}: the reference checkpoints must lie beside the clone")
        pytest.skip("needs the reference checkpoints in ../shared/goldens, which are not on this machine")
    return SHARED_GOLDENS
