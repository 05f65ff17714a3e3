"""Ten visitors at once: every question gets the answer to its own picture, and nobody sees another's turn."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from modeling_llava.inference import ChatSession, load_for_inference
from tests.spaces_demo.conftest import EXAMPLES

pytestmark = pytest.mark.slow

NUM_VISITORS = 10
SECOND_QUESTION = "What color is it?"


@pytest.fixture(scope="module")
def talks() -> list[tuple[dict, list[str]]]:
    """For each visitor an example, and what the model answers to its question and to the second one."""
    session = ChatSession(*load_for_inference())
    examples = json.loads((EXAMPLES / "examples.json").read_text())
    talks = []
    for visitor in range(NUM_VISITORS):
        example = examples[visitor % len(examples)]
        session.reset()
        first = "".join(session.ask(example["question"], images=[EXAMPLES / example["image"]]))
        talks.append((example, [first, "".join(session.ask(SECOND_QUESTION))]))
    return talks


def talk(url: str, example: dict) -> list[list[str]]:
    """Both questions of one visitor; what the page shows after each."""
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)
    picture = handle_file(str(EXAMPLES / example["image"]))
    shown = []
    for message in (
        {"text": example["question"], "files": [picture]},
        {"text": SECOND_QUESTION, "files": []},
    ):
        client.predict(message, api_name="/ask")
        left, _ = client.predict("embedded", "", api_name="/answer")
        shown.append(
            [
                item["text"]
                for line in left
                for item in line["content"]
                if item["type"] == "text" and "<" not in item["text"]
            ]
        )
    client.close()
    return shown


def test_ten_visitors_at_once(demo, talks):
    with ThreadPoolExecutor(NUM_VISITORS) as pool:
        shown = list(pool.map(lambda item: talk(demo.url, item[0]), talks))
    for (example, answers), (after_first, after_second) in zip(talks, shown):
        plain = [text.replace("\\", "") for text in after_second]
        assert after_first == after_second[:2]
        assert plain == [example["question"], answers[0], SECOND_QUESTION, answers[1]]
