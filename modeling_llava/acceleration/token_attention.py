"""Attention of one new token of each row: two products that take as long as reading the states.

The kernel of PyTorch is made for many queries. For a single one, on a processor, it reads the states at a fraction of
the rate of memory: at most a half in float32, a tenth in bfloat16, and once for each head of those that share states.
On a GPU it is one call where the products are six, so it is left out there only where a compiler fuses them.
"""

# Shape suffixes: B rows, H heads, K key/value heads, G heads that share one, T tokens with states, D width of a head

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .block_attention import block_attention_forward

NAME = "any_llava_token"
"""The `attn_implementation` of a language model that decodes with it, and reads prompts with `block_attention`."""


def use_token_attention(model: PreTrainedModel) -> None:
    """Let the language model of a LLaVA decode with it, unless it has attention of another kind."""
    language_model = model.base_model.language_model
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(NAME)


def attend_to_states(
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


def token_attention_forward(
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
    if query_BHLD.shape[2] > 1 or not (query_BHLD.device.type == "cpu" or torch.compiler.is_compiling()):
        return block_attention_forward(
            module, query_BHLD, key_BKTD, value_BKTD, attention_mask, scaling=scaling, **kwargs
        )
    query_BKGD = query_BHLD[:, :, 0].unflatten(1, (key_BKTD.shape[1], -1))
    attended_BKGD = attend_to_states(query_BKGD, key_BKTD, value_BKTD, scaling=scaling, mask=attention_mask)
    return attended_BKGD.flatten(1, 2)[:, None], None


AttentionInterface.register(NAME, token_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
