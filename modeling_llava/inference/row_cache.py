"""RowCache: the KV cache of rows that are generated together, and the attention function that reads it.

One pass of the language model takes one packed row `[1, T]`: the newest token of every running row, then the prompts
of new rows, end to end. So no layer computes padding. Each row attends to its own keys and values only, which lie in a
slot of their own; a row that leaves gives its slot to the last one. Of a prompt whose beginning is known, keys and
values of that are copied into the slot, and the pass takes the rest.

What is surprising: the language model updates no cache. The cache travels as a keyword argument to the attention
function, as that of transformers' own continuous batching does (transformers 5.23, integrations/sdpa_attention.py).
"""

# Shape suffixes: S slots, N running rows, H heads, K key/value heads, G heads that share one, C tokens a slot has room
#                 for, or of a prompt, L tokens of a prompt that a pass takes, T tokens of the packed row, D width of
#                 a head

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from modeling_llava.acceleration.cpu_layers import attend_to_cache

SLOT_STEP = 64
"""Slots have room for a multiple of this, so that they are seldom allocated anew."""
NAME = "any_llava_rows"
"""The `attn_implementation` of a language model during a pass."""


class NewRow(NamedTuple):
    """A prompt that joins a pass."""

    length: int
    largest_length: int
    """Tokens of the prompt and of the longest answer."""
    num_known: int = 0
    """Tokens from the beginning on whose keys and values are given, and which the pass leaves out."""
    known: Iterator[torch.Tensor] = iter(())
    """Keys and values `[1, K, num_known, D]` of one layer after the other."""


