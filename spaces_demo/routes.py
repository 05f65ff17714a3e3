"""The routes of the page as strangers reach them: what Gradio answers, what is answered here, and what is closed.

What is surprising: uploads are answered here. Gradio would write them to a folder as they come, shows them before any
handler sees them, and leaves what was cut off half way (Gradio 6.31, route_utils.py). Here they are nameless files
that vanish with the request; only clean pictures get a name, one that nobody can guess.
"""

import asyncio
import html
import os
import re
import secrets
from pathlib import Path

import gradio as gr
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modeling_llava.serving.guard import Guard, log_error

from .safety import MAX_PICTURE_BYTES, MAX_PICTURES, REFUSED_ADDRESS, clean_picture

CONTENT_SECURITY_POLICY = (
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
HUB = "huggingface.co"
"""Shows Spaces in a frame."""

API = r".*/gradio_api"
CALLS = re.compile(rf".*/login/?|{API}/(queue/join|cancel|reset|(run|api|call|call/v2)/[^/]+)/?")
"""What the page and gradio_client post to (Gradio 6.31, routes.py)."""
CLOSED = re.compile(rf"{API}/(dev/|vibe-|stream/|profiling/|run-history|proxy=).*|.*/monitoring.*")
"""What this page has no use for. Gradio refuses most of it too, but some asks for no login and some never ends."""
WITHOUT_LOGIN = re.compile(rf"{API}/(heartbeat/.*|cancel/?)")
"""Routes of a visitor that Gradio 6.31 gives to everybody."""
FETCHED = re.compile(r"/file[=/]https?://")
"""Routes for files, with a URL."""
HELD = re.compile(rf"{API}/(heartbeat|queue/data|call)(/.*)?")
"""Routes that Gradio 6.31 holds open for as long as a visitor likes: being there, and what becomes of a call."""
MAX_HELD = 400
"""Connections that are held open, two for a visitor. A process may have 1024 files by default."""
MAX_STORED_BYTES = 4_000_000_000
"""All pictures of all visitors; each is there for an hour."""
NUM_CLEANERS = 2
"""Pictures that are decoded at a time; others wait, encoded."""


def build_middleware(page: gr.Blocks, folder: Path, *, allow_hosts: list[str]) -> list[Middleware]:
    """What stands before Gradio's routes.

    Args:
        folder: Where pictures are stored.
        allow_hosts: Names by which visitors reach the page, beside those that are known.
    """
    on_space = os.environ.get("SPACE_ID")
    named = {
        *allow_hosts,
        *map(_read_name, (os.environ.get("GRADIO_SERVER_NAME"), os.environ.get("GRADIO_ROOT_PATH"))),
    }

    def list_hosts() -> set[str]:
        return (named | {_read_name(page.share_url)}) - {""}

    frames = ["'self'", f"https://{HUB}"] if on_space else ["'self'"]
    policy = "; ".join((*CONTENT_SECURITY_POLICY, f"frame-ancestors {' '.join(frames)}"))
    guard = Middleware(
        Guard,
        # Everybody reaches a Space, so that no name gives more; it may have a domain of its own.
        hosts=None if on_space else list_hosts,
        origins={HUB, _read_name(os.environ.get("SPACE_HOST")), *allow_hosts} - {""} if on_space else (),
        headers={"Content-Security-Policy": policy},
        body_limits={"/gradio_api/upload": MAX_PICTURES * MAX_PICTURE_BYTES + 2**20},
        login_path="/login",
    )
    return [guard, Middleware(PrivateRoutes, page=page, folder=folder)]


def _read_name(address: str | None) -> str:
    """The name in a URL or an address; "" if there is none."""
    without_scheme = re.sub(r"^[a-z]+://", "", (address or "").lower())
    return re.sub(r"(:\d+)?(/.*)?$", "", without_scheme).strip("[]")


class PrivateRoutes:
    """Middleware: clean pictures only, nothing fetched, nothing that the page does not need."""

    def __init__(self, app: ASGIApp, *, page: gr.Blocks, folder: Path) -> None:
        self.app = app
        self.page = page
        self.folder = folder
        self.num_held = 0
        self.cleaners = asyncio.Semaphore(NUM_CLEANERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = await self._answer(scope, receive)
        if response is not None:
            await response(scope, receive, send)
            return
        is_held = self._is_held(scope)
        self.num_held += is_held
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            # Gradio 6.31 fails at names of calls that it does not know, among others, and quotes them.
            log_error(error)
            told = f"got a call that cannot be answered ({type(error).__name__}); correct it"
            await JSONResponse({"detail": told}, status_code=400)(scope, receive, send)
        finally:
            self.num_held -= is_held

    async def _answer(self, scope: Scope, receive: Receive) -> Response | None:
        """What is answered here; None leaves it to Gradio."""
        path, is_post = scope["path"], scope["method"] == "POST"
        if FETCHED.search(path):
            return PlainTextResponse(REFUSED_ADDRESS, status_code=403)
        is_upload = is_post and re.fullmatch(f"{API}/upload/?", path)
        if (is_upload or WITHOUT_LOGIN.fullmatch(path)) and not await self._is_logged_in(scope):
            return JSONResponse({"detail": "got no login; log in first"}, status_code=401)
        if is_upload:
            return await self._take_pictures(Request(scope, receive))
        if CLOSED.fullmatch(path) or (is_post and not CALLS.fullmatch(path)):
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        if self.num_held >= MAX_HELD and self._is_held(scope):
            return JSONResponse({"detail": "got too many visitors; come back later"}, status_code=503)
        if re.fullmatch(f"{API}/upload_progress/?", path):
            # The page asks for it, and shows a picture when it is whole.
            return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        return None

    @staticmethod
    def _is_held(scope: Scope) -> bool:
        return scope["method"] == "GET" and HELD.fullmatch(scope["path"]) is not None

    async def _is_logged_in(self, scope: Scope) -> bool:
        """Whether Gradio says so; without --auth, everybody is."""
        path = scope["path"][: scope["path"].index("/gradio_api/")] + "/gradio_api/login_check"
        statuses = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            statuses.append(message.get("status"))

        question = {**scope, "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
        await self.app(question, receive, send)
        return statuses[0] == 200

    async def _take_pictures(self, request: Request) -> Response:
        """As Gradio answers: paths of the files, in their order."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return PlainTextResponse("got an upload that is no multipart/form-data; expected one", status_code=400)
        paths, form = [], FormData()
        try:
            form = await _PictureParser(
                request.headers, request.stream(), max_files=MAX_PICTURES, max_fields=0
            ).parse()
            for file in [file for _, file in form.multi_items() if isinstance(file, UploadFile)]:
                async with self.cleaners:
                    paths.append(await run_in_threadpool(self._store, file))
            if await request.is_disconnected():
                # Nobody learned where they are.
                raise ClientDisconnect
        except BaseException as error:
            for path in paths:
                Path(path).unlink(missing_ok=True)
            if isinstance(error, MultiPartException):
                status = 413 if error.message == PICTURE_TOO_LARGE else 400
                return PlainTextResponse(html.escape(error.message, quote=False), status_code=status)
            if isinstance(error, ValueError):
                # The toast of Gradio 6.31 reads it as markup.
                return PlainTextResponse(html.escape(str(error), quote=False), status_code=400)
            if isinstance(error, ClientDisconnect) or not isinstance(error, Exception):
                raise
            log_error(error)
            refused = f"got a picture that cannot be cleaned ({type(error).__name__}); try a smaller one"
            return PlainTextResponse(refused, status_code=500)
        finally:
            await form.close()
        # Gradio deletes these when they are old, and when it ends.
        self.page.upload_file_set.update(paths)
        return JSONResponse(paths)

    def _store(self, file: UploadFile) -> str:
        picture, name = clean_picture(file.file.read(), Path(file.filename or "").name)
        if len(picture) + sum(map(_read_size, self.folder.glob("*/*"))) > MAX_STORED_BYTES:
            raise ValueError(
                "This page has no room for more pictures; they are deleted after an hour. Try again later."
            )
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        path = folder / name
        path.write_bytes(picture)
        return str(path)


def _read_size(path: Path) -> int:
    """Bytes of a file, which may be deleted while it is looked at."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


PICTURE_TOO_LARGE = f"got a picture above {MAX_PICTURE_BYTES} bytes; expected at most that; make it smaller"


class _PictureParser(MultiPartParser):
    """Starlette's, which bounds the bytes of fields, with a bound on those of each file."""

    def on_part_begin(self) -> None:
        super().on_part_begin()
        self._num_part_bytes = 0

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._num_part_bytes += end - start
        if self._num_part_bytes > MAX_PICTURE_BYTES:
            raise MultiPartException(PICTURE_TOO_LARGE)
        super().on_part_data(data, start, end)
