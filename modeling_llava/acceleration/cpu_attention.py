"""Attention for answering on a CPU: a prefill in bfloat16 as products of blocks, and a decode step as two products.

torch's kernel leaves much of a CPU's units for bfloat16 unused; products of blocks of queries with all keys use more
of them (BENCHMARKS.md: "encode" and "prefill" in bfloat16). In float32, and where rows are padded, the kernel stays.

For the single query of a decode step, two products read each key and value once for all heads that share it
(BENCHMARKS.md: "decode, batch 1"). Without a mask, transformers leaves the sharing to torch's kernel (`enable_gqa`;
transformers 5.23, integrations/sdpa_attention.py). On a GPU that kernel is one call and the products are six, so they
are taken there only where a compiler fuses them.
"""

# B rows · H heads · K key/value heads · G heads that share one · L tokens · T tokens in the KV cache · N tokens of a
# block · D width of a head

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "any_llava_cpu"
"""The `attn_implementation`. What these products are not made for is computed as in "sdpa"."""

BLOCK = 256
"""Queries of a block: with fewer, products are too small; with more, more scores are computed and then masked."""
MAX_SCORES = 2**19
"""Scores that exist at a time: a megabyte in bfloat16, which the cache of a core holds."""


def use_cpu_attention(part: PreTrainedModel) -> None:
    """Let a language model or a vision tower attend so, unless its attention is of another kind than "sdpa"."""
    if part.config._attn_implementation == "sdpa":
        part.set_attn_implementation(NAME)


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
    """An attention function for transformers' AttentionInterface; returns `[B, L, H, D]`."""
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


AttentionInterface.register(NAME, cpu_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_in_blocks(
    query_BHLD: torch.Tensor,
    key_BKLD: torch.Tensor,
    value_BKLD: torch.Tensor,
    *,
    is_causal: bool,
    scaling: float | None = None,
) -> torch.Tensor:
    """What all tokens attend to, `[B, L, H, D]`; scores are rounded as in "eager".

    Products are in the dtype of the model, the softmax in float32 (transformers 5.23, models/llama/modeling_llama.py).

    Args:
        is_causal: No token sees a later one.
        scaling: Factor of the scores; one over the root of D by default.
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
    """What the newest token of each row attends to, `[B, K, G, D]`; scores are rounded as in `attend_in_blocks`.

    Args:
        scaling: Factor of the scores; one over the root of D by default.
        mask: Broadcast to `[B, K, G, T]`: True where a token is seen, or what is added to the scores.
    """
    # Keys on the left: they are the large matrix, and the queries of a step a few rows.
    scores_BKGT = (key_BKTD @ query_BKGD.transpose(-1, -2)).transpose(-1, -2).float()
    scores_BKGT = scores_BKGT * (query_BKGD.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None and mask.dtype == torch.bool:
        scores_BKGT = scores_BKGT.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores_BKGT = scores_BKGT + mask
    return scores_BKGT.softmax(dim=-1).to(value_BKTD.dtype) @ value_BKTD
