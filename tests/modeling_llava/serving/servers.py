"""`llava serve` as a process, and OpenAI's client of it."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "spaces_demo" / "examples").glob("*.png"))
KEY, OTHER_KEY = "first-key", "second-key"


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log: Path

    def connect(self, key: str = KEY, **settings) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **settings)


@contextmanager
def serve(folder: Path, *options: str, keys: tuple[str, ...] = (KEY, OTHER_KEY)) -> Iterator[Server]:
    """A server at a free port, which ends with the block."""
    command = [sys.executable, "-m", "modeling_llava.cli", "serve", "--port", "0", *options]
    for key in keys:
        command += ["--api-key", key]
    log = folder / "log.txt"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT
        )
    try:
        line = process.stdout.readline().decode()
        found = re.search(r" at (http://\S+)/v1$", line.strip())
        assert found, line + log.read_text()
        yield Server(process, found[1], log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            process.stdout.close()


def write_data_uri(picture: Path | Image.Image | bytes) -> str:
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, format="PNG")
        picture = file.getvalue()
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask(text: str, *pictures: Any) -> dict[str, Any]:
    """A message of the user."""
    items = [{"type": "image_url", "image_url": {"url": write_data_uri(picture)}} for picture in pictures]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}
