"""The attention function of a pass over rows that are generated together, and when a language model has it.

What is surprising: the language model is given no cache. As in transformers' own continuous batching, which takes
text only, the states travel as a keyword argument to the attention function.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from .row_states import RowStates

NAME = "any_llava_rows"
"""The `attn_implementation` of a language model during a pass."""


def row_attention_forward(
    module: nn.Module,
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    attention_mask: None,
    *,
    row_states: RowStates,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' AttentionInterface; `[1, T, H, D]` comes back.

    Args:
        row_states: Of the batch, with a pass begun.
        The others: those of transformers.

    Raises:
        ValueError: for a layer with a kind of attention that torch's function does not compute.
    """
    unknown = {"softcap": softcap, "attention sinks": s_aux, "a position bias": position_bias}
    for kind, value in unknown.items():
        if value is not None:
            raise ValueError(
                f"got a {type(module).__name__} with {kind}; expected plain attention: answer one request at a time"
            )
    attended = row_states.attend(
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
    """Let a language model attend with `row_states`; not while another thread uses it."""
    before = language_model.config._attn_implementation
    language_model.config._attn_implementation = NAME
    try:
        yield
    finally:
        language_model.config._attn_implementation = before


AttentionInterface.register(NAME, row_attention_forward)
