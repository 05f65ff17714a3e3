"""Causal attention inside the segments of a packed row: rows of a batch end to end, without padding between them.

A packed batch has one row `[1, L]`, `position_ids` that restart with each segment, no attention mask, and the bounds
of the segments as `cu_seq_lens_q` (`[S + 1]`, int32, from 0 to L) with `max_length_q`: the names under which
transformers passes them through a language model to its attention function (transformers 5.23,
modeling_flash_attention_utils.py).

What is surprising: transformers recognises packed rows by their positions too, and builds a mask of L x L
(transformers 5.23, masking_utils.py: find_packed_sequence_indices). Here no mask is made, and a token never meets one
of another segment. Without a kernel for segments, such as on a CPU, each segment is computed on its own; flex
attention would be compiled anew for other lengths.
"""

# B rows · H heads · L tokens · D width of a head · S segments

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "any_llava_packed"
"""The `attn_implementation` of a language model that takes packed rows. Other rows are computed as in "sdpa"."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the language model of a LLaVA take packed rows; the vision tower keeps its attention.

    Raises:
        ValueError: for a language model whose attention cannot be chosen, such as that of MPT.
    """
    language_model = model.base_model.language_model
    language_model.set_attn_implementation(NAME)
    if language_model.config._attn_implementation != NAME:
        raise ValueError(
            f"got a {type(language_model).__name__} for packed rows; expected a language model that takes attention "
            "functions of transformers, or each row would see the others: take tokens_per_batch out of the recipe"
        )


def packed_attention_forward(
    module: nn.Module,
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers' AttentionInterface; returns `[B, L, H, D]`.

    Args:
        cu_seq_lens_q: Bounds of the segments; None computes an ordinary batch.
        max_length_q: Length of the longest segment.
        **kwargs: As in transformers, with `dropout`, `scaling` and the others above.

    Raises:
        ValueError: for packed rows on a layer with a sliding window that is shorter than a segment, or with a kind of
            attention that torch's functions do not compute.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query_BHLD, key_BHLD, value_BHLD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if sliding_window is not None and max_length_q > sliding_window:
        raise ValueError(
            f"got a packed row with a segment of {max_length_q} tokens for a layer with a window of {sliding_window}; "
            "expected segments no longer than the window: lower max_length, or train without packing"
        )
    if softcap is not None or s_aux is not None:
        unknown = "attention sinks" if softcap is None else "softcap"
        raise ValueError(
            f"got a packed row for a {type(module).__name__} with {unknown}; expected plain attention: train "
            "without packing"
        )
    inputs = query_BHLD, key_BHLD, value_BHLD
    device_type = query_BHLD.device.type
    if torch.is_autocast_enabled(device_type):
        # Norms and positions leave queries and keys in the float32 of the weights, which the kernel does not take.
        inputs = tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in inputs)
    attend = _attend_with_kernel if _kernel_takes(inputs[0]) and not dropout else _attend_one_by_one
    return attend(*inputs, cu_seq_lens_q, max_length_q, dropout, scaling), None


def packed_mask(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """The mask of transformers where rows are padded or continue a cache, and none for packed rows."""
    if attention_mask is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, packed_attention_forward)
AttentionMaskInterface.register(NAME, packed_mask)


def _kernel_takes(query_BHLD: torch.Tensor) -> bool:
    """Whether torch's flash attention for segments (torch 2.13, nn/attention/varlen.py) computes these."""
    head_size = query_BHLD.shape[-1]
    return (
        query_BHLD.is_cuda
        and query_BHLD.dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and head_size <= 256
    )


def _attend_one_by_one(query, key, value, cu_seq_lens, max_length, dropout, scaling) -> torch.Tensor:
    lengths = cu_seq_lens.diff().tolist()
    segments = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    shares_heads = query.shape[1] != key.shape[1]
    attended = [
        nn.functional.scaled_dot_product_attention(
            *segment, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=shares_heads
        )
        for segment in segments
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def _attend_with_kernel(query, key, value, cu_seq_lens, max_length, dropout, scaling) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    settings: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    groups = query.shape[1] // key.shape[1]
    if _kernel_shares_heads():
        settings["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Not [0], whose backward fills and copies a tensor.
    query, key, value = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
    bounds = cu_seq_lens.to(query.device, torch.int32)
    return varlen_attn(query, key, value, bounds, bounds, max_length, max_length, **settings)[None]


@cache
def _kernel_shares_heads() -> bool:
    """Whether the installed torch lets heads share keys and values: 2.11 does not, 2.13 does."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
