"""Talking with models on the page: a real browser, real checkpoints, a second process."""

import time

import pytest

from tests.spaces_demo.conftest import EXAMPLES, Visitor, start_demo

pytestmark = pytest.mark.slow

PENGUIN, STRAWBERRY, GUITAR = (EXAMPLES / f"twemoji-{name}.png" for name in ("penguin", "strawberry", "guitar"))


WATCH_ANSWER = """() => {
  window.seen = [];
  const note = () => window.seen.push(document.querySelector("#chats [data-testid=bot]")?.innerText.trim());
  new MutationObserver(note).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


def test_upload_ask_and_a_second_turn_about_the_same_picture(visit):
    visitor = visit()
    visitor.shoot("empty")
    visitor.page.evaluate(WATCH_ANSWER)
    visitor.ask("What is this?", PENGUIN)
    assert visitor.wait_for_answer(1) == "a penguin"
    seen = list(dict.fromkeys(filter(None, visitor.page.evaluate("window.seen"))))
    assert len(seen) > 1, "the answer did not stream"
    assert seen == sorted(seen, key=len) and all("a penguin".startswith(text) for text in seen)
    first = visitor.read_caption(1)
    assert first["image_tokens"] == 64 and first["reused"] < first["prompt"]
    visitor.ask("Is it an animal or a vehicle?")
    assert visitor.wait_for_answer(2) == "an animal"
    second = visitor.read_caption(2)
    assert second["image_tokens"] == 64 and second["reused"] >= first["prompt"]
    visitor.shoot("answers")


def test_an_answer_streams_and_stops(visit):
    visitor = visit()
    visitor.ask_for_an_endless_answer()
    lengths, deadline = set(), time.monotonic() + 20
    while len(lengths) < 4 and time.monotonic() < deadline:
        lengths.add(len(visitor.answers().first.inner_text()))
    assert len(lengths) == 4
    visitor.shoot("streaming")
    visitor.page.locator("#question .stop-button").click()
    visitor.captions().get_by_text("stopped").wait_for()
    length = len(visitor.answers().first.inner_text())
    visitor.page.wait_for_timeout(500)
    assert len(visitor.answers().first.inner_text()) == length, "the answer grew after it was stopped"
    assert visitor.textbox.is_enabled()


def test_editing_an_earlier_question_keeps_its_picture_and_forgets_what_came_after(visit):
    visitor = visit()
    visitor.ask("What is this?", STRAWBERRY)
    assert visitor.wait_for_answer(1) == "a strawberry"
    visitor.ask("Is it a strawberry?")
    visitor.wait_for_answer(2)
    visitor.page.get_by_role("button", name="Edit").first.click()
    box = visitor.page.locator("textarea.edit-textarea")
    assert box.input_value() == "What is this?"
    box.fill("What color is it?")
    visitor.page.get_by_role("button", name="Submit").first.click()
    visitor.answers().get_by_text("red", exact=True).wait_for()
    visitor.wait_for_answer(1)
    assert visitor.questions().count() == visitor.answers().count() == visitor.pictures().count() == 1


def test_no_question_can_be_edited_while_one_waits(visit):
    waiting, busy = visit(), visit()
    waiting.ask("What is this?", PENGUIN)
    waiting.wait_for_answer(1)
    busy.ask_for_an_endless_answer()
    waiting.ask("Is it an animal or a vehicle?")
    waiting.page.locator("#question .stop-button").wait_for()
    edit = waiting.page.get_by_role("button", name="Edit")
    edit.first.wait_for(state="detached")
    busy.page.locator("#question .stop-button").click()
    assert waiting.wait_for_answer(2) == "an animal"
    edit.nth(1).wait_for()


def test_retry_asks_the_chosen_model_again_and_undo_gives_the_question_back(visit):
    visitor = visit()
    visitor.ask("What is this?", PENGUIN)
    visitor.wait_for_answer(1)
    visitor.choose("Model", "adapter")
    visitor.page.locator("#status b").get_by_text("adapter").wait_for()
    visitor.page.get_by_role("button", name="Retry").click()
    visitor.captions().get_by_text("adapter · first token").wait_for()
    assert visitor.wait_for_answer(1) == "a penguin"
    assert visitor.answers().count() == 1
    visitor.page.get_by_role("button", name="Undo").click()
    visitor.page.locator("#question .thumbnail-item").wait_for()
    assert visitor.textbox.input_value() == "What is this?"
    assert visitor.questions().count() == 0


def test_clearing_forgets_everything(visit):
    visitor = visit()
    visitor.ask("What is this?", PENGUIN)
    visitor.wait_for_answer(1)
    with visitor.page.expect_response("**/run/predict"):
        visitor.page.get_by_role("button", name="Clear").click()
    visitor.page.locator("button.example").first.wait_for()
    visitor.ask("What is this?")
    visitor.wait_for_answer(1)
    assert visitor.read_caption(1)["image_tokens"] == 0


def test_clearing_while_an_answer_streams_forgets_it(visit):
    visitor = visit()
    visitor.ask_for_an_endless_answer()
    visitor.page.get_by_role("button", name="Clear").click()
    visitor.page.locator("button.example").first.wait_for()
    visitor.page.wait_for_timeout(1000)
    assert visitor.questions().count() == visitor.answers().count() == 0
    visitor.choose("Model", "embedded")
    visitor.page.locator("#status b").get_by_text("embedded").wait_for()
    visitor.ask("What is this?", PENGUIN)
    assert visitor.wait_for_answer(1) == "a penguin"
    assert visitor.questions().count() == visitor.answers().count() == 1


def test_another_model_answers_after_it_was_chosen(visit):
    visitor = visit()
    visitor.ask("What is this?", GUITAR)
    assert visitor.wait_for_answer(1) == "a guitar"
    visitor.choose("Model", "adapter")
    visitor.page.locator("#status b").get_by_text("adapter").wait_for()
    visitor.ask("What is this?")
    assert visitor.wait_for_answer(2) == "a guitar"
    assert [text.split(" · ")[0] for text in visitor.captions().all_inner_texts()] == ["embedded", "adapter"]


WATCH_STATUS = """() => {
  window.seen = [];
  const note = () => window.seen.push(document.querySelector("#status").innerText);
  new MutationObserver(note).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


def test_a_model_that_is_loaded_shows_how_far_it_is(browser, checkpoints, tmp_path):
    """In a demo of its own, because nobody may have chosen the model before."""
    arguments = [argument for label in ("embedded", "endless") for argument in ("--model", checkpoints[label])]
    with start_demo(tmp_path, *arguments) as demo, browser.new_context() as context:
        page = context.new_page()
        page.goto(demo.url)
        visitor = Visitor(page)
        page.evaluate(WATCH_STATUS)
        visitor.choose("Model", "endless")
        page.locator("#status b").get_by_text("endless").wait_for()
        seen = page.evaluate("window.seen")
    assert any("Loading endless" in text for text in seen), seen


def test_a_model_too_big_for_the_memory_is_refused_and_the_chosen_one_goes_on(visit):
    visitor = visit()
    visitor.choose("Model", "giant")
    toast = visitor.page.get_by_test_id("toast-body")
    toast.get_by_text("Not loaded: got").wait_for()
    assert "GiB of memory on cpu; giant needs" in toast.inner_text()
    visitor.shoot("memory")
    assert visitor.page.get_by_label("Model", exact=True).input_value() == "embedded"
    visitor.ask("What is this?", PENGUIN)
    assert visitor.wait_for_answer(1) == "a penguin"


def test_two_models_answer_the_same_turn_side_by_side(visit):
    visitor = visit()
    visitor.ask("What is this?", PENGUIN)
    visitor.wait_for_answer(1)
    visitor.choose("Compare with", "adapter")
    visitor.page.locator("#status b").get_by_text("adapter").wait_for()
    visitor.ask("Is it an animal or a vehicle?")
    answers = [visitor.wait_for_answer(2, column=column) for column in (0, 1)]
    assert answers == ["an animal", "an animal"]
    assert visitor.captions(1).nth(1).inner_text().startswith("adapter")
    # The earlier turn, which only the first model was asked, is what the second one goes on from.
    assert visitor.captions(1).nth(0).inner_text().startswith("embedded")
    left, right = (visitor.chats.nth(column).bounding_box() for column in (0, 1))
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]
    visitor.shoot("comparison")
    visitor.choose("Compare with", "no other model")
    visitor.chats.nth(1).wait_for(state="hidden")
    visitor.ask("Is it a vehicle?")
    visitor.wait_for_answer(3)


