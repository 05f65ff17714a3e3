"""llama.cpp's own server on an exported folder, in the Python that ANYLLAVA_LLAMA_CPP_PYTHON names."""

import base64
import contextlib
import io
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

PYTHON = os.environ.get("ANYLLAVA_LLAMA_CPP_PYTHON")
_SCRIPT = """
import sys

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.mmproj.path = sys.argv[1:]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
# As exact as it can be: keys and values in 32 bits.
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
print("URL", server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """A server that runs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.marker = self.post("/props")["media_marker"]

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def complete(self, prompt: list[int] | dict[str, Any], num_tokens: int) -> list[int]:
        """Greedy tokens after ids, or after what `show` gives."""
        settings = {"n_predict": num_tokens, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        return self.post("/completion", {"prompt": prompt, "cache_prompt": False} | settings)["tokens"]

    def find_probabilities(self, prompt: list[int] | dict[str, Any], num_tokens: int) -> dict[int, float]:
        """Probability of each first token, before anything is sampled."""
        body = {
            "prompt": prompt,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": num_tokens,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        (first,) = self.post("/completion", body)["completion_probabilities"]
        return {item["id"]: item["logprob"] for item in first["top_logprobs"]}

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text."""
        body = {"content": text, "add_special": False, "parse_special": False}
        return self.post("/tokenize", body)["tokens"]

    def show(self, picture: Image.Image, before: str, after: str) -> dict[str, Any]:
        """A prompt with a picture."""
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        return {"prompt_string": before + self.marker + after, "multimodal_data": [data]}


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[LlamaCpp]:
    """The server of a folder that `llava export --layout gguf` wrote."""
    (tower,) = folder.glob("mmproj-*.gguf")
    (model,) = set(folder.glob("*.gguf")) - {tower}
    with open(folder / "server.log", "w+") as log:
        process = subprocess.Popen(
            [PYTHON, "-c", _SCRIPT, str(model), str(tower)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            line = next((line for line in process.stdout if line.startswith("URL ")), None)
            assert line is not None, (folder / "server.log").read_text()[-3000:]
            yield LlamaCpp(line.split()[1])
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
