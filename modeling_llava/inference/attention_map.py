"""What a LLaVA looks at while it writes a word: attention of the language model, laid back onto the pictures.

The position before a word writes it, so the query of that position is read. Fused attention never forms the weights;
the answer alone is therefore computed again with eager attention, over the KV cache of the prompt: a few rows of
weights instead of a square as large as the prompt.

What is surprising: the weights of a tile are divided by the area that its tokens cover, so that the overview and the
detail tiles of one picture can be added; and padding gets attention too, which falls outside the picture and is lost.
"""

# Letters: S layers, W words, N features of one image, K of them that the model saw, P patches along the side of a tile

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava.checkpoints.shared_values import check_pair
from modeling_llava.configuration_llava import AnyLlavaConfig
from modeling_llava.visual_tokens import check_image_tokens, choose_features
from processing_llava.anyres_layout import ImageLayout, fit_inside, plan_image, select_grid
from processing_llava.processing_llava import AnyLlavaProcessor

QUERIES_PER_STEP = 32
"""Tokens of the answer that are computed at once: it bounds the memory for the weights of all layers and heads."""
GLOW = ((60, 0, 80), (232, 60, 30), (255, 160, 40), (255, 245, 190))
"""Colours from no density to the highest."""


@dataclass(frozen=True)
class AnswerAttention:
    """Attention of each word of an answer to each picture of its conversation, mean over the heads."""

    words: list[str]
    weights: list[torch.Tensor]
    """For each picture `[S, W, N]`, 0 for features that `visual_tokens` left out. Together with the text before a
    word, the weights of a layer and word add up to 1."""

    def select(self, word: int, layers: slice = slice(None)) -> list[torch.Tensor]:
        """For each picture the weights `[N]` of one word, mean over the layers."""
        return [weights_SWN[layers, word].mean(0) for weights_SWN in self.weights]


@torch.inference_mode()
def read_attention(
    model: PreTrainedModel, processor: AnyLlavaProcessor, messages: list[dict[str, Any]]
) -> AnswerAttention:
    """Attention of the last answer of a conversation.

    The attention function of the model is switched meanwhile, so no other thread may use it.

    Args:
        model: A LLaVA of our class.
        processor: The processor of the model.
        messages: A conversation with its pictures that ends with what the assistant said.

    Raises:
        ValueError: if the processor is not ours, there is no answer or none with words, or the template does not mark
            answers.
    """
    check_pair(model, processor)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    start, end = _find_last_answer(inputs.pop("assistant_masks")[0].tolist(), messages)
    words, tokens_of_word = _split_words(inputs["input_ids"][0, start:end].tolist(), processor.tokenizer)
    if not words:
        raise ValueError("got an answer without words; expected at least one")
    inputs = inputs.to(model.device)
    input_ids = inputs["input_ids"]
    is_image = input_ids[0, : start - 1] == model.config.image_token_id
    pictures = []
    if "pixel_values" in inputs:
        pictures = model.model.encode_images(inputs["pixel_values"], inputs.get("image_sizes")).pooler_output
    kept = choose_features(pictures, model.config.visual_tokens)
    check_image_tokens(is_image[None], [len(kept_K) for kept_K in kept], visual_tokens=model.config.visual_tokens)
    seen = [features_ND[kept_K] for features_ND, kept_K in zip(pictures, kept)]
    images = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=seen)}} if seen else {}

    # A cache without a config keeps whole sequences: a sliding window would move the columns of the pictures.
    cache = DynamicCache()
    model(input_ids=input_ids[:, : start - 1], cache=cache, logits_to_keep=1, **images)
    steps = []
    with _eager_attention(model.model.language_model):
        for first in range(start - 1, end - 1, QUERIES_PER_STEP):
            queries = input_ids[:, first : min(first + QUERIES_PER_STEP, end - 1)]
            outputs = model(input_ids=queries, cache=cache, logits_to_keep=1, output_attentions=True)
            to_prompt = [layer[0, :, :, : start - 1].float().mean(0).cpu() for layer in outputs.attentions]
            steps.append(torch.stack(to_prompt)[..., is_image.cpu()])
    of_tokens = torch.cat(steps, dim=1)
    of_words = torch.stack([of_tokens[:, tokens].mean(1) for tokens in tokens_of_word], dim=1)
    of_pictures = of_words.split([len(kept_K) for kept_K in kept], dim=-1)
    weights = [
        weights_SWK.new_zeros(*weights_SWK.shape[:2], len(features_ND)).index_copy(2, kept_K.cpu(), weights_SWK)
        for weights_SWK, features_ND, kept_K in zip(of_pictures, pictures, kept)
    ]
    return AnswerAttention(words, weights)


