"""Pictures without metadata, text without markup."""

import html
import io
import re
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from spaces_demo import routes, safety
from spaces_demo.routes import PrivateRoutes, build_middleware
from spaces_demo.safety import clean_picture, show_as_text


def encode_picture(**settings) -> bytes:
    image = Image.new("RGB", (30, 20), "red")
    image.paste("blue", (0, 0, 15, 20))
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_cleaned_picture_has_pixels_only_and_stands_upright(format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "SecretCamera"
    settings = {"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {}
    # Whatever stands behind the picture is no pixel either.
    cleaned, name = clean_picture(encode_picture(format=format, **settings) + b"SecretMovie", "picture.bin")
    assert b"Secret" not in cleaned
    assert name == ("picture.jpg" if format == "JPEG" else "picture.png")
    with Image.open(io.BytesIO(cleaned)) as image:
        assert image.format == ("JPEG" if format == "JPEG" else "PNG")
        assert not image.getexif()
        assert image.size == ((20, 30) if settings else (30, 20))
        first, last = image.getpixel((5, 5)), image.getpixel((image.width - 5, image.height - 5))
    assert first[2] > 200 > first[0] and last[0] > 200 > last[2]


def test_a_png_keeps_its_pixels_exactly():
    data = encode_picture(format="PNG")
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(clean_picture(data, "a.png")[0])) as after:
        assert before.tobytes() == after.tobytes()


@pytest.fixture
def upload(tmp_path):
    """What the page answers to an upload of these (name, data), and where it stores them."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    page = SimpleNamespace(upload_file_set=set())
    gradio = Starlette(routes=[Route("/gradio_api/login_check", lambda request: PlainTextResponse("null"))])

    def send(*files: tuple[str, bytes]) -> tuple[int, str]:
        with TestClient(PrivateRoutes(gradio, page=page, folder=tmp_path)) as client:
            response = client.post("/gradio_api/upload", files=[("files", file) for file in files])
        stored = {str(path) for path in tmp_path.rglob("*") if path.is_file()}
        assert stored == page.upload_file_set == set(response.json() if response.status_code == 200 else ())
        return response.status_code, response.text

    return send


SVG = b"<svg onload=alert(1)>"


def test_one_bad_picture_takes_the_whole_upload_with_it(upload):
    good, bad = ("good.png", encode_picture(format="PNG")), ("bad.png", SVG)
    for files in ((good, bad), (bad, good)):
        status, told = upload(*files)
        assert status == 400 and "got a file of SVG" in told
    assert upload(good, good)[0] == 200


@pytest.mark.parametrize("content", ["<svg onload=alert(1)>", "<b>no picture</b>", "</p><img src=x>"])
def test_what_is_told_of_an_upload_is_no_markup(upload, content):
    """Gradio's toast would read it."""
    status, told = upload(("<i>a<i>.svg", content.encode()))
    assert status == 400 and "<" not in told and "&lt;i&gt;a" in told


def test_an_upload_that_fails_in_another_way_leaves_nothing_either(upload, monkeypatch):
    def run_out(source, **settings):
        raise MemoryError("private")

    monkeypatch.setattr(safety, "load_image", run_out)
    status, told = upload(("private.png", encode_picture(format="PNG")))
    assert status == 500 and "MemoryError" in told and "private" not in told


def test_a_page_that_is_full_says_so(upload, monkeypatch):
    monkeypatch.setattr(routes, "MAX_STORED_BYTES", 10)
    status, told = upload(("a.png", encode_picture(format="PNG")))
    assert status == 400 and "no room for more pictures" in told


LETTERS = st.sampled_from("\n\t ab1.<b&;>") | st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])


@settings(deadline=None)
@given(st.text(LETTERS))
@example("a\n\n\tb <b>")
@example("    a")
def test_markdown_shows_every_character_and_no_markup(text):
    from markdown_it import MarkdownIt

    shown = MarkdownIt("commonmark", {"html": True}).render(show_as_text(text))
    assert set(re.findall(r"<[^>]*>", shown)) <= {"<p>", "</p>", "<br />"}
    plain = html.unescape(re.sub(r"<[^>]*>", "", shown))
    assert [line.split() for line in plain.splitlines() if line.strip()] == [
        line.split() for line in text.splitlines() if line.strip()
    ]


def test_a_space_may_be_shown_on_the_hub_and_has_any_name(tmp_path, monkeypatch):
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    monkeypatch.setenv("SPACE_ID", "ada/llava")
    monkeypatch.setenv("SPACE_HOST", "ada-llava.hf.space")
    page = SimpleNamespace(share_url=None)
    app = Starlette(middleware=build_middleware(page, tmp_path, allow_hosts=[]))
    with TestClient(app) as client:
        for host in ("ada-llava.hf.space", "llava.example.org", "10.0.0.1:7860"):
            shown = client.get("/", headers={"Host": host})
            assert shown.status_code == 404
            assert "frame-ancestors 'self' https://huggingface.co" in shown.headers["Content-Security-Policy"]
            for origin, status in (
                (f"https://{host}", 404),
                ("https://ada-llava.hf.space", 404),
                ("https://huggingface.co", 404),
                ("https://evil.hf.space", 403),
                ("https://huggingface.co.example", 403),
            ):
                assert client.get("/", headers={"Host": host, "Origin": origin}).status_code == status


def test_the_public_address_of_share_is_a_name_of_the_page_once_there_is_one(tmp_path, monkeypatch):
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    monkeypatch.setenv("GRADIO_ROOT_PATH", "https://proxy.example.org/llava")
    page = SimpleNamespace(share_url=None)
    app = Starlette(middleware=build_middleware(page, tmp_path, allow_hosts=["box.local"]))
    with TestClient(app) as client:
        for share_url, name, status in (
            (None, "abc.gradio.live", 403),
            ("https://abc.gradio.live", "abc.gradio.live", 404),
            ("https://abc.gradio.live", "def.gradio.live", 403),
            (None, "box.local:7860", 404),
            (None, "proxy.example.org", 404),
        ):
            page.share_url = share_url
            assert client.get("/", headers={"Host": name}).status_code == status
