"""Attention of many tokens in bfloat16 on a processor: products of blocks of queries with all keys.

The kernel of PyTorch computes a twentieth of what the processor's units for bfloat16 can, and takes a third of a
prefill and more of the vision tower. Products of whole blocks take half its time. In float32 it is as fast as they
are, and where rows are padded the kernel is left to itself.
"""

# Shape suffixes: B rows, H heads, K key/value heads, G heads that share one, L tokens, N tokens of a block, D width of
# a head

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "any_llava_block"
"""The `attn_implementation` of a vision tower that computes so; what it does not take is computed as "sdpa" does."""

BLOCK = 256
"""Queries of a block: with fewer, products are too small, and with more, many scores are computed to be left out."""
MAX_SCORES = 2**19
"""How many scores exist at a time, a megabyte, which the cache of a core holds."""


def attend_in_blocks(
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    *,
    is_causal: bool,
    scaling: float | None = None,
) -> torch.Tensor:
    """What all tokens attend to, `[B, L, H, D]`; scores are rounded as in transformers' "eager".

    Args:
        is_causal: No token sees a later one.
        scaling: Of the scores; one over the root of D by default.
    """
    rows, heads, length, width = query_BHLD.shape
    groups = heads // key_BKLD.shape[1]
    query_BHLD = query_BHLD * (width**-0.5 if scaling is None else scaling)
    query_BKGLD = query_BHLD.unflatten(1, (-1, groups))
    attended_BLKGD = query_BHLD.new_empty(rows, length, heads // groups, groups, width)
    is_later_NN = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    num_heads = max(1, MAX_SCORES // (rows * groups * BLOCK * length))
    for first in range(0, heads // groups, num_heads):
        chosen = slice(first, first + num_heads)
        key_BKDL, value = key_BKLD[:, chosen].transpose(-1, -2), value_BKLD[:, chosen]
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            num_seen = end if is_causal else length
            scores = query_BKGLD[:, chosen, :, start:end].flatten(2, 3) @ key_BKDL[..., :num_seen]
            if is_causal:
                own = scores.unflatten(2, (groups, -1))[..., start:]
                own.masked_fill_(is_later_NN[: end - start, : end - start], -torch.inf)
            attended = scores.float().softmax(dim=-1).to(value.dtype) @ value[:, :, :num_seen]
            attended_BLKGD[:, start:end, chosen] = attended.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4)
    return attended_BLKGD.flatten(2, 3)


def block_attention_forward(
    module: nn.Module,
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' AttentionInterface; `[B, L, H, D]` comes back."""
    is_whole = attention_mask is None and query_BHLD.shape[2] == key_BKLD.shape[2]
    is_on_processor = query_BHLD.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (is_whole and is_on_processor and query_BHLD.dtype == torch.bfloat16):
        return sdpa_attention_forward(
            module, query_BHLD, key_BKLD, value_BKLD, attention_mask, scaling=scaling, **kwargs
        )
    attended = attend_in_blocks(query_BHLD, key_BKLD, value_BKLD, is_causal=module.is_causal, scaling=scaling)
    return attended, None


AttentionInterface.register(NAME, block_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
