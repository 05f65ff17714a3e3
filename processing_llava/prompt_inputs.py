"""Prompts and their images -> the rows of a batch: counted, cut, padded, and with labels that hold no images."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.utils import logging

from .image_processing_llava import flatten_images
from .messages import is_missing, shorten
from .prompt_ids import encode_prompt
from .prompts import count_images

logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
"""The label that cross entropy skips."""
PLACEHOLDERS = ("<image>", "<|image|>", "<|image_pad|>", "[IMG]", "<start_of_image>", "<image_soft_token>")
"""Placeholders of many families of models, which people write into prompts for another one."""
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


def drop_missing(images: Any, *, num_rows: int) -> Any:
    """Images without what holds no picture: one list for each prompt where there is one entry for each."""
    if not isinstance(images, (list, tuple)):
        return images
    lacks_some = any(map(is_missing, images))
    are_rows = all(isinstance(entry, (list, tuple)) or is_missing(entry) for entry in images)
    if are_rows or (lacks_some and len(images) == num_rows):
        return [[image for image in flatten_images(entry) if not is_missing(image)] for entry in images]
    return [image for image in flatten_images(images) if not is_missing(image)]


def check_rows(prompts: list[str], images: Any, *, num_images: int, image_token: str) -> None:
    """Refuse prompts whose images could be those of another row.

    Args:
        images: A flat list, or a list for each prompt.
        num_images: How many they are.
        image_token: The placeholder of one image.

    Raises:
        ValueError: naming the row, and numbers of placeholders and images.
    """
    placeholders = [count_images(prompt, image_token) for prompt in prompts]
    nested = isinstance(images, (list, tuple)) and len(images) > 0
    nested = nested and all(isinstance(row, (list, tuple)) for row in images)
    if nested:
        if len(images) != len(prompts):
            raise ValueError(f"got {len(images)} lists of images for {len(prompts)} prompts; expected one for each")
        for row, (expected, row_images) in enumerate(zip(placeholders, images)):
            num_row_images = len(flatten_images(row_images))
            if expected != num_row_images:
                raise ValueError(
                    f"got {expected} {image_token} placeholders and {num_row_images} images in row {row}; "
                    f"expected equal numbers: {_explain_places(prompts, image_token)}"
                )
        return
    if sum(placeholders) != num_images:
        raise ValueError(
            f"got {sum(placeholders)} {image_token} placeholders and {num_images} images; expected equal "
            f"numbers: {_explain_places(prompts, image_token)}"
        )
    row = next((row for row, count in enumerate(placeholders) if count != placeholders[0]), None)
    if row is not None:
        raise ValueError(
            f"got {num_images} images in one list, with {placeholders[0]} {image_token} placeholders in row "
            f"0 and {placeholders[row]} in row {row}; expected as many in each row, or a list of images for each "
            "prompt: a row could get the image of another"
        )


def _explain_places(prompts: list[str], image_token: str) -> str:
    """What to do about other numbers of placeholders than of images."""
    place = 'an item {"type": "image"} in the content of a message is one'
    if any(prompt.count(image_token) > count_images(prompt, image_token) for prompt in prompts):
        return f"an {image_token} that is typed in a message is text; {place}"
    for prompt in prompts:
        other = next((name for name in PLACEHOLDERS if name in prompt and name != image_token), None)
        if other is not None:
            return f"this model writes {image_token}, not {other}; {place}"
    return f"{place}, or {image_token} in a prompt that no template wrote; and each takes one image"


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
