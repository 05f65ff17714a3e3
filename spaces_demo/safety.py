"""What keeps visitors private: no metadata in stored pictures, no request to other hosts, no text read as markup, and
nothing of what they send in the log.

What is surprising: Gradio shows an uploaded picture before any handler sees it. Pictures are therefore cleaned between
Gradio's own upload route and its answer, so that no address of a picture with metadata ever exists. And Gradio fetches
pictures that programs name by a URL, after a look at whether its host is public, for which it may ask a name server of
Google (Gradio 6.31, processing_utils.py, through safehttpx); and it decodes data URIs without any limit. Both are
refused before that.
"""

import html
import json
import logging
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from processing_llava.image_loading import load_image

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        # An answer with ![](https://host/?what-you-said) must not reach that host.
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "connect-src 'self' data: blob:",
        # The page of Gradio 6.31 starts with an inline script and sets styles on elements.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)

logger = logging.getLogger(__name__)

REFUSED_ADDRESS = "got a picture as URL or data URI; expected one that was uploaded, as nothing is fetched; upload it"
FETCHED = re.compile(r"/file[=/]https?://")
"""Routes for files (Gradio 6.31, routes.py), with a URL."""

JPEG_START = b"\xff\xd8"
ESCAPED = re.compile(r"([!-/:-@\[-`{-~])")
"""ASCII punctuation: what Markdown may read as markup, and reads as itself after a backslash."""
INDENTS = {" ": "&#32;", "\t": "&#9;"}
"""What begins a block of code at the beginning of a line."""


def show_as_text(text: str) -> str:
    """Markdown that shows every character of a text, and nothing else; page.js turns it back."""
    escaped = ESCAPED.sub(r"\\\1", text)
    return re.sub(r"(?<![^\r\n])[ \t]", lambda match: INDENTS[match[0]], escaped)


def clean_picture(path: str) -> None:
    """Rewrites a picture in place: upright, pixels only.

    Raises:
        ValueError: if it is no picture or a hostile one; the file is deleted.
    """
    try:
        image = load_image(Path(path))
    except ValueError:
        Path(path).unlink(missing_ok=True)
        raise
    with open(path, "rb") as file:
        is_jpeg = file.read(2) == JPEG_START
    pixels = Image.new("RGB", image.size)
    pixels.paste(image)
    if is_jpeg:
        pixels.save(path, format="JPEG", quality=95, subsampling=0)
    else:
        pixels.save(path, format="PNG", compress_level=1)


def log_error(error: Exception) -> None:
    """What went wrong and where; not the message, which may hold what a visitor sent."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s\n%s", type(error).__name__, frames)


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


class PrivateRoutes:
    """Middleware: the content security policy on every page, only clean pictures after an upload, nothing fetched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: list[Message] = []

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
            await send(message)

        async def hold(message: Message) -> None:
            held.append(message)

        if FETCHED.search(scope["path"]):
            await PlainTextResponse(REFUSED_ADDRESS, status_code=403)(scope, receive, send_with_policy)
            return
        if scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send_with_policy)
            return
        await self.app(scope, receive, hold)
        if held[0]["status"] == 200:
            try:
                await _clean_upload(json.loads(b"".join(message.get("body", b"") for message in held)))
            except ValueError as error:
                # The toast of Gradio 6.31 reads it as markup.
                message = html.escape(str(error), quote=False)
                await PlainTextResponse(message, status_code=400)(scope, receive, send_with_policy)
                return
            except Exception as error:
                log_error(error)
                refused = f"got a picture that cannot be cleaned ({type(error).__name__}); try a smaller one"
                await PlainTextResponse(refused, status_code=500)(scope, receive, send_with_policy)
                return
        for message in held:
            await send_with_policy(message)


async def _clean_upload(paths: list[str]) -> None:
    """All of them, or none is left, whatever happens: not even a picture that nobody waits for any more."""
    try:
        for path in paths:
            await run_in_threadpool(clean_picture, path)
    except BaseException:
        for path in paths:
            Path(path).unlink(missing_ok=True)
        raise
