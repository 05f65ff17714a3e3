"""What keeps visitors private: no metadata in stored pictures, no request to other hosts, no text read as markup, and
nothing of what they send in the log; and how much they may send (`handlers.py` and `routes.py` ask here).

What is surprising: Gradio fetches pictures that programs name by a URL, after a look at whether its host is public,
for which it may ask a name server of Google (Gradio 6.31, processing_utils.py, through safehttpx); and it decodes data
URIs without any limit. Both are refused before that.
"""

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like

from modeling_llava.serving.guard import log_error
from processing_llava.image_limits import ImageLimits
from processing_llava.image_loading import load_image

MAX_PICTURES = 8
"""In a question."""
MAX_CHARACTERS = 20_000
"""Of a question."""
MAX_SYSTEM_CHARACTERS = 4_000
MAX_CONVERSATION_CHARACTERS = 100_000
MAX_CONVERSATION_PICTURES = 32
MAX_PICTURE_BYTES = 20_000_000
UPLOAD_LIMITS = ImageLimits(max_bytes=MAX_PICTURE_BYTES)
MAX_PICTURE_SIDE = 2048
"""In pixels, of what is kept of a picture; the tower of a model takes a third of it."""
_CLEANING = threading.Lock()
"""Of all visitors, one picture is in memory at a time."""

REFUSED_ADDRESS = "got a picture as URL or data URI; expected one that was uploaded, as nothing is fetched; upload it"
JPEG_START = b"\xff\xd8"
ESCAPED = re.compile(r"([!-/:-@\[-`{-~])")
"""ASCII punctuation: what Markdown may read as markup, and reads as itself after a backslash."""
INDENTS = {" ": "&#32;", "\t": "&#9;"}
"""What begins a block of code at the beginning of a line."""


def show_as_text(text: str) -> str:
    """Markdown that shows every character of a text, and nothing else; page.js turns it back."""
    escaped = ESCAPED.sub(r"\\\1", text)
    return re.sub(r"(?<![^\r\n])[ \t]", lambda match: INDENTS[match[0]], escaped)


def clean_picture(data: bytes, name: str) -> tuple[bytes, str]:
    """A picture of a visitor anew, upright and pixels only, and a name for it that tells what it is.

    Raises:
        ValueError: if it is no picture or a hostile one.
    """
    file = io.BytesIO()
    suffix = Path(name).suffix.lower()
    with _CLEANING:
        image = load_image({"bytes": data, "path": name}, limits=UPLOAD_LIMITS, shortest_edge=MAX_PICTURE_SIDE // 3)
        image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE), reducing_gap=3)
        if data.startswith(JPEG_START):
            image.save(file, format="JPEG", quality=95, subsampling=0)
            suffix = suffix if suffix in (".jpg", ".jpeg") else ".jpg"
        else:
            image.save(file, format="PNG", compress_level=1)
            suffix = ".png"
    stem = "".join(letter for letter in Path(name).stem if letter.isalnum() or letter in "._- ")
    return file.getvalue(), (stem.strip(" .")[:80] or "picture") + suffix


class PrivatePage(gr.Blocks):
    """A page that fetches nothing, and keeps what programs send to it out of the log.

    Around its handlers, Gradio refuses arguments of the wrong kind or number with errors that quote them, and prints
    these (Gradio 6.31, queueing.py and routes.py).
    """

    async def process_api(self, block_fn: Any, inputs: list[Any], *arguments: Any, **settings: Any) -> dict[str, Any]:
        try:
            for file in _find_dicts(inputs):
                if is_http_url_like(file.get("path")) or str(file.get("url")).startswith("data:"):
                    raise gr.Error(REFUSED_ADDRESS)
            return await super().process_api(block_fn, inputs, *arguments, **settings)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            log_error(error)
            raise gr.Error(
                f"got a call that cannot be answered ({type(error).__name__}); expected the arguments that view_api() "
                "of gradio_client lists; correct it",
                print_exception=False,
            ) from None


def _find_dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _find_dicts(item)
