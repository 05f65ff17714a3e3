"""Prompts -> the rows of a batch: cut, padded, and with labels that hold no images."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.utils import logging

from .messages import is_missing, shorten
from .prompt_ids import encode_prompt
from .prompts import count_images

logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
"""The label that cross entropy skips."""
_NOT_MADE = {
    "return_offsets_mapping", "return_special_tokens_mask", "return_length", "return_overflowing_tokens",
    "return_token_type_ids", "stride",
}  # fmt: skip
_HELD_ANYWAY = {"return_tensors", "sanitize_control_tokens"}
"""The first is for the processor; the second asks for what every prompt does, see `prompts.py`."""


class PromptInputs(BatchFeature):
    """What the processor returns: a `BatchFeature` that never learns an image.

    Trainers such as TRL's take `labels` from `input_ids` and put them beside. The ids of image tokens among them stand
    for no text, and may lie outside the vocabulary, so they are ignored labels here.
    """

    def __init__(self, data: dict[str, Any], *, image_token_id: int | None = None, **kwargs) -> None:
        # Set before the values, which come one by one. Moving a batch to a device makes another one of its values
        # alone (accelerate 1.15, utils/operations.py).
        self.image_token_id = image_token_id
        super().__init__(data, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "labels" and isinstance(value, torch.Tensor) and self.image_token_id is not None:
            value = value.masked_fill(self.data["input_ids"] == self.image_token_id, IGNORED_LABEL)
        super().__setitem__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"image_token_id": self.image_token_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.image_token_id = state["image_token_id"]
        super().__setstate__(state)


def encode_prompts(
    prompts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_token: str,
    image_token_id: int,
    num_image_tokens: Iterator[int],
    add_special_tokens: bool = True,
    padding: bool | str = False,
    padding_side: str | None = None,
    max_length: int | None = None,
    truncation: bool | str | None = None,
    pad_to_multiple_of: int | None = None,
    return_assistant_tokens_mask: bool = False,
    return_attention_mask: bool | None = None,
    return_mm_token_type_ids: bool = False,
    verbose: bool = True,
    **others: Any,
) -> dict[str, list]:
    """Rows of ids and what else of text was asked for.

    Args:
        prompts: As `encode_prompt` takes them.
        num_image_tokens: How many tokens each image of all prompts has, in reading order.
        return_assistant_tokens_mask: Add `assistant_masks`: 1 on tokens that the assistant writes.
        return_mm_token_type_ids: Add `mm_token_type_ids`: 1 on tokens of images.
        **others: As in transformers' tokenizers, like the parameters above; what has no effect here is refused.

    Raises:
        ValueError: if truncation would cut an image, or something is asked for that is not made here.
    """
    asked = {name for name, value in others.items() if not is_missing(value) and (value or not isinstance(value, int))}
    if not_made := sorted(asked & _NOT_MADE):
        raise ValueError(
            f"got {', '.join(not_made)}; expected none of it, since an image becomes many tokens and no row is "
            "split: take it out"
        )
    if unknown := sorted(asked - _NOT_MADE - _HELD_ANYWAY):
        raise ValueError(
            f"got {', '.join(unknown)}, which has no effect here; expected each prompt as one whole text: take it out"
        )
    for name, number in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
        if not isinstance(number, (int, type(None))) or (number or 0) < 0:
            raise ValueError(f"got {name}={shorten(number)}; expected a number of tokens: correct it")
    if padding_side not in (None, "left", "right"):
        raise ValueError(f"got padding_side={shorten(padding_side)}; expected 'left' or 'right': correct it")
    rows, masks = [], []
    for prompt in prompts:
        ids, mask = encode_prompt(
            prompt,
            tokenizer,
            image_token=image_token,
            image_token_id=image_token_id,
            num_image_tokens=[next(num_image_tokens) for _ in range(count_images(prompt, image_token))],
            add_special_tokens=add_special_tokens,
        )
        rows.append(ids)
        masks.append(mask)
    # As in transformers 5.23, tokenization_utils_base.py.
    is_cut = truncation or max_length is not None
    if verbose and not is_cut and max(map(len, rows), default=0) > tokenizer.model_max_length:
        logger.warning_once(
            f"got a prompt of more than {tokenizer.model_max_length} tokens, the model_max_length of the tokenizer; "
            "expected a shorter one: the model may not be able to read it"
        )
    if truncation:
        longest = tokenizer.model_max_length if max_length is None else max_length
        places = [_find_kept(ids, longest, tokenizer.truncation_side, image_token_id) for ids in rows]
        rows = [ids[place] for ids, place in zip(rows, places)]
        masks = [mask[place] for mask, place in zip(masks, places)]
    encoded = tokenizer.pad(
        {"input_ids": rows},
        padding=padding,
        padding_side=padding_side,
        max_length=max_length,
        pad_to_multiple_of=pad_to_multiple_of,
        return_attention_mask=return_attention_mask,
    )
    if return_assistant_tokens_mask:
        side = padding_side or tokenizer.padding_side
        encoded["assistant_masks"] = [
            _pad(mask, length=len(row), side=side) for mask, row in zip(masks, encoded["input_ids"])
        ]
    if return_mm_token_type_ids:
        encoded["mm_token_type_ids"] = [
            [int(token == image_token_id) for token in row] for row in encoded["input_ids"]
        ]
    return encoded


def _find_kept(ids: list[int], longest: int, truncation_side: str, image_token_id: int) -> slice:
    """Which part of a row remains."""
    num_cut = max(len(ids) - longest, 0)
    kept = slice(num_cut, None) if truncation_side == "left" else slice(0, len(ids) - num_cut)
    if ids.count(image_token_id) != ids[kept].count(image_token_id):
        raise ValueError(
            f"got a prompt of {len(ids)} tokens; expected at most max_length={longest}, since cutting it would cut an "
            "image: raise max_length"
        )
    return kept


def _pad(mask: list[int], *, length: int, side: str) -> list[int]:
    padding = [0] * (length - len(mask))
    return mask + padding if side == "right" else padding + mask
