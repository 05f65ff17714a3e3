"""Rows of conversations -> one padded training batch.

Labels are what the template marks as written by the assistant: they come from the same rendering as the ids, so they
cannot drift from them. A row without anything to learn is an error that names it, never a row of -100.
"""

from typing import Any

import torch

from .processing_llava import AnyLlavaProcessor

IGNORED_LABEL = -100
"""The label that cross entropy skips."""


class LlavaDataCollator:
    """Turns rows `{"id", "images", "messages"}` into `input_ids`, `labels`, `attention_mask` and `pixel_values`.

    Args:
        processor: Renders, tokenises and prepares images; its template needs `{% generation %}` marks.
        max_length: Longest row in tokens, image features counted. Longer rows are errors: cutting one could remove
            its answer or part of an image.

    Raises:
        ValueError: naming the row, if it cannot be trained on.
    """

    def __init__(self, processor: AnyLlavaProcessor, *, max_length: int | None = None) -> None:
        self.processor = processor
        self.max_length = max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["images"] for row in rows]
        batch = self.processor(
            text=[self.processor.render(row["messages"]) for row in rows],
            images=images if any(images) else None,
            padding=True,
            padding_side="right",
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )
        assistant_masks = batch.pop("assistant_masks")
        for row, mask, length in zip(rows, assistant_masks, batch["attention_mask"].sum(dim=1).tolist()):
            self._check_row(row["id"], num_supervised=int(mask.sum()), length=length)
        batch["labels"] = batch["input_ids"].masked_fill(assistant_masks == 0, IGNORED_LABEL)
        return dict(batch)

    def _check_row(self, row_id: str, *, num_supervised: int, length: int) -> None:
        if num_supervised == 0:
            raise ValueError(
                f"got row {row_id!r} without a token to learn; expected an answer inside {{% generation %}}: check "
                "the row, and that the chat template marks what the assistant writes"
            )
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"got row {row_id!r} with {length} tokens; expected at most max_length={self.max_length}: raise "
                "max_length, or take the row out"
            )
