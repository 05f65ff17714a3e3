"""What becomes of what visitors type and upload, and what answers may do to them."""

import base64
import io
import json
import urllib.error
import urllib.request

import pytest
from PIL import ExifTags, Image

from tests.spaces_demo.conftest import EXAMPLES, LEAKING_QUESTION, Visitor, start_demo

pytestmark = pytest.mark.slow

PENGUIN = EXAMPLES / "twemoji-penguin.png"
MARKUP = "<b>bold</b> *not* </s> <image> [a](http://b.example) `c`\n- 1 &lt; 2\n\n\tx <b>y\n    z"


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
    visitor.page.locator("#status b").get_by_text("leaking").wait_for()
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
        page.locator("#status b").get_by_text("leaking").wait_for()
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


@pytest.mark.parametrize("kind", ["thin", "not a picture", "cut off", "svg"])
def test_a_hostile_upload_is_refused_with_a_reason_and_the_page_goes_on(visit, tmp_path, kind):
    path = tmp_path / "picture.png"
    Image.new("L", (1, 6000)).save(path)
    if kind == "not a picture":
        path.write_text("<script>alert(1)</script>")
    elif kind == "svg":
        path = tmp_path / "<b>picture<b>.png"
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"></svg>')
    elif kind == "cut off":
        path.write_bytes(PENGUIN.read_bytes()[:2000])
    visitor = visit()
    visitor.page.set_input_files("#question input[type=file]", str(path))
    reason = {
        "thin": "max_aspect_ratio",
        "not a picture": "no image of a known",
        "cut off": "cannot be decoded",
        # Its name is shown as it is, and is no markup.
        "svg": "<b>picture<b>.png",
    }[kind]
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
    visitor.page.get_by_role("button", name="Feedback").first.hover()
    visitor.page.get_by_text("Wrong", exact=True).first.click()
    while "Wrong" not in demo.feedback.read_text():
        visitor.page.wait_for_timeout(50)
    visitor.page.wait_for_timeout(500)
    records = [json.loads(line) for line in demo.feedback.read_text().splitlines()]
    assert [record["opinion"] for record in records] == ["Dislike", "Wrong"]
    assert records[0].pop("time")
    assert records[0] == {
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


def post(url: str, data: list) -> str:
    """What a program gets that calls without gradio_client, which would count arguments and open files."""
    request = urllib.request.Request(url, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}") as response:
        return response.read().decode()


def test_nothing_of_a_malformed_call_is_in_the_log(demo):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(demo.url, verbose=False)
    for endpoint, *arguments in (
        ("/ask", {"text": ["xyzzy"], "files": []}),
        ("/ask", {"text": "What?", "files": "xyzzy"}),
        ("/answer", "xyzzy", ""),
        ("/answer", "embedded", "", "as trained", "as trained", "", "xyzzy"),
    ):
        with pytest.raises(AppError, match=r"got a call that cannot be answered|xyzzy"):
            client.predict(*arguments, api_name=endpoint)
    client.close()
    stolen = {"text": "What?", "files": [{"path": "/etc/xyzzy", "meta": {"_type": "gradio.FileData"}}]}
    for endpoint, arguments, reason in (("answer", ["xyzzy"], "ValueError"), ("ask", [stolen], "InvalidPathError")):
        told = post(f"{demo.url}/gradio_api/call/{endpoint}", arguments)
        assert f"got a call that cannot be answered ({reason})" in told
    log = demo.log.read_text()
    assert "ValidationError" in log and "InvalidPathError" in log, "the operator does not learn of it"
    assert "xyzzy" not in log


def test_a_picture_from_the_camera_is_uploaded_like_any_other(demo):
    """Gradio would decode a data URI without the limits of uploads, and keep its metadata."""
    with urllib.request.urlopen(f"{demo.url}/config") as response:
        calls = json.load(response)["dependencies"]
    camera = next(call["id"] for call in calls if "change" in [event for _, event in call["targets"]])
    uri = f"data:image/png;base64,{base64.b64encode(PENGUIN.read_bytes()).decode()}"
    body = {"fn_index": camera, "data": [{"path": None, "url": uri}, {"text": "", "files": []}], "session_hash": "a"}
    request = urllib.request.Request(
        f"{demo.url}/gradio_api/run/predict", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="500") as refused:
        urllib.request.urlopen(request)
    assert b"got a picture as URL or data URI" in refused.value.read()


# Gradio's own check of addresses trusts this machine here, as it does any public one.
WITH_TRUST = """
import sys
import safehttpx
from modeling_llava.cli import main

async def trust(hostname):
    return "127.0.0.1"

safehttpx.async_validate_url = trust
sys.exit(main(["demo", *sys.argv[1:]]))
"""


def test_no_address_is_fetched_for_a_stranger(other_host, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    address = f"http://127.0.0.1:{other_host.port}/picture.png"
    with start_demo(tmp_path, command=("-c", WITH_TRUST)) as demo:
        client = Client(demo.url, verbose=False)
        with pytest.raises(AppError, match="got a picture as URL or data URI"):
            client.predict({"text": "What?", "files": [handle_file(address)]}, api_name="/ask")
        inside = {"path": "x", "files": [handle_file(address)]}
        with pytest.raises(AppError, match="got a picture as URL or data URI"):
            client.predict(inside, api_name="/ask")
        client.close()
        for route in ("file=", "file/"):
            for path in (address, address.replace(":", "%3A").replace("/", "%2F")):
                with pytest.raises(urllib.error.HTTPError, match="403") as refused:
                    urllib.request.urlopen(f"{demo.url}/gradio_api/{route}{path}")
                assert b"got a picture as URL" in refused.value.read()
    assert other_host.requests == []
