"""Rows of conversations -> one training batch, padded or packed.

Labels are what the template marks as written by the assistant: they come from the same rendering as the ids, so they
cannot drift from them. A row without anything to learn is an error that names it, not a row of -100.

A packed batch is one row with all rows end to end: `position_ids` restart with each of them, and `cu_seq_lens_q` holds
their bounds, for an attention function that keeps them apart (`modeling_llava/acceleration/packed_attention.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from processing_llava.messages import check_messages, find_picture, list_image_items
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.prompt_ids import check_learn_tokens, encode_prompt
from processing_llava.prompt_inputs import IGNORED_LABEL
from processing_llava.prompts import count_images

from .conversations import IMAGE, place_images, read_images, read_messages, split_at_images
from .row_lengths import ON_BAD_ROW, read_image_sizes

logger = logging.get_logger(__name__)


class LlavaDataCollator:
    """Turns rows `{"id", "images", "messages"}` into `input_ids`, `labels` and `pixel_values`.

    Rows of TRL will do, and are read as by `convert_record`: `id` may be missing, `image` may hold a single picture,
    items of the messages may hold theirs, `prompt` and `completion` may stand for `messages`, and pictures without a
    place stand in front of what the user says first.

    A padded batch has `attention_mask` beside them, a packed one `position_ids` and the bounds of its rows.

    Args:
        processor: Renders, tokenises and prepares images; its template needs `{% generation %}` marks.
        max_length: Longest row in tokens, image features counted. Longer rows are errors: cutting one could remove
            its answer or part of an image.
        packed: Put the rows end to end instead of padding them.
        read_features: Gives the tower features `[I, P, V]` of images. The batch then holds them as
            `mm_encoder_outputs`, and neither reads nor prepares pictures.
        learn_tokens: Special tokens of the tokenizer that count as such in answers; they replace those of the
            processor. All other special tokens that a row holds as text are spelled in characters, as they are for
            whoever asks.
        on_bad_row: "raise", or "skip" rows that cannot be trained on: a batch then has fewer rows, each skipped one is
            logged with its reason, and `skipped` holds the ids. For a batch without any other row, the first row of
            the last batch stands in. Workers of a data loader have a collator each.

    Raises:
        ValueError: naming the row, if it cannot be trained on; or all rows of the first batch, if none can.
    """

    def __init__(
        self,
        processor: AnyLlavaProcessor,
        *,
        max_length: int | None = None,
        packed: bool = False,
        read_features: Callable[[list[str]], torch.Tensor] | None = None,
        on_bad_row: str = "raise",
        learn_tokens: Sequence[str] | None = None,
    ) -> None:
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"got on_bad_row={on_bad_row!r}; expected one of {', '.join(ON_BAD_ROW)}")
        if learn_tokens is not None:
            check_learn_tokens(learn_tokens, processor.tokenizer, image_token=processor.image_token)
            processor.learn_tokens = list(learn_tokens)
        self.processor = processor
        self.max_length = max_length
        self.packed = packed
        self.read_features = read_features
        self.on_bad_row = on_bad_row
        self.skipped: list[str] = []
        """Ids of the rows that were left out so far."""
        self._stand_in: dict[str, Any] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [{**row, "id": _name_row(row, number)} for number, row in enumerate(rows, start=1)]
        try:
            batch = self._collate(rows)
            self._stand_in = rows[0]
            return batch
        except (OSError, ValueError):
            # Rare enough to look at each row on its own.
            faults = [self._find_fault(row) for row in rows]
            if not any(faults):
                raise
        if self.on_bad_row == "raise":
            fault = next(filter(None, faults))
            # The worker of a data loader passes on errors that are made of one text (torch 2.13, _utils.py).
            raise ValueError(str(fault)) from fault
        bad = [(row["id"], fault) for row, fault in zip(rows, faults) if fault is not None]
        self.skipped += [row_id for row_id, _ in bad]
        for row_id, fault in bad:
            logger.warning(f"row {row_id!r} is skipped, {len(self.skipped)} so far: {fault}")
        good = [row for row, fault in zip(rows, faults) if fault is None]
        if good:
            return self._collate(good)
        if self._stand_in is None:
            raise ValueError(
                f"got a batch in which no row can be trained on: {', '.join(row_id for row_id, _ in bad)}; expected "
                f"at least one; the first says: {bad[0][1]}"
            )
        logger.warning(f"row {self._stand_in['id']!r} stands in for a batch in which no row can be trained on")
        return self._collate([self._stand_in])

    def _find_fault(self, row: dict[str, Any]) -> Exception | None:
        """Why a row cannot be trained on."""
        try:
            row = _complete(row)
            read_image_sizes(row, decode=True, limits=self.processor.image_processor.limits)
            self._collate([row])
        except (OSError, ValueError) as error:
            return error
        return None

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [_complete(row) for row in rows]
        image_inputs, num_image_tokens = self._encode_images([image for row in rows for image in row["images"]])
        remaining = iter(num_image_tokens)
        encoded = [self._encode_row(row, [next(remaining) for _ in row["images"]]) for row in rows]
        return (self._pack(encoded) if self.packed else self._pad(encoded)) | image_inputs

    def _encode_images(self, images: list[Any]) -> tuple[dict[str, Any], list[int]]:
        """What the model takes of the images, and how many tokens each has."""
        if not images:
            return {}, []
        if self.read_features is not None:
            features_IPV = self.read_features(images)
            encoder_outputs = {"image": BaseModelOutputWithPooling(last_hidden_state=features_IPV)}
            # One tile each: as many tokens as pictures would have.
            num_image_tokens = self.processor.count_image_tokens({"pixel_values": images})
            return {"mm_encoder_outputs": encoder_outputs}, num_image_tokens
        image_inputs = self.processor.image_processor(images, return_tensors="pt")
        return dict(image_inputs), self.processor.count_image_tokens(image_inputs)

    def _encode_row(self, row: dict[str, Any], num_image_tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels of a row, `[L]` each."""
        try:
            messages = row["messages"]
            if num_image_tokens:
                messages = _place_images(messages, len(num_image_tokens))
            prompt = self.processor.render(messages)
        except (TemplateError, ValueError) as error:
            raise ValueError(
                f"got row {row['id']!r} that cannot be written ({error}); expected a conversation that fits the chat "
                "template; correct the row, or choose another template"
            ) from error
        num_places = count_images(prompt, self.processor.image_token)
        if num_places != len(num_image_tokens):
            raise ValueError(
                f"got row {row['id']!r} with {num_places} {self.processor.image_token} placeholders and "
                f"{len(num_image_tokens)} images; expected equal numbers: a placeholder is an item "
                '{"type": "image"}, and what is typed is text'
            )
        ids, mask = encode_prompt(
            prompt,
            self.processor.tokenizer,
            image_token=self.processor.image_token,
            image_token_id=self.processor.image_token_id,
            num_image_tokens=num_image_tokens,
        )
        if not any(mask):
            raise ValueError(
                f"got row {row['id']!r} without a token to learn; expected an answer inside {{% generation %}}: check "
                "the row, and that the chat template marks what the assistant writes"
            )
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"got row {row['id']!r} with {len(ids)} tokens; expected at most max_length={self.max_length}: raise "
                "max_length, or take the row out"
            )
        input_ids = torch.tensor(ids)
        return input_ids, input_ids.masked_fill(torch.tensor(mask) == 0, IGNORED_LABEL)

    def _pad(self, encoded: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids, labels = zip(*encoded)
        lengths = torch.tensor([len(row) for row in ids])
        pad_token_id = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        }

    def _pack(self, encoded: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
        ids, labels = zip(*encoded)
        lengths = [len(row) for row in ids]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        packed_labels = torch.cat(labels)
        # Nothing stands before the first token of a row, so nothing may predict it.
        packed_labels[bounds[:-1].long()] = IGNORED_LABEL
        return {
            "input_ids": torch.cat(ids)[None],
            "labels": packed_labels[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }


def _name_row(row: dict[str, Any], number: int) -> str:
    return f"number {number} in its batch" if row.get("id") is None else str(row["id"])


def _complete(row: dict[str, Any]) -> dict[str, Any]:
    messages = read_messages(row, row["id"])
    if messages is None:
        raise ValueError(
            f"got row {row['id']!r} with the keys {sorted(row.keys() - {'id'})}; expected 'messages', and 'images' if "
            "it has some, or lists of messages in 'prompt' and 'completion'"
        )
    images = read_images(row, row["id"])
    try:
        check_messages(messages)
        own = [find_picture(item) for item in list_image_items(messages)]
    except ValueError as error:
        raise ValueError(f"got row {row['id']!r} that cannot be written ({error}); correct the row") from error
    own = [picture for picture in own if picture is not None]
    if own and images:
        raise ValueError(
            f"got row {row['id']!r} with {len(own)} images in its messages and {len(images)} beside them; expected "
            "one place for all of them; take the others out"
        )
    return {**row, "messages": messages, "images": own or images}


def _place_images(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages with places for the images, as `convert_record` finds them."""
    check_messages(messages)
    turns = [
        {**message, "content": split_at_images(message["content"])}
        if message["role"] == "user" and isinstance(message["content"], str) and IMAGE in message["content"]
        else message
        for message in messages
    ]
    return turns if any(list_image_items(turns)) else place_images(turns, num_images)
