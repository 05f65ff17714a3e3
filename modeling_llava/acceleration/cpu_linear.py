"""Linear layers for answering on a CPU: weights in the order in which oneDNN's kernels read them, and in int8.

torch computes products in float32 with MKL, and in bfloat16 with oneDNN, which orders the weights anew for every
product. `PackedLinear` orders them once, for both dtypes (BENCHMARKS.md: "decode, batch 1"). Its results are those of
linear layers, except for the order of additions.

`Int8Linear` has a scale for each output channel of the weights and for each row of the inputs, in torch's dynamic
kernels (fbgemm). These find one scale for a whole input, which a single token with large activations would spoil for
all others; so rows are brought to one scale before, and back after.
"""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from .devices import is_slow_on_cpu, release_mapped

PACKED_DTYPES = (torch.float32, torch.bfloat16)
SMALLEST_WEIGHT = 2**18
"""Elements. Smaller weights stay in the caches of a CPU, where calling a kernel costs more than it gains."""
MAX_ROWS = 256
"""Rows of int8 that are computed in one call, whose sums take as much memory again as its outputs."""


def pack_linear_layers(model: PreTrainedModel) -> None:
    """Pack in place a model on a CPU that is fast with the dtype of the model.

    Small layers and an output layer that is tied to the embeddings stay as they are, and so do models with adapters. A
    packed model is for answering: it cannot be trained, saved, or moved to another device.
    """
    is_fast = model.dtype in PACKED_DTYPES and not is_slow_on_cpu(model.dtype)
    if not (torch.backends.mkldnn.is_available() and is_fast) or model._hf_peft_config_loaded:
        return
    embeddings = model.get_input_embeddings().weight
    for name, module in list(model.named_modules()):
        is_large = type(module) is nn.Linear and module.weight.numel() >= SMALLEST_WEIGHT
        if is_large and module.weight is not embeddings:
            model.set_submodule(name, PackedLinear(module))
            release_mapped([module.weight.data])
    model.requires_grad_(False)
    # What is left may be a view of a mapped file, all of which has been read by now, and would stay in memory.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.layout == torch.strided:
            stored, tensor.data = tensor.data, tensor.data.clone()
            release_mapped([stored])


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
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        zero_points = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():
            # torch deprecates tensors of this kind, and its dynamic kernels take no others (pytorch/pytorch#184982).
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
            quantized = torch.quantize_per_channel(weight, scales, zero_points, axis=0, dtype=torch.qint8)
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
