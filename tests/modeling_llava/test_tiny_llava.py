"""The embedded model: held-out questions against what its card claims, within sampling error; and its size."""

import json
import re
from pathlib import Path

import pytest

from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference
from modeling_llava.tiny_llava.concepts import (
    CONCEPTS,
    MASS_NAMES,
    NEW_CONCEPTS,
    PLURAL_NAMES,
    UNSURE_HELDOUT_SLUGS,
    UNSURE_SLUGS,
)
from modeling_llava.tiny_llava.evaluate import evaluate, normalise
from tests.conftest import ROOT

pytestmark = pytest.mark.core

CHECKPOINT = Path(EMBEDDED_MODEL)
RESULTS = json.loads((CHECKPOINT / "heldout_scores.json").read_text())
HELDOUT = ROOT / "tests" / "heldout" / "questions.json"
EXAMPLES = ROOT / "spaces_demo" / "examples"
CARDS = json.loads((EXAMPLES / "examples.json").read_text())


@pytest.fixture(scope="module")
def embedded():
    return load_for_inference()


@pytest.fixture(scope="module")
def scores(embedded):
    return evaluate(*embedded, HELDOUT)[0]


@pytest.mark.parametrize("task", sorted(RESULTS))
def test_held_out_answers_are_as_good_as_claimed(scores, task):
    claimed, measured = RESULTS[task]["accuracy"], scores[task]
    # Both numbers are samples: three standard errors of their difference, and one question for discreteness.
    variance = claimed * (1 - claimed) * (1 / measured["total"] + 1 / RESULTS[task]["total"])
    tolerance = 3 * variance**0.5 + 1 / measured["total"]
    assert measured["accuracy"] >= claimed - tolerance


def test_the_card_prints_the_measured_numbers():
    card = (CHECKPOINT / "README.md").read_text()
    for task, result in RESULTS.items():
        row = re.search(rf"^\| `{task}` \|.*$", card, flags=re.MULTILINE)
        assert row, f"the card has no row for {task}"
        assert f"| {result['accuracy']:.1%} |" in row[0]
        assert f"| {result['total']:,} |" in row[0]


def test_the_checkpoint_fits_into_24_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 24e6


@pytest.mark.parametrize(
    "example", json.loads((EXAMPLES / "examples.json").read_text()), ids=lambda card: card["image"]
)
def test_the_cards_of_the_page_are_answered_right(example, embedded):
    answer = "".join(ChatSession(*embedded).ask(example["question"], images=[EXAMPLES / example["image"]]))
    assert normalise(answer) == normalise(example["expected"])


def test_a_conversation_keeps_the_picture(embedded):
    session = ChatSession(*embedded)
    first = "".join(session.ask("What is this?", images=[EXAMPLES / "twemoji-penguin.png"]))
    second = "".join(session.ask("Is it an animal or a vehicle?"))
    third = "".join(session.ask("Is there a guitar?"))
    assert [normalise(answer) for answer in (first, second, third)] == ["a penguin", "an animal", "no"]


def test_nothing_is_both_taught_and_unsure():
    taught = {slug for names in CONCEPTS.values() for slugs in names.values() for slug in slugs.split()}
    for slugs in (UNSURE_SLUGS, UNSURE_HELDOUT_SLUGS, *NEW_CONCEPTS.values()):
        words = slugs.split()
        assert taught.isdisjoint(words) and len(set(words)) == len(words)
        # Words that a line break cut.
        assert not [word for word in words if word.endswith("-")]
    assert set(UNSURE_SLUGS.split()).isdisjoint(UNSURE_HELDOUT_SLUGS.split())
    names = {name for names in CONCEPTS.values() for name in names}
    assert names >= PLURAL_NAMES | MASS_NAMES
