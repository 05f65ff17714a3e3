"""What strangers send costs little, whether it is handled or refused: measured in a process of its own."""

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.processing_llava.hostile_images import HANDLED, LARGE_ARRAYS, OF_ANY_SIZE, PREPARED, REFUSED
from tests.processing_llava.hostile_objects import HANDLED_OBJECTS, REFUSED_OBJECTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")


@pytest.fixture(scope="module")
def costs() -> dict[str, dict]:
    command = [sys.executable, "-m", "tests.processing_llava.hostile_images"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return json.loads(output)


LOADED = {**HANDLED, **HANDLED_OBJECTS}
PREPARED_NAMES = [f"{name}, {kind}" for name in {**LOADED, **LARGE_ARRAYS} for kind in PREPARED]


def check_cost(cost):
    assert cost["seconds"] < 0.2 and cost["bytes"] < 64e6, cost


def is_refusal(outcome):
    has_parts = outcome.startswith("ValueError: got ") and "; expected " in outcome and outcome.count(";") >= 2
    return has_parts and outcome.isprintable() and len(outcome) < 1000


@pytest.mark.parametrize("name", [*LOADED, *REFUSED, *REFUSED_OBJECTS, *PREPARED_NAMES])
def test_at_most_200_milliseconds_and_64_megabytes(name, costs):
    check_cost(costs[name])


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_every_size_is_refused_or_takes_as_little(name, costs):
    """The largest one that is handled costs most: its time may double on another machine, its memory may not."""
    sizes = [cost for other, cost in costs.items() if re.match(rf"{re.escape(name)}, [\d.]+ megapixels", other)]
    for cost in sizes:
        check_cost(cost)
        assert cost["outcome"].startswith("(") or is_refusal(cost["outcome"]), cost
    handled = [cost for cost in sizes if cost["outcome"].startswith("(")]
    assert bool(handled) == (name != "BMP without rows")
    hints = [cost["outcome"] for cost in sizes if "pixels; expected max_" in cost["outcome"]]
    assert all(re.search(r"ImageLimits\(max_(memory|milliseconds)=", hint) for hint in hints)


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_OBJECTS])
def test_refused_with_what_was_got_expected_and_to_do(name, costs):
    assert is_refusal(costs[name]["outcome"]), costs[name]


@pytest.mark.parametrize("name", [*LOADED, *PREPARED_NAMES])
def test_handled(name, costs):
    assert costs[name]["outcome"].startswith("("), costs[name]
