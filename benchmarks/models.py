"""The models of the benchmarks: random weights in real shapes, ours and transformers' with the same tensors.

Beside them are the inputs: a processor, pictures of noise, and words.

What is surprising: weights are made on their device, so that the host never holds a copy of a model on a GPU; and the
model of transformers' own class holds the very tensors of ours. Weights that only transformers has are added: a final
norm of the tower, and rows of the vocabulary for the image token.
"""

from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration, PreTrainedModel

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from modeling_llava.checkpoints.layouts import write_transformers_config
from modeling_llava.checkpoints.weight_names import add_transformers_only_weights, rename_from_ours
from modeling_llava.inference.loading import prepare_for_answering
from processing_llava import AnyLlavaImageProcessorPil, AnyLlavaProcessor
from processing_llava.original.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from processing_llava.templates import load_template

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
TILE_SIZE = 336
PATCH_SIZE = 14
NUM_IMAGE_TOKENS = (TILE_SIZE // PATCH_SIZE) ** 2
NUM_TEXT_TOKENS = 64
IMAGE_TOKEN_ID = 32000
"""Id of the image token outside the vocabulary, as the tokenizer of the tests gives it."""
# fmt: off
WORDS = (
    "the", "a", "red", "green", "blue", "circle", "on", "left", "right", "picture", "shows", "two", "cat", "house",
)
# fmt: on
"""Words that are one token each, behind a space."""


def _shape(hidden_size: int, layers: int, heads: int, intermediate_size: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size,
    }


_CLIP_LARGE = _shape(1024, 24, 16, 4096)
SHAPES = {
    # The vision tower, and the language model.
    "tiny": (_shape(64, 2, 2, 128), _shape(64, 2, 2, 128)),
    "mid": (_shape(768, 12, 12, 2048), _shape(768, 12, 12, 2048)),
    "7b": (_CLIP_LARGE, _shape(4096, 32, 32, 11008)),
    "13b": (_CLIP_LARGE, _shape(5120, 40, 40, 13824)),
}
"""An image has 576 tokens in all of them; 7b and 13b are those of LLaVA-1.5."""


def build_config(size: str) -> AnyLlavaConfig:
    vision, text = SHAPES[size]
    return AnyLlavaConfig(
        CLIPVisionConfig(image_size=TILE_SIZE, patch_size=PATCH_SIZE, **vision),
        LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **text),
        image_token_id=IMAGE_TOKEN_ID,
    )


def build_model(config: AnyLlavaConfig, *, device: str, dtype: torch.dtype) -> AnyLlavaForConditionalGeneration:
    """A model of our class with random weights, which are made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return AnyLlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def build_peer(ours: AnyLlavaForConditionalGeneration) -> PreTrainedModel:
    """A model of transformers' own class with the tensors of ours."""
    config = write_transformers_config(ours.config)
    weights = dict(ours.state_dict())
    add_transformers_only_weights(
        weights, vocab_size=config.text_config.vocab_size, vision_size=config.vision_config.hidden_size
    )
    return LlavaForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict={rename_from_ours(name, "transformers"): weight for name, weight in weights.items()},
        dtype=ours.dtype,
        device_map=ours.device.type if ours.device.type != "cpu" else None,
    ).eval()


def build_pair(size: str, *, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Our model, as `load_for_inference` gives it, and that of transformers' own class."""
    ours = build_model(build_config(size), device=device, dtype=dtype)
    peer = build_peer(ours)
    prepare_for_answering(ours)
    return ours, peer


def build_processor(
    side: int = TILE_SIZE, patch_size: int = PATCH_SIZE, *, image_aspect_ratio: str = "pad"
) -> AnyLlavaProcessor:
    """A processor for all of `SHAPES`, or for towers of another side and patch size."""
    sides = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return AnyLlavaProcessor(
        AnyLlavaImageProcessorPil(image_aspect_ratio=image_aspect_ratio, **sides),
        load_sentencepiece_tokenizer(GOLDENS),
        chat_template=load_template("vicuna_v1"),
        patch_size=patch_size,
    )


def make_noise(generator: torch.Generator) -> Image.Image:
    """A picture of 64 x 48 random pixels, enlarged to 640 x 480."""
    noise = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(noise.numpy()).resize((640, 480))
