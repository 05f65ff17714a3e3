"""What strangers send costs little, whether it is handled or refused: measured in processes of their own."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.processing_llava.hostile_images import HANDLED, PREPARED, REFUSED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")


@pytest.fixture(scope="module")
def costs() -> dict[str, dict]:
    command = [sys.executable, "-m", "tests.processing_llava.hostile_images"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return json.loads(output)


PREPARED_NAMES = [f"{name}, {kind}" for name in HANDLED for kind in PREPARED]


@pytest.mark.parametrize("name", [*HANDLED, *REFUSED, *PREPARED_NAMES])
def test_at_most_200_milliseconds_and_64_megabytes(name, costs):
    cost = costs[name]
    assert cost["seconds"] < 0.2 and cost["bytes"] < 64e6, cost


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_was_got_expected_and_to_do(name, costs):
    outcome = costs[name]["outcome"]
    assert outcome.startswith("ValueError: got ") and "; expected " in outcome and outcome.count(";") >= 2


@pytest.mark.parametrize("name", [*HANDLED, *PREPARED_NAMES])
def test_handled(name, costs):
    assert costs[name]["outcome"].startswith("(")