def lay_on_picture(
    weights_N: torch.Tensor, picture: Image.Image, config: AnyLlavaConfig, processor: AnyLlavaProcessor
) -> np.ndarray:
    """Weights of one picture's tokens as a density over its pixels, `[height, width]`.

    The sum over the pixels is the weight of all tokens that show a part of the picture.

    Args:
        weights_N: Weights in the order of the text.
        picture: The picture, upright, as the processor was given it.
        config: Configuration of the model.
        processor: The processor of the model.

    Raises:
        ValueError: if the picture does not have as many tokens as there are weights.
    """
    images = processor.image_processor
    pinpoints = images.image_grid_pinpoints if images.image_aspect_ratio == "anyres" else None
    layout = plan_image(
        picture.height,
        picture.width,
        tile_size=images.tile_size,
        patches_per_side=config.patches_per_side,
        prefix_tokens=config.num_prefix_tokens,
        pinpoints=pinpoints and tuple(map(tuple, pinpoints)),
        patch_merge_type=config.patch_merge_type,
    )
    if len(weights_N) != layout.num_tokens:
        raise ValueError(
            f"got {len(weights_N)} weights for a picture of {layout.num_tokens} tokens; expected equal numbers: give "
            "the picture and the processor that the attention was read with"
        )
    overview, details = _unmerge(weights_N, layout, config)
    if pinpoints is None:
        return _spread(overview, _single_tile_rectangle(picture, images), picture)
    density = _spread(overview, (0, 0, *picture.size), picture)
    if details.numel():
        density += _spread(details, _details_rectangle(picture, images, layout, config.patches_per_side), picture)
    return density


def overlay(picture: Image.Image, density: np.ndarray, *, highest: float | None = None) -> Image.Image:
    """The picture in dim grey, glowing where attention is.

    Args:
        picture: The picture.
        density: Density over its pixels, `[height, width]`.
        highest: The density that glows most (default: the highest one); share it to compare pictures.
    """
    highest = highest or float(density.max()) or 1.0
    # The power below 1 makes weak attention visible beside one hot spot.
    strength = np.clip(density / highest, 0, 1) ** 0.7
    steps = np.linspace(0, 1, len(GLOW))
    glow = np.stack([np.interp(strength, steps, channel) for channel in zip(*GLOW)], axis=-1)
    opacity = 0.8 * strength[..., None]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] * 0.5
    return Image.fromarray((grey * (1 - opacity) + glow * opacity).astype(np.uint8))


@contextmanager
def _eager_attention(language_model: PreTrainedModel) -> Iterator[None]:
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


def _find_last_answer(mask: Sequence[int], messages: list[dict[str, Any]]) -> tuple[int, int]:
    """The range of tokens of the last answer."""
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("got a conversation without an answer at its end; expected the assistant's turn last")
    if 1 not in mask:
        raise ValueError("got a chat template that marks no answers; expected {% generation %} around them")
    end = len(mask) - mask[::-1].index(1)
    start = end - mask[:end][::-1].index(0)
    return start, end


def _split_words(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[list[int]]]:
    """Words of an answer, and the places of each in `ids`; white space begins a word, control tokens are left out."""
    words, tokens_of_word, before = [], [], ""
    for place in range(len(ids)):
        text = tokenizer.decode(ids[: place + 1], skip_special_tokens=True)
        piece, before = text[len(before) :], text
        if not piece.strip():
            continue
        if not words or piece[0].isspace() or text[: -len(piece)][-1:].isspace():
            words.append("")
            tokens_of_word.append([])
        words[-1] += piece.strip()
        tokens_of_word[-1].append(place)
    return words, tokens_of_word


