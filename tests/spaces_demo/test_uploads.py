"""What strangers upload to a page that runs: what is no picture is refused, and nothing of it stays."""

import json
import stat
import struct
import time
import zlib
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.spaces_demo.conftest import PENGUIN, list_pictures, upload
from tests.spaces_demo.requests_of_strangers import MULTIPART, begin, form, part, send

pytestmark = pytest.mark.usefixtures("nothing_is_logged")


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    pieces = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in (*chunks, (b"IEND", b"")):
        pieces.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(pieces)


WITHOUT_PALETTE = png(
    (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)), (b"IDAT", zlib.compress((b"\0" + b"\1" * 8) * 8))
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><b>xyzzy</b></svg>'
BAD_UPLOADS = {
    "no palette": form(part(WITHOUT_PALETTE)),
    "svg": form(part(SVG, filename="<b>xyzzy</b>.svg")),
    "text": form(part(b"xyzzy")),
    "empty": form(part(b"")),
    "one of two": form(part(PENGUIN), part(SVG)),
    "cut picture": form(part(PENGUIN[:2000])),
    "no end": part(PENGUIN) + part(PENGUIN)[:900],
    "no form": PENGUIN,
    "a field": form(part(b"xyzzy", filename=None)),
    "a large field": form(part(b"x" * 3_000_000, filename=None)),
    "nine": form(*[part(PENGUIN)] * 9),
    "a thousand": form(*[part(b"x")] * 1000),
    "large": form(part(b"x" * 21_000_000)),
    "a long head": form(part(PENGUIN, filename="x" * 100_000)),
}


@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_a_bad_upload_leaves_nothing(page, kind):
    before = list_pictures(page)
    response = upload(page, BAD_UPLOADS[kind])
    if kind == "no end":
        # What is there is whole, and the rest is not kept.
        assert response.status in (200, 400)
        for path in set(list_pictures(page)) - set(before):
            path.unlink()
    else:
        assert response.status in (0, 400, 413), response
    assert "\n" not in response.text and "<" not in response.text
    assert list_pictures(page) == before


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["length", "chunks"])
def test_an_upload_that_is_cut_half_way_leaves_nothing(page, kind, share):
    before = list_pictures(page)
    body = form(part(PENGUIN + b"xyzzy" * 400_000))
    cut = body[: int(len(body) * share)]
    head = {"Content-Length": str(len(body))} if kind == "length" else {"Transfer-Encoding": "chunked"}
    connection = begin(page.url, "POST", "/gradio_api/upload", MULTIPART | head)
    connection.sendall(cut if kind == "length" else f"{len(cut):x}\r\n".encode() + cut + b"\r\n")
    time.sleep(0.3)
    assert list_pictures(page) == before, "it lies there while it comes"
    connection.close()
    time.sleep(0.3)
    assert list_pictures(page) == before


@pytest.mark.parametrize(
    "filename, stored",
    [
        ("holiday.png", "holiday.png"),
        ("../../etc/passwd", "passwd.png"),
        ("..", "picture.png"),
        ("a.html", "a.png"),
        ("<b>.svg", "b.png"),
        ("x" * 500 + ".png", "x" * 80 + ".png"),
        ("", "picture.png"),
    ],
)
def test_a_picture_is_stored_under_a_name_that_tells_its_kind(page, filename, stored):
    (path,) = json.loads(upload(page, form(part(PENGUIN, filename=filename))).text)
    assert Path(path).name == stored and len(Path(path).parent.name) == 32
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    served = send(page.url, "GET", f"/gradio_api/file={quote(path)}")
    assert served.status == 200 and served.headers["content-type"] == "image/png"


FORM_DATA = "multipart/form-data"
NO_FORMS = ["", "text/plain", FORM_DATA, f"{FORM_DATA}; boundary=", f"{FORM_DATA}; boundary=a b"]


@pytest.mark.parametrize("kind", NO_FORMS)
def test_an_upload_that_is_no_form_is_refused(page, kind):
    headers = {"Content-Type": kind or None}
    assert send(page.url, "POST", "/gradio_api/upload", headers=headers, body=form(part(PENGUIN))).status == 400


def test_the_progress_of_an_upload_is_told_at_once(page):
    response = send(page.url, "GET", "/gradio_api/upload_progress?upload_id=xyzzy")
    assert response.status == 200 and '"done"' in response.text
