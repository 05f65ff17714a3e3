"""What becomes of what visitors type and upload, and what answers may do to them."""

import io
import json

import pytest
from PIL import ExifTags, Image

from tests.spaces_demo.conftest import EXAMPLES, LEAKING_QUESTION, Visitor

pytestmark = pytest.mark.slow

PENGUIN = EXAMPLES / "twemoji-penguin.png"
MARKUP = "<b>bold</b> *not* </s> <image> [a](http://b.example) `c`\n- 1 &lt; 2"


def test_what_a_visitor_types_is_shown_as_typed_and_edited_as_typed(visit):
    visitor = visit()
    visitor.ask(MARKUP)
    visitor.wait_for_answer(1)
    assert visitor.questions().inner_text().strip() == MARKUP
    assert visitor.questions().locator("b, em, a, code, li, image").count() == 0
    visitor.page.get_by_role("button", name="Edit").click()
    assert visitor.page.locator("textarea.edit-textarea").input_value() == MARKUP
    visitor.page.get_by_role("button", name="Submit").first.click()
    visitor.page.wait_for_function(
        "(text) => document.querySelector('#chats .user-row .message').innerText.trim() === text", arg=MARKUP
    )


def test_an_answer_cannot_load_a_remote_picture(visit, browser, demo, other_host):
    visitor = visit()
    visitor.choose("Model", "leaking")
    visitor.page.locator("#status").get_by_text("leaking").wait_for()
    visitor.ask(LEAKING_QUESTION)
    visitor.wait_for_answer(1)
    picture = visitor.answers().locator("img")
    assert picture.get_attribute("src") == f"http://127.0.0.1:{other_host.port}/leak.png?you=said"
    assert visitor.answers().locator("strong").inner_text() == "Here"
    visitor.page.wait_for_timeout(500)
    assert other_host.requests == []

    # The same page in a browser that ignores the policy does ask.
    with browser.new_context(bypass_csp=True) as context:
        page = context.new_page()
        page.goto(demo.url, wait_until="domcontentloaded")
        careless = Visitor(page)
        careless.choose("Model", "leaking")
        page.locator("#status").get_by_text("leaking").wait_for()
        careless.ask(LEAKING_QUESTION)
        careless.wait_for_answer(1)
        page.wait_for_timeout(500)
    assert other_host.requests == ["/leak.png?you=said"]
    other_host.requests.clear()


def write_photo_with_place(path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "SecretCamera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 51.0, 30.0)
    Image.new("RGB", (200, 120), "red").save(path, exif=exif, comment=b"SecretComment")


def test_metadata_is_gone_from_what_is_stored_and_served(visit, demo, tmp_path):
    photo = tmp_path / "photo.jpg"
    write_photo_with_place(photo)
    with Image.open(photo) as image:
        assert image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    visitor = visit()
    visitor.attach(photo)
    thumbnail = visitor.page.locator("#question .thumbnail-item img").get_attribute("src")
    visitor.ask("What is this?")
    visitor.wait_for_answer(1)
    for address in (thumbnail, visitor.pictures().get_attribute("src")):
        served = visitor.page.request.get(address).body()
        with Image.open(io.BytesIO(served)) as image:
            assert image.size == (120, 200), "upright"
            assert not image.getexif() and "comment" not in image.info
    stored = [path.read_bytes() for path in demo.files.rglob("*") if path.is_file()]
    assert stored and not any(b"Secret" in data for data in stored)


@pytest.mark.parametrize("kind", ["thin", "not a picture", "cut off"])
def test_a_hostile_upload_is_refused_with_a_reason_and_the_page_goes_on(visit, tmp_path, kind):
    path = tmp_path / "picture.png"
    Image.new("L", (1, 6000)).save(path)
    if kind == "not a picture":
        path.write_text("<script>alert(1)</script>")
    elif kind == "cut off":
        path.write_bytes(PENGUIN.read_bytes()[:2000])
    visitor = visit()
    visitor.page.set_input_files("#question input[type=file]", str(path))
    reason = {"thin": "max_aspect_ratio", "not a picture": "no image of a known", "cut off": "cannot be decoded"}[kind]
    visitor.page.get_by_test_id("toast-body").get_by_text(reason).wait_for()
    visitor.shoot(f"hostile-{kind.replace(' ', '-')}")
    assert visitor.page.locator("#question .thumbnail-item").count() == 0
    visitor.ask("What is this?", PENGUIN)
    assert visitor.wait_for_answer(1) == "a penguin"


def test_opinions_go_to_the_file_of_the_operator(visit, demo):
    visitor = visit()
    visitor.page.get_by_text("your rating are stored").wait_for()
    visitor.ask("What is this?", PENGUIN)
    visitor.wait_for_answer(1)
    visitor.page.get_by_role("button", name="Dislike").first.click()
    visitor.page.get_by_test_id("toast-body").get_by_text("Thank you").wait_for()
    record = json.loads(demo.feedback.read_text().splitlines()[-1])
    assert record.pop("time")
    assert record == {
        "model": "embedded",
        "opinion": "Dislike",
        "num_pictures": 1,
        "question": "What is this?",
        "answer": "a penguin",
    }


def test_nothing_that_was_said_is_in_the_log(visit, demo):
    visitor = visit()
    visitor.ask("Is this xyzzy?", PENGUIN)
    visitor.wait_for_answer(1)
    log = demo.log.read_text()
    assert "Running on local URL" in log
    for said in ("xyzzy", "penguin", "What is", "Go on", "twemoji"):
        assert said not in log