def _unmerge(
    weights_N: torch.Tensor, layout: ImageLayout, config: AnyLlavaConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The overview `[P, P]` and the kept part of the map of the details, which `AnyLlavaModel.merge_tiles` joined.

    Class tokens and newlines belong to no place and are dropped.
    """
    side, num_prefix = config.patches_per_side, config.num_prefix_tokens
    per_tile = side**2 + num_prefix
    overview = weights_N[:per_tile][num_prefix:].unflatten(0, (side, side))
    details = weights_N[per_tile:]
    if layout.num_tiles == 1:
        return overview, details
    if config.patch_merge_type == "flat":
        tiles = details.unflatten(0, (-1, per_tile))[:, num_prefix:]
        grid = tiles.unflatten(1, (side, side)).unflatten(0, (layout.grid_rows, layout.grid_columns))
        return overview, grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    has_newline = config.patch_merge_type == "spatial_unpad"
    rows = details.reshape(layout.kept_rows, layout.kept_columns + has_newline)
    return overview, rows[:, : layout.kept_columns]


Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture; may reach beyond it."""


def _single_tile_rectangle(picture: Image.Image, images: Any) -> Rectangle:
    """The part of the plane that the only tile shows."""
    width, height = picture.size
    tile_size, keeps_ratio = images.tile_size, images.size.shortest_edge is not None
    edge = images.size.shortest_edge if keeps_ratio else images.size.height
    left, top, shown_width, shown_height = 0.0, 0.0, width, height
    resized_width = resized_height = edge
    if images.image_aspect_ratio == "pad":
        shown_width = shown_height = max(width, height)
        left, top = -((shown_width - width) // 2), -((shown_height - height) // 2)
    elif keeps_ratio:
        short = min(width, height)
        resized_width, resized_height = int(edge * width / short), int(edge * height / short)
    # The centre of the resized picture is cut out.
    scale_x, scale_y = shown_width / resized_width, shown_height / resized_height
    left += (resized_width - tile_size) // 2 * scale_x
    top += (resized_height - tile_size) // 2 * scale_y
    return left, top, left + tile_size * scale_x, top + tile_size * scale_y


def _details_rectangle(picture: Image.Image, images: Any, layout: ImageLayout, side: int) -> Rectangle:
    """The part of the plane that the kept part of the detail tiles shows."""
    grid_height, grid_width = select_grid(picture.height, picture.width, images.image_grid_pinpoints)
    height, width = fit_inside(picture.height, picture.width, grid_height, grid_width)
    cell = images.tile_size / side
    scale_x, scale_y = picture.width / width, picture.height / height
    padding_x, padding_y = (grid_width - width) // 2, (grid_height - height) // 2
    return (
        (layout.left * cell - padding_x) * scale_x,
        (layout.top * cell - padding_y) * scale_y,
        (layout.right * cell - padding_x) * scale_x,
        (layout.bottom * cell - padding_y) * scale_y,
    )


def _spread(grid: torch.Tensor, rectangle: Rectangle, picture: Image.Image) -> np.ndarray:
    """A grid of weights that covers a rectangle, as a density over the pixels of the picture."""
    left, top, right, bottom = rectangle
    rows, columns = grid.shape
    cell_width, cell_height = (right - left) / columns, (bottom - top) / rows
    density = np.zeros((picture.height, picture.width), dtype=np.float32)
    x0, y0 = max(0, round(left)), max(0, round(top))
    x1, y1 = min(picture.width, round(right)), min(picture.height, round(bottom))
    if x0 >= x1 or y0 >= y1:
        return density
    # The range of cells in the picture, in cells. Others are cut off, or smoothing would blend them into the picture.
    first, last = max(0, (x0 - left) / cell_width), min(columns, (x1 - left) / cell_width)
    upper, lower = max(0, (y0 - top) / cell_height), min(rows, (y1 - top) / cell_height)
    cut_left, cut_top = int(first), int(upper)
    cells = grid[cut_top : math.ceil(lower), cut_left : math.ceil(last)]
    box = (first - cut_left, upper - cut_top, last - cut_left, lower - cut_top)
    shown = Image.fromarray(cells.float().numpy()).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=box)
    density[y0:y1, x0:x1] = np.asarray(shown) / (cell_width * cell_height)
    return density
