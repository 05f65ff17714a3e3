"""What every test may use: where the reference outputs lie. No test reaches the network."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

ROOT = Path(__file__).resolve().parents[1]

GOLDENS = ROOT / "tests" / "goldens"
"""Reference outputs small enough for the repository."""

SHARED_GOLDENS = ROOT.parent / "shared" / "goldens"
"""All reference outputs, checkpoints included; not everywhere present."""


@pytest.fixture(scope="session")
def shared_goldens() -> Path:
    """The folder of all reference outputs; without it, the test is skipped."""
    if not SHARED_GOLDENS.is_dir():
        pytest.skip("needs the reference checkpoints in ../shared/goldens, which are not on this machine")
    return SHARED_GOLDENS
