"""The demo in a process of its own, a browser that may talk to nobody else, and a host that counts who asks it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modeling_llava.inference.loading import EMBEDDED_MODEL
from tests.conftest import ROOT
from tests.spaces_demo.checkpoints import (
    save_adapter,
    save_config_of_a_giant,
    save_endless_checkpoint,
    save_leaking_checkpoint,
)
from tests.spaces_demo.requests_of_strangers import MULTIPART, Response, send

EXAMPLES = ROOT / "spaces_demo" / "examples"
PENGUIN = (EXAMPLES / "twemoji-penguin.png").read_bytes()
SECRET = "xyzzy"
PROXY = "demo.example.org"
SECONDS_TO_START = 120
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A camera that shows a moving test picture, and a visitor who lets pages use it.
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
LEAKING_QUESTION = "Where is it?"
# A process that notes every other host it looks up or connects to.
WATCHED = """
import sys

def note(event, details):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = details[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(details[1], tuple):
        host = details[1][0]
    else:
        return
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        with open(sys.argv[1], "a") as file:
            file.write(f"{event} {host}\\n")

sys.addaudithook(note)
"""
WATCHED_DEMO = f"""{WATCHED}
from modeling_llava.cli import main
sys.exit(main(["demo", *sys.argv[2:]]))
"""
WATCHED_SPACE = f"""{WATCHED}
import runpy
runpy.run_path("app.py", run_name="__main__")
"""


@dataclass
class OtherHost:
    """A host that is not the demo's."""

    port: int
    requests: list[str] = field(default_factory=list)


@dataclass
class Demo:
    url: str
    process: subprocess.Popen
    log: Path
    feedback: Path
    files: Path
    """Where uploads are stored."""


@pytest.fixture(scope="session")
def other_host():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host.requests.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments) -> None:
            """Silence: requests are counted, not printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    host = OtherHost(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield host
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, other_host) -> dict[str, str]:
    """Label in the menu to folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_adapter(folder / "adapter")
    remote_picture = f"**Here**: ![map](http://127.0.0.1:{other_host.port}/leak.png?you=said)"
    save_leaking_checkpoint(folder / "leaking", question=LEAKING_QUESTION, answer=remote_picture)
    save_endless_checkpoint(folder / "endless")
    save_config_of_a_giant(folder / "giant")
    return {"embedded": EMBEDDED_MODEL} | {path.name: str(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def demo(checkpoints, tmp_path_factory):
    """All checkpoints in the menu, the embedded one chosen. At the end, it may have asked no other host."""
    folder = tmp_path_factory.mktemp("demo")
    asked = folder / "asked.txt"
    asked.touch()
    arguments = [argument for name in checkpoints.values() for argument in ("--model", name)]
    command = ("-c", WATCHED_DEMO, str(asked))
    with start_demo(folder, *arguments, "--feedback", str(folder / "feedback.jsonl"), command=command) as started:
        yield started
    assert asked.read_text() == ""


class start_demo:
    """A context manager: `python -m spaces_demo` with these arguments, until the block ends."""

    def __init__(
        self, folder: Path, *arguments: str, command: tuple[str, ...] = ("-m", "spaces_demo"), cwd: Path = ROOT
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.cwd = cwd
        self.command = [sys.executable, *command, *arguments]

    def __enter__(self) -> Demo:
        log, files = self.folder / "log.txt", self.folder / "files"
        files.mkdir()
        environment = os.environ | {"GRADIO_TEMP_DIR": str(files), "GRADIO_SERVER_PORT": str(self.port)}
        # It asks no other host because it needs none, not because it is told to.
        environment.pop("HF_HUB_OFFLINE", None)
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command, cwd=self.cwd, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        self.demo = Demo(f"http://127.0.0.1:{self.port}", process, log, self.folder / "feedback.jsonl", files)
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(self.demo.url, timeout=5).close()
                return self.demo
            except OSError:
                time.sleep(0.3)
        self.__exit__()
        pytest.fail(f"the demo did not start: {log.read_text()}")

    def __exit__(self, *error) -> None:
        self.demo.process.terminate()
        self.demo.process.wait(timeout=30)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The embedded model, for everybody."""
    folder = tmp_path_factory.mktemp("page")
    arguments = ("--allow-host", PROXY, "--feedback", str(folder / "feedback.jsonl"))
    with start_demo(folder, *arguments) as demo:
        yield demo


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """The same behind a password."""
    with start_demo(tmp_path_factory.mktemp("locked"), "--auth", "ada:lovelace") as demo:
        yield demo


@pytest.fixture
def nothing_is_logged(request):
    """Whatever a test sends, the log does not quote it, and the page goes on."""
    yield
    for name in ("page", "locked"):
        if name in request.fixturenames:
            demo = request.getfixturevalue(name)
            assert SECRET not in demo.log.read_text()
            assert send(demo.url, "GET", "/robots.txt").status == 200


def upload(demo: Demo, body: bytes, **headers: str) -> Response:
    return send(demo.url, "POST", "/gradio_api/upload", headers=MULTIPART | headers, body=body)


def list_pictures(demo: Demo) -> list[Path]:
    """Files that visitors sent, in their folders of random names; those of examples have longer ones."""
    return [path for path in demo.files.rglob("*") if path.is_file() and len(path.parent.name) != 64]


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        skip("needs playwright: pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


def skip(reason: str) -> None:
    """A stranger's machine skips the tests that need more than it has, CI fails."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def visit(browser, demo):
    """Opens the demo as a new visitor. At the end, no page may have asked another host, or failed."""
    contexts, requests, errors = [], [], []

    def open_page(url: str = demo.url, **choices):
        context = browser.new_context(
            permissions=["camera"], **({"viewport": {"width": 1280, "height": 860}} | choices)
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: requests.append(request))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, wait_until="domcontentloaded")
        return Visitor(page)

    yield open_page
    for context in contexts:
        context.close()
    # The policy stops a request after the page has made it.
    sent = [request.url for request in requests if request.failure != "csp"]
    assert [url for url in sent if not url.startswith((demo.url, "data:", "blob:"))] == []
    assert errors == []


class Visitor:
    """What a visitor does and sees."""

    def __init__(self, page) -> None:
        self.page = page
        self.chats = page.locator("#chats > .block")
        self.textbox = page.locator("#question textarea")
        self.textbox.wait_for()
        # The page is alive when the models are described.
        page.locator("#status").get_by_text("parameters").wait_for()

    def attach(self, *paths: Path | str) -> None:
        before = self.page.locator("#question .thumbnail-item").count()
        self.page.set_input_files("#question input[type=file]", [str(path) for path in paths])
        self.page.locator("#question .thumbnail-item").nth(before + len(paths) - 1).wait_for()
        self.page.wait_for_function("() => !document.querySelector('#question .uploading')")

    def ask(self, question: str, *paths: Path | str) -> None:
        if paths:
            self.attach(*paths)
        self.textbox.fill(question)
        self.textbox.press("Enter")

    def ask_for_an_endless_answer(self, *, seed: int = 0) -> None:
        """One that has begun, and goes on for a while."""
        self.choose("Model", "endless")
        self.open("Settings")
        self.page.get_by_label("number input for Longest answer in tokens").fill("1024")
        self.page.get_by_label("Seed").fill(str(seed))
        self.ask("Go on and on.")
        self.answers().first.wait_for()

    def wait_for_answer(self, number: int, *, column: int = 0) -> str:
        """Text of the answer with this number, counted from 1, once it is whole."""
        self.captions(column).nth(number - 1).get_by_text("tokens/s").wait_for()
        return self.answers(column).nth(number - 1).inner_text().strip()

    def answers(self, column: int = 0):
        return self.chats.nth(column).locator("[data-testid=bot]:not(:has(small))")

    def captions(self, column: int = 0):
        return self.chats.nth(column).locator("[data-testid=bot] small")

    def questions(self, column: int = 0):
        return self.chats.nth(column).locator(".user-row .message:not(.component)")

    def pictures(self, column: int = 0):
        return self.chats.nth(column).locator(".user-row img")

    def choose(self, menu: str, label: str) -> None:
        self.page.get_by_label(menu, exact=True).click()
        self.page.get_by_role("option", name=label, exact=True).click()

    def open(self, title: str) -> None:
        """Open a part of the page that folds."""
        self.page.locator("button.label-wrap", has_text=title).click()

    def shoot(self, name: str) -> None:
        """A screenshot, in runs/screenshots or the folder that the environment variable SCREENSHOTS names."""
        folder = Path(os.environ.get("SCREENSHOTS", ROOT / "runs" / "screenshots"))
        folder.mkdir(parents=True, exist_ok=True)
        # Toasts and transitions come to rest.
        self.page.wait_for_timeout(600)
        self.page.screenshot(path=folder / f"{name}.png")

    def read_caption(self, number: int, *, column: int = 0) -> dict[str, float]:
        text = self.captions(column).nth(number - 1).inner_text()
        names = {
            "seconds": r"after ([\d.]+) s",
            "speed": r"([\d.]+) tokens/s",
            "image_tokens": r"(\d+) image tokens",
            "reused": r"(\d+) of \d+ tokens reused",
            "prompt": r"\d+ of (\d+) tokens reused",
        }
        return {name: float(re.search(pattern, text)[1]) for name, pattern in names.items()}
