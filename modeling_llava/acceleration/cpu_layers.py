"""Layers for answering on a CPU: attention as few large products, and linear layers in packed order or in int8.

torch's kernel leaves much of a CPU's units for bfloat16 unused; products of blocks of queries with all keys use more
of them (BENCHMARKS.md: "encode" and "prefill" in bfloat16). In float32, and where rows are padded, the kernel stays.

For the single query of a decode step, two products read each key and value once for all heads that share it
(BENCHMARKS.md: "decode, batch 1"). Without a mask, transformers leaves the sharing to torch's kernel (`enable_gqa`;
transformers 5.23, integrations/sdpa_attention.py). On a GPU that kernel is one call and the products are six, so they
are taken there only where a compiler fuses them.

torch computes products in float32 with MKL, and in bfloat16 with oneDNN, which orders the weights anew for every
product. `PackedLinear` orders them once, for both dtypes (BENCHMARKS.md: "decode, batch 1"). Its results are those of
linear layers, except for the order of additions.

`Int8Linear` has a scale for each output channel of the weights and for each row of the inputs, in torch's dynamic
kernels (fbgemm). These find one scale for a whole input, which a single token with large activations would spoil for
all others; so rows are brought to one scale before, and back after.
"""

# B rows · H heads · K key/value heads · G heads that share one · L tokens · T tokens in the KV cache · N tokens of a
# block · D width of a head

import warnings

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .devices import copy_mapped, is_slow_on_cpu, release_mapped, returning_memory

ATTENTION = "any_llava_cpu"
"""The `attn_implementation`. What these products are not made for is computed as in "sdpa"."""

BLOCK = 256
"""Queries of a block: with fewer, products are too small; with more, more scores are computed and then masked."""
MAX_SCORES = 2**19
"""Scores that exist at a time: a megabyte in bfloat16, which the cache of a core holds."""


def use_cpu_attention(part: PreTrainedModel) -> None:
    """Let a language model or a vision tower attend by these products, if its attention is "sdpa"."""
    if part.config._attn_implementation == "sdpa":
        part.set_attn_implementation(ATTENTION)


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


AttentionInterface.register(ATTENTION, cpu_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


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


# Linear layers.

PACKED_DTYPES = (torch.float32, torch.bfloat16)
SMALLEST_WEIGHT = 2**18
"""Elements. Smaller weights stay in the caches of a CPU, where calling a kernel costs more than it gains."""
ROUNDED_ROWS = 64
"""Rows of weights that are rounded at a time, in the caches of a CPU."""
MAX_ROWS = 256
"""Rows of int8 that are computed in one call, whose sums take as much memory again as its outputs."""


@returning_memory()
def pack_linear_layers(model: PreTrainedModel) -> None:
    """Pack in place a model on a CPU that is fast with the dtype of the model.

    Small layers and an output layer that is tied to the embeddings stay as they are, and so do models with adapters. A
    packed model is for answering: it cannot be trained, saved, or moved to another device.
    """
    is_fast = model.dtype in PACKED_DTYPES and not is_slow_on_cpu(model.dtype)
    if not (torch.backends.mkldnn.is_available() and is_fast) or model._hf_peft_config_loaded:
        return
    embeddings = model.get_input_embeddings().weight
    # Names alone: in a list of modules, the old weights of each would live until the end.
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear]:
        module = model.get_submodule(name)
        if module.weight.numel() >= SMALLEST_WEIGHT and module.weight is not embeddings:
            model.set_submodule(name, PackedLinear(module))
            release_mapped([module.weight.data])
    model.requires_grad_(False)
    # What is left would keep its file open, all of which has been read by now.
    copy_mapped([*model.parameters(), *model.buffers()])


class PackedLinear(nn.Module):
    """Computes what a linear layer does; it has no gradient.

    Args:
        linear: On a CPU, in one of `PACKED_DTYPES`; not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.requires_grad:
            raise ValueError(
                "got a gradient to compute through packed weights; expected answers only: load the model with "
                "from_pretrained to train it"
            )
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")

    extra_repr = nn.Linear.extra_repr


class Int8Linear(nn.Module):
    """Computes what a linear layer does, within the rounding of 8 bits, on float32 inputs; it has no gradient.

    Args:
        linear: In any floating dtype; not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        integers, scales = _round_rows(linear.weight.detach())
        zero_points = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():
            # torch deprecates tensors of this kind, and its dynamic kernels take no others (pytorch/pytorch#184982).
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(integers, scales, zero_points, axis=0)
        self.packed_weight = torch.ops.quantized.linear_prepack(quantized, None)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[:-1].numel() <= MAX_ROWS:
            return self._compute(inputs)
        rows = inputs.flatten(0, -2)
        outputs = rows.new_empty(len(rows), self.out_features)
        for some_rows, some_outputs in zip(rows.split(MAX_ROWS), outputs.split(MAX_ROWS)):
            some_outputs.copy_(self._compute(some_rows))
        return outputs.unflatten(0, inputs.shape[:-1])

    def _compute(self, inputs: torch.Tensor) -> torch.Tensor:
        scales = None
        if inputs.shape[:-1].numel() > 1:
            scales = inputs.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            inputs = inputs / scales
        # Without the reduced range, sums of two products overflow on CPUs without VNNI.
        outputs = torch.ops.quantized.linear_dynamic(inputs, self.packed_weight, reduce_range=True)
        if scales is not None:
            outputs *= scales
        return outputs if self.bias is None else outputs.add_(self.bias)

    extra_repr = nn.Linear.extra_repr


def _round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as integers from -127 to 127 and the scale of each row, without a copy of it in float32."""
    integers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    work_space = torch.empty(ROUNDED_ROWS, *weight.shape[1:])
    for start in range(0, len(weight), ROUNDED_ROWS):
        rows = slice(start, start + ROUNDED_ROWS)
        values = work_space[: len(weight[rows])].copy_(weight[rows])
        smallest, largest = torch.aminmax(values, dim=1)
        scales[rows] = torch.maximum(-smallest, largest).clamp_min(1e-12) / 127
        integers[rows] = values.div_(scales[rows, None]).round_()
    return integers, scales
