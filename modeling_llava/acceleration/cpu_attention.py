"""Attention for answering on a CPU: many tokens in bfloat16 as products of blocks, and one token as two products.

PyTorch's kernel computes a twentieth of what a CPU's units for bfloat16 can, and takes a third of a prefill and more
of the vision tower. Products of blocks of queries with all keys take half its time. In float32 it is as fast as they
are, and where rows are padded the kernel is left to itself.

That kernel is made for many queries. For a single one it reads the KV cache at a fraction of the rate of memory: at
most a half in float32, a tenth in bfloat16, and once for each head of those that share keys. On a GPU it is one call
where the products are six, so it is left out there only where a compiler fuses them.
"""

# Shape suffixes: B rows, H heads, K key/value heads, G heads that share one, L tokens, T tokens in the KV
# cache, N tokens of a block, D width of a head

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "any_llava_cpu"
"""The `attn_implementation`. What these products are not made for is computed as "sdpa" does."""

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


def attend_to_cache(
    query_BKGD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    *,
    scaling: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the newest token of each row attends to, `[B, K, G, D]`; scores are rounded as in transformers' "eager".

    Args:
        scaling: Of the scores; one over the root of D by default.
        mask: Broadcast to `[B, K, G, T]`: True where a token is seen, or what is added to the scores.
    """
    # Keys first: the products with a row of queries on the left take up to four times as long.
    scores_BKGT = (key_BKTD @ query_BKGD.transpose(-1, -2)).transpose(-1, -2).float()
    scores_BKGT = scores_BKGT * (query_BKGD.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None and mask.dtype == torch.bool:
        scores_BKGT = scores_BKGT.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores_BKGT = scores_BKGT + mask
    return scores_BKGT.softmax(dim=-1).to(value_BKTD.dtype) @ value_BKTD


def cpu_attention_forward(
    module: nn.Module,
    query_BHLD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' AttentionInterface; `[B, L, H, D]` comes back."""
    num_queries, is_compiling = query_BHLD.shape[2], torch.compiler.is_compiling()
    is_on_cpu = query_BHLD.device.type == "cpu"
    if num_queries == 1 and (is_on_cpu or is_compiling):
        query_BKGD = query_BHLD[:, :, 0].unflatten(1, (key_BKTD.shape[1], -1))
        attended_BKGD = attend_to_cache(query_BKGD, key_BKTD, value_BKTD, scaling=scaling, mask=attention_mask)
        return attended_BKGD.flatten(1, 2)[:, None], None
    is_whole = attention_mask is None and num_queries == key_BKTD.shape[2]
    if is_whole and is_on_cpu and not is_compiling and query_BHLD.dtype == torch.bfloat16:
        return attend_in_blocks(query_BHLD, key_BKTD, value_BKTD, is_causal=module.is_causal, scaling=scaling), None
    return sdpa_attention_forward(module, query_BHLD, key_BKTD, value_BKTD, attention_mask, scaling=scaling, **kwargs)


def use_cpu_attention(part: PreTrainedModel) -> None:
    """Let a language model or a vision tower attend so, unless it has attention of another kind than "sdpa"."""
    if part.config._attn_implementation == "sdpa":
        part.set_attn_implementation(NAME)


AttentionInterface.register(NAME, cpu_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
