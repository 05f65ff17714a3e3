"""The demo where Hugging Face lends GPUs: every answer comes from a process that `spaces`, the real package, forks."""

import importlib.util
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.spaces_demo.conftest import EXAMPLES, skip, start_demo

pytestmark = pytest.mark.slow

# The half of the package that moves tensors needs a GPU. Without torch, it brings stand-ins for it.
WITHOUT_A_GPU = """
import sys

sys.modules["torch"] = None
import spaces
del sys.modules["torch"]

from modeling_llava.cli import main
sys.exit(main(["demo", "--device", "cpu", *sys.argv[1:]]))
"""
LOAN = b'{"idle": true, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "token"}'


@pytest.fixture
def lender():
    """The service that lends GPUs: its address, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(urlsplit(self.path).path)
            body = LOAN if asked[-1] == "/schedule" else b""
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments) -> None:
            """Silence: requests are noted, not printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_answers_stream_from_a_borrowed_gpu_and_errors_are_told(lender, tmp_path, monkeypatch):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    if importlib.util.find_spec("spaces") is None:
        skip("needs spaces: pip install spaces")
    address, asked = lender
    group = tmp_path / "cgroup"
    group.write_text("0::/test\n")
    for name, value in (
        ("SPACES_ZERO_GPU", "true"),
        ("SPACES_ZERO_DEVICE_API_URL", address),
        ("ZEROGPU_PROC_SELF_CGROUP_PATH", str(group)),
        # A process that is forked cannot use the threads that the first one has started.
        ("OMP_NUM_THREADS", "1"),
    ):
        monkeypatch.setenv(name, value)
    with start_demo(tmp_path, command=("-c", WITHOUT_A_GPU)) as demo:
        assert asked == ["/startup-report"]
        client = Client(demo.url, verbose=False)
        client.predict(
            {"text": "What is this?", "files": [handle_file(EXAMPLES / "twemoji-penguin.png")]}, api_name="/ask"
        )
        job = client.submit("embedded", "", api_name="/answer")
        left, _ = job.result()
        assert left[-1]["content"][0]["text"] == "a penguin"
        shown = [left[-1]["content"][0]["text"] for left, _ in job.outputs()]
        assert len(set(shown)) > 1 and all("a penguin".startswith(text) for text in shown), "the answer did not stream"
        assert asked == ["/startup-report", "/schedule", "/allow", "/release"]

        client.predict({"text": "Is it xyzzy?", "files": []}, api_name="/ask")
        with pytest.raises(AppError, match="for a model of one tile"):
            client.predict("embedded", "", tile_mode="anyres", api_name="/answer")
        client.close()
        log = demo.log.read_text()
    assert asked[4:] == ["/schedule", "/release"]
    assert "one tile" not in log and "xyzzy" not in log
