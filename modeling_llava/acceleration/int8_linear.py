"""Dynamic int8 on a processor: weights of 8 bits for each output channel, inputs of 8 bits for each row.

The kernels are those of PyTorch (fbgemm). They find one scale for a whole input, which a single token with large
activations would spoil for all others; so rows are brought to one scale before, and back after.
"""

import warnings

import torch
from torch import nn

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
