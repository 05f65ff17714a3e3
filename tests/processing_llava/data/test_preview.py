"""Rows as text and as a page, hostile ones included."""

import html.parser
import re
from pathlib import Path

import PIL.Image
import pytest

from processing_llava.data.conversations import convert_record
from processing_llava.data.preview import format_html, format_terminal, list_segments
from processing_llava.data.row_lengths import MeasuredRow, measure_row, read_image_sizes
from processing_llava.image_limits import DEFAULT_LIMITS
from tests.tiny import tiny_processor

HOSTILE = '</pre><script src="//x.example/y.js">1</script><img src=x onerror=y> \x1b]0;title\x07'


@pytest.fixture
def picture(tmp_path) -> Path:
    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def measure(*turns: str | list, images: tuple = (), row_id: str = "7") -> MeasuredRow:
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    row = convert_record({"id": row_id, "images": list(images), "messages": messages}, 0)
    return measure_row(row, tiny_processor(), read_image_sizes(row, decode=True, limits=DEFAULT_LIMITS))


def test_segments_are_the_prompt_with_its_supervised_text_and_images(picture):
    measured = measure(
        "<image>\nWhat?", "A </s> bus.", [{"type": "text", "text": "Write <image>"}], "No.", images=(picture,)
    )
    processor = tiny_processor()
    segments = list_segments(measured, processor)
    prompt = processor.render(measured.row["messages"])
    assert prompt.count("<image>") == 2
    assert "".join("<image>" if segment.is_image else segment.text for segment in segments) == prompt
    assert [segment.text for segment in segments if segment.is_image] == ["[image 40x30: 16 tokens]"]
    assert [segment.text for segment in segments if segment.is_supervised] == [" A </s> bus.</s>", " No.</s>"]


def test_a_terminal_shows_colours_only_on_demand(picture):
    measured = measure("<image>\nWhat?", "A bus.", images=(picture,))
    (plain,) = format_terminal([measured], tiny_processor(), color=False)
    assert "[image 40x30: 16 tokens]\nWhat? ASSISTANT:<< A bus.</s>>>" in plain
    assert "\x1b" not in plain
    (colored,) = format_terminal([measured], tiny_processor(), color=True)
    assert "\x1b[32m A bus.</s>\x1b[0m" in colored


def test_control_characters_do_not_reach_the_terminal():
    measured = measure(HOSTILE, HOSTILE, row_id="\x1b[2J")
    (text,) = format_terminal([measured], tiny_processor(), color=False)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "--- \\x1b[2J: " in text and "\\x1b]0;title\\x07" in text


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_page_holds_text_and_small_pictures_and_nothing_else(picture):
    rows = [measure("<image>\n" + HOSTILE, HOSTILE, images=(picture,), row_id="<b>7"), measure("{Q}", "A")]
    page = format_html(rows, tiny_processor())
    tags = Tags()
    tags.feed(page)
    allowed = {"html", "head", "meta", "title", "style", "body", "p", "section", "h2", "figure", "img", "pre"}
    assert {tag for tag, _ in tags.found} <= allowed | {"mark", "span"}
    images = [attributes["src"] for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/jpeg;base64,")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page
    assert tags.text.count('<script src="//x.example/y.js">') == 2 and "<b>7" in tags.text and "{Q}" in tags.text
    assert "\x1b" not in page
    assert "<mark> &lt;/pre&gt;" in page
