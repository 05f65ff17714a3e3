"""Linear layers for answering on a CPU: weights in the order in which oneDNN's kernels read them, and in int8.

PyTorch hands products in float32 to MKL, which leaves half of the vector units of AMD's CPUs unused, and reads the
weights for a single token at half of the rate that memory has. In bfloat16 oneDNN computes anyway, and orders the
weights anew for every product. The results are those of linear layers, except for the order of additions.

Dynamic int8 has weights of 8 bits for each output channel and inputs of 8 bits for each row, in PyTorch's kernels
(fbgemm). They find one scale for a whole input, which a single token with large activations would spoil for all
others; so rows are brought to one scale before, and back after.
"""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from .devices import is_slow_on_processor

PACKED_DTYPES = (torch.float32, torch.bfloat16)
SMALLEST_WEIGHT = 2**18
"""In numbers. Smaller ones stay in the caches of a processor, where calling a kernel costs more than it gains."""


class PackedLinear(nn.Module):
    """Computes what a linear layer does; it has no gradient.

    Args:
        linear: On a processor, in one of `PACKED_DTYPES`; not kept.
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

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_linear_layers(model: PreTrainedModel) -> None:
    """Pack in place a model on a processor, where that one is fast with the floats of the model.

    Small layers and an output layer that is tied to the embeddings stay as they are, and so do models with adapters. A
    packed model can answer, and neither train, nor be saved, nor move to another device.
    """
    has_floats = model.dtype in PACKED_DTYPES and not is_slow_on_processor(model.dtype)
    if not (torch.backends.mkldnn.is_available() and has_floats) or model._hf_peft_config_loaded:
        return
    embeddings = model.get_input_embeddings().weight
    for name, module in list(model.named_modules()):
        is_large = type(module) is nn.Linear and module.weight.numel() >= SMALLEST_WEIGHT
        if is_large and module.weight is not embeddings:
            model.set_submodule(name, PackedLinear(module))
    model.requires_grad_(False)
    # What is left may be a view of a mapped file, all of which has been read by now, and would stay in memory.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.layout == torch.strided:
            tensor.data = tensor.data.clone()


MAX_ROWS = 256
"""Computed in one call, which takes as much memory as its outputs for their sums; more rows are no faster."""


class Int8Linear(nn.Module):
    """Computes what a linear layer does, within the rounding of 8 bits, on float32 inputs; it has no gradient.

    Args:
        linear: In floats of any size; not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        zero_points = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():
            # PyTorch deprecates tensors of this kind; its faster kernels take no others (pytorch/pytorch#184982).
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
        # Without the reduced range, sums of two products overflow on processors without VNNI.
        outputs = torch.ops.quantized.linear_dynamic(inputs, self.packed_weight, reduce_range=True)
        if scales is not None:
            outputs *= scales
        return outputs if self.bias is None else outputs.add_(self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
