"""Programs that call the page: ten visitors at once, who learn nothing of each other; settings; too little memory."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from modeling_llava.inference.chat_session import ChatSession
from modeling_llava.inference.loading import load_for_inference
from processing_llava.image_loading import load_image
from spaces_demo.models import DemoMenu, Settings
from tests.spaces_demo.conftest import EXAMPLES, start_demo

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


def ask(url: str, question: str, *pictures, model: str = "embedded", **settings) -> tuple[str, str]:
    """The answer to a new visitor, and its caption."""
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)
    try:
        client.predict({"text": question, "files": [handle_file(str(path)) for path in pictures]}, api_name="/ask")
        left, _ = client.predict(model, "", **settings, api_name="/answer")
    finally:
        client.close()
    text, caption = (item["text"].replace("\\", "") for item in left[-1]["content"])
    return text, caption


def test_nobody_learns_from_what_is_reused_what_others_asked(demo):
    picture = EXAMPLES / "twemoji-guitar.png"
    for question in ("My PIN is 4711", "My PIN is 4711", "My PIN is 4"):
        _, caption = ask(demo.url, question, picture)
        assert " 0 of " in caption, caption


def test_every_setting_of_a_call_reaches_the_model(demo):
    chosen = {
        "template": "vicuna_v1",
        "tile_mode": "square",
        "system": "Be brief.",
        "temperature": 1.7,
        "top_p": 0.85,
        "max_new_tokens": 6,
        "seed": 7,
    }
    path, question = EXAMPLES / "twemoji-bus.png", "What do you see in this picture?"
    content = [{"type": "image", "image": load_image(path)}, {"type": "text", "text": question}]
    menu = DemoMenu([])
    *_, (expected, statistics) = menu.answer("embedded", [{"role": "user", "content": content}], Settings(**chosen))
    text, caption = ask(demo.url, question, path, **chosen)
    assert text == expected
    assert int(re.search(r"of (\d+) tokens reused", caption)[1]) == statistics.num_prompt_tokens


# A machine whose memory ends while the second model is loaded.
WITHOUT_MEMORY = """
import sys
import torch
from modeling_llava.cli import main
from modeling_llava.serving import model_menu

load = model_menu.load_for_inference

def run_out(name, **settings):
    return load(name, **settings) if name == model_menu.EMBEDDED_MODEL else torch.empty(2**50)

model_menu.load_for_inference = run_out
sys.exit(main(["demo", *sys.argv[1:]]))
"""


def test_memory_that_runs_out_while_a_model_is_loaded_is_said_and_the_page_goes_on(checkpoints, tmp_path):
    from gradio_client.exceptions import AppError

    arguments = [argument for label in ("embedded", "adapter") for argument in ("--model", checkpoints[label])]
    with start_demo(tmp_path, *arguments, command=("-c", WITHOUT_MEMORY)) as demo:
        with pytest.raises(AppError, match="got too little memory for adapter"):
            ask(demo.url, "What is this?", model="adapter")
        text, _ = ask(demo.url, "What is this?", EXAMPLES / "twemoji-penguin.png")
        assert text == "a penguin"