def test_what_it_looks_at(visit):
    visitor = visit()
    visitor.ask("What is this?", PENGUIN)
    visitor.wait_for_answer(1)
    visitor.page.get_by_role("button", name="Show for the last answer").click()
    view = visitor.page.get_by_alt_text("Where the model looked in picture 1 for the word penguin")
    view.wait_for()
    assert visitor.page.locator("#words label").all_inner_texts() == ["a", "penguin"]
    visitor.shoot("attention")
    before = view.get_attribute("src")
    assert before.startswith("data:image/jpeg")
    visitor.page.get_by_label("Layers").click()
    visitor.page.get_by_role("option", name="last third").click()
    visitor.page.wait_for_function("(before) => document.querySelector('#view img').src !== before", arg=before)
    visitor.page.locator("#words label", has_text="a").first.click()
    visitor.page.get_by_alt_text("Where the model looked in picture 1 for the word a", exact=True).wait_for()


def test_several_pictures_pasted_dropped_and_uploaded(visit):
    visitor = visit()
    visitor.attach(PENGUIN)
    for number, event in enumerate(("paste", "drop"), start=2):
        visitor.page.evaluate(
            """([event, bytes]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], event + ".png", {type: "image/png"}));
              const [name, options] = event === "paste"
                ? ["textarea", {clipboardData: data}] : [".full-container", {dataTransfer: data}];
              const type = event === "paste" ? ClipboardEvent : DragEvent;
              document.querySelector("#question " + name)
                .dispatchEvent(new type(event, {...options, bubbles: true, cancelable: true}));
            }""",
            [event, list(STRAWBERRY.read_bytes())],
        )
        visitor.page.locator("#question .thumbnail-item").nth(number - 1).wait_for()
    visitor.ask("What do you see?")
    visitor.wait_for_answer(1)
    assert visitor.read_caption(1)["image_tokens"] == 3 * 64
    assert visitor.pictures().count() == 3


