"""Pictures without metadata, text without markup."""

import html
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from spaces_demo import safety
from spaces_demo.safety import PrivateRoutes, clean_picture, show_as_text


def save_picture(path, **settings) -> None:
    image = Image.new("RGB", (30, 20), "red")
    image.paste("blue", (0, 0, 15, 20))
    image.save(path, **settings)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_cleaned_picture_has_pixels_only_and_stands_upright(tmp_path, format):
    path = tmp_path / "picture.bin"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "SecretCamera"
    settings = {"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {}
    save_picture(path, format=format, **settings)
    # Whatever stands behind the picture is no pixel either.
    path.write_bytes(path.read_bytes() + b"SecretMovie")
    clean_picture(str(path))
    assert b"Secret" not in path.read_bytes()
    with Image.open(path) as image:
        assert image.format == ("JPEG" if format == "JPEG" else "PNG")
        assert not image.getexif()
        assert image.size == ((20, 30) if settings else (30, 20))
        first, last = image.getpixel((5, 5)), image.getpixel((image.width - 5, image.height - 5))
    assert first[2] > 200 > first[0] and last[0] > 200 > last[2]


def test_a_png_keeps_its_pixels_exactly(tmp_path):
    path = tmp_path / "picture.png"
    save_picture(path)
    with Image.open(path) as image:
        before = image.tobytes()
    clean_picture(str(path))
    with Image.open(path) as image:
        assert image.tobytes() == before


def test_what_is_no_picture_is_deleted(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("<svg onload=alert(1)>")
    with pytest.raises(ValueError, match="got a file of SVG"):
        clean_picture(str(path))
    assert not path.exists()


def upload(paths: list) -> tuple[int, str]:
    """What the page answers when Gradio has stored an upload at these paths."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    async def store(request) -> JSONResponse:
        return JSONResponse([str(path) for path in paths])

    with TestClient(PrivateRoutes(Starlette(routes=[Route("/upload", store, methods=["POST"])]))) as client:
        response = client.post("/upload")
    return response.status_code, response.text


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_one_bad_picture_takes_the_whole_upload_with_it(tmp_path, places):
    paths = [tmp_path / "good.png", tmp_path / "bad.png"]
    save_picture(paths[0])
    paths[1].write_text("<svg onload=alert(1)>")
    status, told = upload([paths[place] for place in places])
    assert status == 400 and "got a file of SVG" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["<svg onload=alert(1)>", "<b>no picture</b>", "</p><img src=x>"])
def test_what_is_told_of_an_upload_is_no_markup(tmp_path, content):
    """Gradio's toast would read it."""
    path = tmp_path / "<i>a<i>.svg"
    path.write_text(content)
    status, told = upload([path])
    assert status == 400 and "<" not in told and "&lt;i&gt;a" in told


def test_an_upload_that_fails_in_another_way_leaves_nothing_either(tmp_path, monkeypatch):
    save_picture(tmp_path / "private.png")

    def run_out(path):
        raise MemoryError("private")

    monkeypatch.setattr(safety, "load_image", run_out)
    status, told = upload(list(tmp_path.iterdir()))
    assert status == 500 and "MemoryError" in told and "private" not in told
    assert list(tmp_path.iterdir()) == []


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
