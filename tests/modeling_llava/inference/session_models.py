"""Models that sessions are tried on, pictures, and messages."""

import tempfile
from collections.abc import Callable
from functools import cache

import PIL.Image
import torch
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_llava.inference.loading import load_for_inference
from tests.original_folders import widen
from tests.tiny import (
    PATCH_SIZE,
    PINPOINTS,
    TEXT_CONFIGS,
    TILE_SIZE,
    VISION_CONFIGS,
    VOCAB_SIZE,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)


def make_picture(width: int, height: int, *, seed: int = 0) -> PIL.Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator)
    return PIL.Image.fromarray(pixels.numpy()).resize((width, height))


CAT, DOG = make_picture(60, 40, seed=1), make_picture(30, 70, seed=2)
SETTINGS = {"max_new_tokens": 6}


def build_text_model(text: str, *, sliding_window: int | None = None):
    processor = tiny_processor()
    model = tiny_model(text, image_token_id=processor.image_token_id)
    if text == "mistral":
        model.config.text_config.sliding_window = sliding_window
    return model, processor


def build_anyres():
    tiled = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "patch_merge_type": "spatial_unpad"}
    processor = tiny_processor(**tiled)
    del tiled["image_aspect_ratio"]
    return tiny_model(image_token_id=processor.image_token_id, **tiled), processor


def build_transformers_own():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = TEXT_CONFIGS["llama"]()
    text.vocab_size = VOCAB_SIZE + 1
    config = LlavaConfig(vision_config=VISION_CONFIGS["clip"](), text_config=text, image_token_id=VOCAB_SIZE)
    model = LlavaForConditionalGeneration(config)
    widen(model)
    ours = tiny_processor()
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": TILE_SIZE}, crop_size=TILE_SIZE),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=ours.chat_template,
    )
    return model.eval(), processor


def load_transformers_own():
    """The same checkpoint as our class reads it."""
    with tempfile.TemporaryDirectory() as folder:
        for part in build_transformers_own():
            part.save_pretrained(folder)
        return load_for_inference(folder)


MODELS: dict[str, Callable] = {
    "embedded": load_for_inference,
    "anyres": build_anyres,
    "transformers": load_transformers_own,
    **{
        text: lambda text=text: build_text_model(text) for text in ("llama", "mistral", "qwen3", "mpt", "phi", "gemma")
    },
}


@cache
def load(name: str):
    return MODELS[name]()


def user(text: str, *images) -> dict:
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def follow_script(model, processor, text: str) -> list[int]:
    """Let a model say a text, whatever it is asked; returns its tokens."""
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    script = iter(ids)

    def say_next(module, args, logits):
        return torch.zeros_like(logits).index_fill(-1, torch.tensor(next(script)), 1.0)

    model.lm_head.register_forward_hook(say_next)
    return ids


def read(answer) -> str:
    return "".join(answer)
