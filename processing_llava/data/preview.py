"""Training rows as people read them: supervised text coloured, each image as its size and number of tokens.

Data is not trusted: control characters are written out, so that no row drives the terminal, and the page is text and
small pictures alone, without scripts and without anything to fetch.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from processing_llava.image_limits import ImageLimits
from processing_llava.image_loading import load_image
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.prompts import Prompt, list_template_spans

from .row_lengths import MeasuredRow, read_image_sizes

THUMBNAIL_SIDE = 256

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_GREEN, _CYAN, _PLAIN = "\x1b[32m", "\x1b[36m", "\x1b[0m"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Training rows</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font-family: sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
section {{ display: flex; flex-wrap: wrap; gap: 1em; border-top: 1px solid #ccc; padding: 1em 0 }}
h2 {{ flex-basis: 100%; font-size: 1em; margin: 0 }}
figure {{ margin: 0 }}
pre {{ flex: 1; min-width: 20em; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }}
mark {{ background: #c8f0c8 }}
.image {{ color: #06c }}
</style></head><body>
<p><mark>Marked text</mark> is what the model learns to write.</p>
{sections}
</body></html>
"""


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt: an image, or text that is supervised or is not."""

    text: str
    is_supervised: bool = False
    is_image: bool = False


def make_printable(text: str) -> str:
    """Text with control characters, line breaks and tabs excepted, as `\\x1b`."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def list_segments(measured: MeasuredRow, processor: AnyLlavaProcessor) -> list[Segment]:
    """The prompt of a row in stretches."""
    prompt = processor.render(measured.row["messages"])
    sizes = read_image_sizes(measured.row, decode=True, limits=processor.image_processor.limits)
    counts = processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    names = iter(f"[image {width}x{height}: {count} tokens]" for (height, width), count in zip(sizes, counts))
    segments, position = [], 0
    for start in _find_images(prompt, processor.image_token):
        segments += _split_text(prompt, position, start)
        segments.append(Segment(next(names), is_image=True))
        position = start + len(processor.image_token)
    return segments + list(_split_text(prompt, position, len(prompt)))


def format_terminal(rows: Iterable[MeasuredRow], processor: AnyLlavaProcessor, *, color: bool) -> Iterator[str]:
    """One text for each row; without colour, supervised text stands between `<<` and `>>`."""
    for measured in rows:
        pieces = []
        for segment in list_segments(measured, processor):
            text = make_printable(segment.text)
            if segment.is_supervised:
                text = f"{_GREEN}{text}{_PLAIN}" if color else f"<<{text}>>"
            elif segment.is_image and color:
                text = f"{_CYAN}{text}{_PLAIN}"
            pieces.append(text)
        yield f"--- {make_printable(_headline(measured))}\n{''.join(pieces)}\n"


def format_html(rows: Iterable[MeasuredRow], processor: AnyLlavaProcessor) -> str:
    """One page with all rows, complete in itself."""
    return _PAGE.format(sections="\n".join(_format_section(measured, processor) for measured in rows))


def _format_section(measured: MeasuredRow, processor: AnyLlavaProcessor) -> str:
    pieces = []
    for segment in list_segments(measured, processor):
        text = html.escape(make_printable(segment.text))
        if segment.is_supervised:
            text = f"<mark>{text}</mark>"
        elif segment.is_image:
            text = f'<span class="image">{text}</span>'
        pieces.append(text)
    thumbnails = [_make_thumbnail(image, processor.image_processor.limits) for image in measured.row["images"]]
    pictures = "".join(f'<img src="{thumbnail}" alt="">' for thumbnail in thumbnails)
    title = html.escape(make_printable(_headline(measured)))
    return f"<section><h2>{title}</h2><figure>{pictures}</figure><pre>{''.join(pieces)}</pre></section>"


def _headline(measured: MeasuredRow) -> str:
    return f"{measured.row['id']}: {measured.num_tokens} tokens, {measured.num_supervised} supervised"


def _make_thumbnail(source: str | bytes, limits: ImageLimits) -> str:
    """A data URI."""
    image = load_image(source, limits=limits, shortest_edge=THUMBNAIL_SIDE).copy()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _find_images(prompt: Prompt, image_token: str) -> Iterator[int]:
    """Where the template wrote placeholders; what a user typed is text."""
    pattern = re.compile(re.escape(image_token))
    for span in list_template_spans(prompt):
        yield from (match.start() for match in pattern.finditer(prompt, *span))


def _split_text(prompt: Prompt, start: int, stop: int) -> Iterator[Segment]:
    """Text between two images, cut where supervision begins and ends."""
    for first, last in prompt.assistant_spans:
        first, last = max(first, start), min(last, stop)
        if first < last:
            if start < first:
                yield Segment(prompt[start:first])
            yield Segment(prompt[first:last], is_supervised=True)
            start = last
    if start < stop:
        yield Segment(prompt[start:stop])
