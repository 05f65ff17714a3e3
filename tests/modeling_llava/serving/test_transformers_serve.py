"""`transformers serve` in a process of its own answers about a picture with a model of ours."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from modeling_llava.inference.loading import EMBEDDED_MODEL
from tests.conftest import ROOT

SECONDS_TO_START = 90


@pytest.fixture(scope="module")
def server():
    """The address of a running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "modeling_llava.serving",
        EMBEDDED_MODEL,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
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


def post(address: str, *, stream: bool = False, url: str | None = None, **fields) -> str:
    picture = (ROOT / "spaces_demo" / "examples" / "twemoji-penguin.png").read_bytes()
    url = url or f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = {"model": EMBEDDED_MODEL, "messages": [{"role": "user", "content": content}], "stream": stream}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body | {"max_tokens": 20} | fields).encode(),
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


@pytest.mark.parametrize("stop", [["peng"], "peng", ["zebra", "uin"]])
def test_stop_strings(server, stop):
    answer = json.loads(post(server, stop=stop))["choices"][0]["message"]["content"]
    assert answer in ("a peng", "a penguin") and answer.startswith("a peng")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("data:image/png;base64,AAAA", "no image of a known format"),
        ("data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=", "a file of SVG"),
        ("https://a.example/b.png", "URLs are not fetched"),
        ("/etc/passwd", "no text opens a file"),
        ("", "without a picture"),
    ],
)
def test_bad_pictures_are_the_fault_of_the_sender(server, url, told, stream):
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        post(server, url=url or " ", stream=stream)
    assert told in json.loads(refused.value.read())["error"]["message"]


USER = {"role": "user", "content": "Hi"}
MALFORMED = {
    "messages as a text": {"messages": "x"},
    "no messages": {"messages": None},
    "an image_url without url": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "an item without type": {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
    "stop as a number": {"messages": [USER], "stop": 3},
    "stop as numbers": {"messages": [USER], "stop": [3]},
    "tool calls without arguments": {"messages": [USER | {"tool_calls": [{"function": {}}]}]},
    "max_tokens as a text": {"messages": [USER], "max_tokens": "a"},
}


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_are_the_fault_of_the_sender(server, fields):
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        post(server, **fields)
    message = json.loads(refused.value.read())["error"]["message"]
    assert message.startswith("got ") and "\n" not in message


@pytest.mark.parametrize("prompt", ["<image> What?", 3, None])
def test_a_prompt_holds_no_image(server, prompt):
    body = json.dumps({"model": EMBEDDED_MODEL, "prompt": prompt}).encode()
    request = urllib.request.Request(f"{server}/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


def test_without_its_packages_one_line_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['fastapi'] = None\n")
    told = subprocess.run(
        [sys.executable, "-m", "modeling_llava.serving", EMBEDDED_MODEL],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1 and "Traceback" not in told.stderr
    assert "pip install 'transformers[serving]'" in told.stderr.splitlines()[-1]


def test_a_request_that_is_refused_holds_up_no_other(server):
    with pytest.raises(urllib.error.HTTPError):
        post(server, messages=[])
    assert json.loads(post(server))["choices"][0]["message"]["content"] == "a penguin"