def test_a_picture_from_the_camera(visit):
    visitor = visit()
    visitor.open("Camera")
    visitor.page.get_by_role("button", name="Click to Access Webcam").click()
    visitor.page.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
    visitor.shoot("camera")
    visitor.page.get_by_role("button", name="capture photo").click()
    visitor.page.locator("#question .thumbnail-item").wait_for()
    visitor.ask("What is this?")
    visitor.wait_for_answer(1)
    assert visitor.read_caption(1)["image_tokens"] == 64


def test_a_picture_without_a_question_stays_in_the_text_box(visit):
    visitor = visit()
    visitor.attach(PENGUIN)
    visitor.textbox.press("Enter")
    visitor.page.get_by_test_id("toast-body").get_by_text("Type a question").wait_for()
    assert visitor.page.locator("#question .thumbnail-item").count() == 1
    visitor.ask("What is this?")
    assert visitor.wait_for_answer(1) == "a penguin"


def test_a_visitor_who_leaves_does_not_keep_the_others_waiting(visit):
    leaving = visit()
    leaving.ask_for_an_endless_answer(seed=1)
    leaving.page.close()
    staying = visit()
    staying.ask("What is this?", PENGUIN)
    assert staying.wait_for_answer(1) == "a penguin"
    assert staying.read_caption(1)["seconds"] < 5