class RowCache:
    """The KV cache of a batch.

    Args:
        max_rows: Largest number of slots.
        max_tokens: Tokens of all slots together, their unused ends included. One token of a 7B model takes 0.5 MB in
            16 bits.
        row_by_row: Attend in one call for each row, which reads no padding, instead of one call with a mask.
        device: Device of the first layer.
        fixed: All slots are there from the first pass on and share the tokens evenly, as `begin_step` needs them.
    """

    def __init__(
        self, *, max_rows: int, max_tokens: int, row_by_row: bool, device: torch.device, fixed: bool = False
    ) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.row_by_row = row_by_row
        self.fixed = fixed
        self.device = device
        self.lengths: list[int] = []
        """Tokens of each row, those of the running pass included."""
        self.num_running = 0
        """Number of rows before the new ones; all slots in a step."""
        self._new_rows: list[NewRow] = []
        self._seen_length = 0
        self._largest_lengths: list[int] = []
        self._room = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._newest_N = torch.empty(0)
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def largest_length(self) -> int:
        """The length to which a row can grow once all others have left."""
        return self.max_tokens // self.max_rows if self.fixed else self.max_tokens // SLOT_STEP * SLOT_STEP

    def has_room(self, largest_lengths: list[int]) -> bool:
        """Whether rows that grow to these lengths can join."""
        num_rows = len(self.lengths) + len(largest_lengths)
        room = self._plan_room([*self._largest_lengths, *largest_lengths])
        return num_rows <= self.max_rows and num_rows * room <= self.max_tokens

    def begin_pass(self, new_rows: list[NewRow]) -> torch.LongTensor:
        """Let every row grow by a token, and new rows join behind them.

        Returns:
            The positions `[1, T]` of the packed row.
        """
        self.num_running, self._new_rows = len(self.lengths), new_rows
        self.lengths = [length + 1 for length in self.lengths] + [row.length for row in new_rows]
        self._seen_length = max(self.lengths[: self.num_running], default=0)
        self._largest_lengths += [row.largest_length for row in new_rows]
        self._make_room(self._plan_room(self._largest_lengths))
        newest = [length - 1 for length in self.lengths[: self.num_running]]
        self._newest_N = torch.tensor(newest, dtype=torch.long, device=self.device)
        self._masks = {}
        prompts = [torch.arange(row.num_known, row.length, device=self.device) for row in new_rows]
        return torch.cat([self._newest_N, *prompts])[None]

    def begin_step(self) -> torch.LongTensor:
        """Let every row grow by a token, in a pass over all slots, which has the same shapes every time.

        Returns:
            The positions `[1, S]` of the packed row; those of slots without a row are 0.
        """
        self.num_running, self._new_rows = self._num_slots, []
        self.lengths = [length + 1 for length in self.lengths]
        self._seen_length = self._room
        newest = [length - 1 for length in self.lengths] + [0] * (self._num_slots - len(self.lengths))
        self._newest_N = torch.tensor(newest, device=self.device)
        # Built here: a CUDA graph keeps what is built inside of it in memory of its own.
        self._masks = {None: self._build_mask(None)}
        return self._newest_N[None]

    def read(self, row: int) -> list[torch.Tensor]:
        """Keys and values `[1, K, L, D]` of a row, of one layer after the other; they are views."""
        layers = [self._layers[layer] for layer in sorted(self._layers)]
        return [cached_SKCD[row : row + 1, :, : self.lengths[row]] for layer in layers for cached_SKCD in layer]

    def remove(self, row: int) -> None:
        """Give the slot of a row to the last one."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        if row < last:
            for layer in self._layers.values():
                for cached_SKCD in layer:
                    cached_SKCD[row, :, :length] = cached_SKCD[last, :, :length]
        for lengths in (self.lengths, self._largest_lengths):
            lengths[row] = lengths[-1]
            lengths.pop()

    def clear(self) -> None:
        """Forget all rows, and free their memory."""
        self.lengths.clear()
        self._largest_lengths.clear()
        self._layers.clear()
        self._room = 0

    def attend(
        self,
        layer: int,
        query_HTD: torch.Tensor,
        key_KTD: torch.Tensor,
        value_KTD: torch.Tensor,
        *,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Cache keys and values of the packed row, and attend; returns `[1, T, H, D]`."""
        if layer not in self._layers:
            # Zeros: a masked position counts 0 times its value, which is NaN where that is NaN.
            self._layers[layer] = tuple(
                new_KTD.new_zeros(self._num_slots, new_KTD.shape[0], self._room, new_KTD.shape[2])
                for new_KTD in (key_KTD, value_KTD)
            )
            if self.fixed:
                for cached_SKCD in self._layers[layer]:
                    torch._dynamo.mark_static_address(cached_SKCD)
        keys_SKCD, values_SKCD = self._layers[layer]
        num_running = self.num_running
        attended = []
        if num_running:
            rows_N = torch.arange(num_running, device=key_KTD.device)
            newest_N = self._newest_N.to(key_KTD.device)
            keys_SKCD[rows_N, :, newest_N] = key_KTD[:, :num_running].transpose(0, 1)
            values_SKCD[rows_N, :, newest_N] = value_KTD[:, :num_running].transpose(0, 1)
            query_NKGD = query_HTD[:, :num_running].transpose(0, 1).unflatten(1, (len(key_KTD), -1))
            attended += self._attend_running(query_NKGD, keys_SKCD, values_SKCD, scaling, window)
        start = num_running
        for row, new in enumerate(self._new_rows, start=num_running):
            end = start + new.length - new.num_known
            query, key, value = (packed[None, :, start:end] for packed in (query_HTD, key_KTD, value_KTD))
            for cached_SKCD, computed in ((keys_SKCD, key), (values_SKCD, value)):
                if new.num_known:
                    cached_SKCD[row, :, : new.num_known] = next(new.known)[0]
                cached_SKCD[row, :, new.num_known : new.length] = computed[0]
            if new.num_known:
                key, value = keys_SKCD[row : row + 1, :, : new.length], values_SKCD[row : row + 1, :, : new.length]
            attended.append(_attend_prompt(query, key, value, scaling, window)[0].transpose(0, 1))
            start = end
        return torch.cat(attended)[None]

    def _attend_running(
        self,
        query_NKGD: torch.Tensor,
        keys_SKCD: torch.Tensor,
        values_SKCD: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> list[torch.Tensor]:
        if self.row_by_row:
            attended = []
            for row, length in enumerate(self.lengths[: self.num_running]):
                seen = (
                    slice(row, row + 1),
                    slice(None),
                    slice(0 if window is None else max(0, length - window), length),
                )
                query = query_NKGD[row : row + 1]
                row_attended = attend_to_cache(query, keys_SKCD[seen], values_SKCD[seen], scaling=scaling)
                attended.append(row_attended.flatten(1, 2))
            return attended
        seen = slice(0, self.num_running), slice(None), slice(0, self._seen_length)
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        mask_N11C = self._masks[window].to(query_NKGD.device)
        attended = scaled_dot_product_attention(
            query_NKGD, keys_SKCD[seen], values_SKCD[seen], attn_mask=mask_N11C, scale=scaling
        )
        return [attended.flatten(1, 2)]

    def _build_mask(self, window: int | None) -> torch.BoolTensor:
        """Mask of the cached tokens that the running rows see, `[N, 1, 1, C]`."""
        newest_N1 = self._newest_N[:, None]
        positions_C = torch.arange(self._seen_length, device=self.device)
        mask_NC = positions_C <= newest_N1
        if window is not None:
            mask_NC &= positions_C > newest_N1 - window
        return mask_NC[:, None, None]

    @property
    def _num_slots(self) -> int:
        return min(self.max_rows, self.max_tokens // self._room)

    def _plan_room(self, largest_lengths: list[int]) -> int:
        """The tokens that a slot must have room for; slots of less than twice that stay as they are."""
        if self.fixed:
            return self.largest_length
        needed = -(-max(largest_lengths) // SLOT_STEP) * SLOT_STEP
        return self._room if needed <= self._room < 2 * needed else needed

    def _make_room(self, room: int) -> None:
        if room == self._room:
            return
        self._room = room
        length = max(self.lengths[: self.num_running], default=0)
        for layer, tensors in self._layers.items():
            grown = []
            for old_SKCD in tensors:
                new_SKCD = old_SKCD.new_zeros(self._num_slots, old_SKCD.shape[1], room, old_SKCD.shape[3])
                kept = slice(0, self.num_running), slice(None), slice(0, length)
                new_SKCD[kept] = old_SKCD[kept]
                grown.append(new_SKCD)
            self._layers[layer] = tuple(grown)


def _attend_prompt(
    query_1HLD: torch.Tensor,
    key_1KCD: torch.Tensor,
    value_1KCD: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """What the last L of C tokens attend to."""
    length, num_seen = query_1HLD.shape[2], key_1KCD.shape[2]
    is_whole = length == num_seen
    mask_LC = None
    if not is_whole or (window is not None and length > window):
        mask_LC = torch.ones(length, num_seen, dtype=torch.bool, device=query_1HLD.device).tril(num_seen - length)
        if window is not None:
            mask_LC = mask_LC.triu(num_seen - length + 1 - window)
    return scaled_dot_product_attention(
        query_1HLD,
        key_1KCD,
        value_1KCD,
        attn_mask=mask_LC,
        is_causal=mask_LC is None,
        scale=scaling,
        enable_gqa=query_1HLD.shape[1] != key_1KCD.shape[1],
    )


def row_attention_forward(
    module: nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: None,
    *,
    row_cache: RowCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' AttentionInterface; returns `[1, T, H, D]`.

    Args:
        row_cache: The KV cache of the batch, after `begin_pass` or `begin_step`.
        The others: those of transformers.

    Raises:
        ValueError: for a layer with a kind of attention that `scaled_dot_product_attention` does not compute.
    """
    unknown = {"softcap": softcap, "attention sinks": s_aux, "a position bias": position_bias}
    for kind, value in unknown.items():
        if value is not None:
            raise ValueError(
                f"got a {type(module).__name__} with {kind}; expected plain attention: answer one request at a time"
            )
    attended = row_cache.attend(
        module.layer_idx, query_1HTD[0], key_1KTD[0], value_1KTD[0], scaling=scaling, window=sliding_window
    )
    return attended, None


def check_row_attention(language_model: PreTrainedModel) -> None:
    """Refuse language models that have attention functions of their own.

    Raises:
        ValueError: for example for MPT.
    """
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation(NAME)
    is_set = language_model.config._attn_implementation == NAME
    language_model.set_attn_implementation(before)
    if not is_set:
        raise ValueError(
            f"got a {type(language_model).__name__}; expected a language model that takes attention functions of "
            "transformers: answer one request at a time"
        )


@contextmanager
def use_row_attention(language_model: PreTrainedModel) -> Iterator[None]:
    """Let a language model attend with `row_cache`; not while another thread uses it."""
    before = language_model.config._attn_implementation
    language_model.config._attn_implementation = NAME
    try:
        yield
    finally:
        language_model.config._attn_implementation = before


AttentionInterface.register(NAME, row_attention_forward)
