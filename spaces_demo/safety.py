"""What keeps visitors private: no metadata in stored pictures, no request to other hosts, no text read as markup.

What is surprising: Gradio shows an uploaded picture before any handler sees it. Pictures are therefore cleaned between
Gradio's own upload route and its answer, so that no address of a picture with metadata ever exists.
"""

import json
import re
from pathlib import Path

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
        # Gradio starts itself with an inline script and sets styles on elements.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)

JPEG_START = b"\xff\xd8"
ESCAPED = re.compile(r"([!-/:-@\[-`{-~])")
"""ASCII punctuation: what Markdown may read as markup, and reads as itself after a backslash."""


def show_as_text(text: str) -> str:
    """Markdown that shows every character of a text, and nothing else; page.js turns it back."""
    return ESCAPED.sub(r"\\\1", text).replace("\n ", "\n&nbsp;")


def clean_picture(path: str) -> None:
    """Rewrites a picture in place: upright, pixels only.

    Raises:
        ValueError: if it is no picture or a hostile one; the file is deleted.
    """
    try:
        image = load_image(path)
    except ValueError:
        Path(path).unlink()
        raise
    with open(path, "rb") as file:
        is_jpeg = file.read(2) == JPEG_START
    pixels = Image.new("RGB", image.size)
    pixels.paste(image)
    if is_jpeg:
        pixels.save(path, format="JPEG", quality=95, subsampling=0)
    else:
        pixels.save(path, format="PNG", compress_level=1)


class PrivateRoutes:
    """Middleware: the content security policy on every page, and only clean pictures after an upload."""

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

        if scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send_with_policy)
            return
        await self.app(scope, receive, hold)
        if held[0]["status"] == 200:
            try:
                for path in json.loads(b"".join(message.get("body", b"") for message in held)):
                    await run_in_threadpool(clean_picture, path)
            except ValueError as error:
                await PlainTextResponse(str(error), status_code=400)(scope, receive, send_with_policy)
                return
        for message in held:
            await send_with_policy(message)
