"""Tiny models of every kind, built in-process from configurations: random weights, real geometry."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from processing_llava import AnyLlavaImageProcessorPil, AnyLlavaProcessor
from processing_llava.templates import load_template

VOCAB_SIZE = 300
IMAGE_TOKEN_ID = VOCAB_SIZE
"""Outside the vocabulary, as in every original checkpoint."""
TILE_SIZE = 28
PATCH_SIZE = 7
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]

_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": TILE_SIZE,
    "patch_size": PATCH_SIZE,
}
TEXT_CONFIGS = {
    "llama": lambda: LlamaConfig(**_TEXT),
    "mistral": lambda: MistralConfig(**_TEXT, num_key_value_heads=2, head_dim=8),
    "qwen2": lambda: Qwen2Config(**_TEXT, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_TEXT, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**_TEXT, num_key_value_heads=2, head_dim=8),
    "mpt": lambda: MptConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=VOCAB_SIZE, max_seq_len=512, bos_token_id=1, eos_token_id=2
    ),
    "phi": lambda: PhiConfig(**_TEXT),
}
VISION_CONFIGS = {
    "clip": lambda: CLIPVisionConfig(**_VISION),
    "siglip": lambda: SiglipVisionConfig(**_VISION),
    "dinov2": lambda: Dinov2Config(**_VISION, mlp_ratio=2),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**_VISION, mlp_ratio=2, num_register_tokens=3),
}


def tiny_config(text: str = "llama", vision: str = "clip", **overrides) -> AnyLlavaConfig:
    text_config: PreTrainedConfig = TEXT_CONFIGS[text]()
    settings = {"image_token_id": IMAGE_TOKEN_ID, "lm_head_bias": text == "phi"} | overrides
    return AnyLlavaConfig(VISION_CONFIGS[vision](), text_config, **settings)


def tiny_model(text: str = "llama", vision: str = "clip", *, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    model = AnyLlavaForConditionalGeneration(tiny_config(text, vision, **overrides)).eval()
    # The default initialisation is so small that every logit is close to zero; wider weights make errors visible.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return model


def random_images(num_images: int, *, num_tiles: int | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, 3, TILE_SIZE, TILE_SIZE)
    if num_tiles is not None:
        shape = (num_images, num_tiles, 3, TILE_SIZE, TILE_SIZE)
    return torch.randn(shape, generator=generator)


def text_ids(length: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def batch(rows: list[list[int]], *, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of ids, padded to one length."""
    length = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
        input_ids[index, place] = torch.tensor(row)
        attention_mask[index, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over every byte and a few merges: no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([load_template("vicuna_v1"), "What is this? It is a red circle."] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )


def tiny_processor(*, template: str = "vicuna_v1", **overrides) -> AnyLlavaProcessor:
    size = {"height": TILE_SIZE, "width": TILE_SIZE}
    images = {
        name: overrides.pop(name) for name in ("image_aspect_ratio", "image_grid_pinpoints") if name in overrides
    }
    return AnyLlavaProcessor(
        AnyLlavaImageProcessorPil(size={"shortest_edge": TILE_SIZE}, crop_size=size, **images),
        tiny_tokenizer(),
        chat_template=load_template(template),
        patch_size=PATCH_SIZE,
        **overrides,
    )


def save_tiny_checkpoint(folder: Path, text: str = "llama", vision: str = "clip", **overrides) -> Path:
    """A complete checkpoint folder: model and processor that belong together."""
    processor = tiny_processor()
    tiny_model(text, vision, image_token_id=processor.image_token_id, **overrides).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
