"""`transformers serve` in a process of its own answers about a picture with a model of ours."""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from modeling_llava.inference import EMBEDDED_MODEL
from tests.conftest import ROOT

START = "import modeling_llava; from transformers.cli.transformers import main; main()"
SECONDS_TO_START = 90


@pytest.fixture(scope="module")
def server():
    """The address of a running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", START, "serve", EMBEDDED_MODEL, "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--dtype", "float32"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/health", process)
        yield address
    finally:
        process.terminate()
        process.communicate()


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    process.terminate()
    pytest.fail(f"transformers serve did not start: {process.communicate()[0]}")


def post(address: str, *, stream: bool) -> str:
    picture = (ROOT / "spaces_demo" / "examples" / "twemoji-penguin.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = {"model": EMBEDDED_MODEL, "messages": [{"role": "user", "content": content}], "stream": stream}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body | {"max_tokens": 20}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def test_answer(server):
    answer = json.loads(post(server, stream=False))["choices"][0]["message"]["content"]
    assert answer == "a penguin"


def test_streamed_answer(server):
    lines = [
        line.removeprefix("data: ") for line in post(server, stream=True).splitlines() if line.startswith("data: {")
    ]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
    assert "".join(pieces) == "a penguin"
