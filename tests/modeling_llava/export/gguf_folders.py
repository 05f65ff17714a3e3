"""Tiny models to export as GGUF, and what stands in the files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_llava import AnyLlavaForConditionalGeneration
from modeling_llava.cli import main
from tests.tiny import tiny_model, tiny_processor

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'anyllava[gguf]'")


def save(
    folder: Path, text: str = "llama", vision: str = "siglip", *, pictures=None, dtype=None, **settings
) -> AnyLlavaForConditionalGeneration:
    """A model with its processor, and what was saved."""
    processor = tiny_processor()
    for name, value in (pictures or {}).items():
        setattr(processor.image_processor, name, value)
    model = tiny_model(text, vision, image_token_id=processor.image_token_id, **settings)
    model.to(dtype or torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def export(folder: Path, *options: str) -> int:
    """Exit code of the command, which writes the folder `out` beside."""
    return main(["export", str(folder), "--out", str(folder.parent / "out"), "--layout", "gguf", *options])


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings and tensors of a file."""
    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(
            *tensor.shape[::-1].tolist()
        )
        for tensor in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def read_exported(folder: Path, *, dtype: str = "f32") -> tuple:
    """The language model's and the tower's file."""
    return read(folder / f"out-{dtype}.gguf"), read(folder / f"mmproj-out-{dtype.split('_')[0]}.gguf")
