"""What the trainers of `benchmarks.training` are given: a model, its processor, rows and pictures."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedModel

from modeling_llava import AnyLlavaConfig
from processing_llava import AnyLlavaProcessor

from . import models
from .timing import default_dtype

_BASE_TOWER = {"image_size": 384, "patch_size": 32}
_SMALL = models.SHAPES["tiny"][1]
_LARGE = (
    models.SHAPES["7b"][0] | {"image_size": models.TILE_SIZE, "patch_size": models.PATCH_SIZE},
    {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504},
)
TRAINED_SHAPES = {
    # The vision tower, and the language model.
    "tiny": (_BASE_TOWER | _SMALL, _SMALL),
    "mid": (
        _BASE_TOWER,
        {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376},
    ),
    "7b": _LARGE,
    "13b": _LARGE,
}
LORA_SHAPES = TRAINED_SHAPES | {
    size: (_LARGE[0], models.SHAPES[size][1] | {"max_position_embeddings": 4096}) for size in ("7b", "13b")
}


def build_processor(size: str) -> AnyLlavaProcessor:
    """One for the pictures and the vocabulary of all these models."""
    tower, _ = TRAINED_SHAPES[size]
    processor = models.build_processor(tower["image_size"], tower["patch_size"], image_aspect_ratio="square")
    processor.tokenizer.pad_token = processor.tokenizer.unk_token
    return processor


def build_model(stage: str, size: str, *, device: str, is_peer: bool) -> PreTrainedModel:
    """Our model with random weights, or transformers' own with the same.

    In float32, but for a LoRA on a GPU, under which what is frozen takes 16 bits.
    """
    tower, language_model = (LORA_SHAPES if stage == "lora" else TRAINED_SHAPES)[size]
    text = LlamaConfig(vocab_size=32000, pad_token_id=0, **language_model)
    config = AnyLlavaConfig(CLIPVisionConfig(**tower), text, image_token_id=models.IMAGE_TOKEN_ID)
    dtype = default_dtype(device) if stage == "lora" else torch.float32
    ours = models.build_model(config, device=device, dtype=dtype)
    return models.build_peer(ours) if is_peer else ours


def write_rows(folder: Path, *, num_rows: int) -> None:
    """Write pictures, and rows that show them."""
    rng = random.Random(0)
    rows = []
    for index in range(num_rows):
        images = []
        if rng.random() < 0.62:
            path = folder / f"{index}.jpg"
            models.make_noise(torch.Generator().manual_seed(index)).save(path)
            images.append(str(path))
        messages: list[dict[str, Any]] = []
        for turn in range(rng.choice((1, 1, 2, 3))):
            question = " ".join(rng.choices(models.WORDS, k=min(200, int(rng.lognormvariate(3.0, 0.8)))))
            answer = " ".join(rng.choices(models.WORDS, k=min(250, 1 + int(rng.lognormvariate(2.8, 1.1)))))
            content = [{"type": "image"}] * len(images) if turn == 0 else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        rows.append({"id": str(index), "images": images, "messages": messages})
    (folder / "rows.json").write_text(json.dumps(rows))
