"""Fewer and larger kernels on a GPU: fused RMS norms, one matrix for query, key and value, one for gate and up.

torch's RMS norm is one kernel on a GPU instead of six, without copies in float32. Both compute in float32; in 16 bits
torch's rounds once, at its end, where that of transformers rounds before it multiplies by the weights, too
(transformers 5.23, models/llama/modeling_llama.py).

A fused matrix runs before the attention or the MLP, in a hook, and the layers that it replaces take their columns of
its output. The forward pass stays that of transformers. A model with fused matrices is for answering: its weights have
other names, so that it cannot be saved, and it has no place for an adapter.
"""

import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaMLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.phi.modeling_phi import PhiAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, MixtralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
"""Norms that multiply by their weights as they are; Gemma's adds one to them."""
ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention, GemmaAttention, PhiAttention)
MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, GemmaMLP)
"""Modules that do nothing with their input but project it, so that it may come projected."""


def fuse_norms(model: nn.Module) -> None:
    """Replace the RMS norms in place; names and weights stay."""
    for name, module in list(model.named_modules()):
        if type(module) in RMS_NORMS:
            fused = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
            fused.weight = module.weight
            model.set_submodule(name, fused.train(module.training))


def fuse_projections(model: nn.Module) -> None:
    """Fuse the projections of each attention and MLP in place; modules of other classes stay as they are."""
    # A list of these alone: in a list of all modules, the old weights of each would live until the end.
    for module in [module for module in model.modules() if type(module) in ATTENTIONS + MLPS]:
        if type(module) in ATTENTIONS:
            module.fused_projection = _fuse(module, ("q_proj", "k_proj", "v_proj"))
            module.register_forward_pre_hook(_project_hidden_states, with_kwargs=True)
        else:
            module.fused_projection = _fuse(module, ("gate_proj", "up_proj"))
            module.register_forward_pre_hook(_project_input)


class Columns(nn.Module):
    """Some columns of a matrix, where a linear layer was."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start = start
        self.stop = stop

    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        return projected[..., self.start : self.stop]


@torch.no_grad()
def _fuse(module: nn.Module, names: tuple[str, ...]) -> nn.Linear:
    """One linear layer that computes those of these names side by side, which become its columns."""
    parts = [module.get_submodule(name) for name in names]
    has_bias = parts[0].bias is not None
    width = sum(part.out_features for part in parts)
    fused = nn.Linear(parts[0].in_features, width, bias=has_bias, device="meta")
    fused.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if has_bias:
        fused.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    start = 0
    for name, part in zip(names, parts):
        setattr(module, name, Columns(start, start + part.out_features))
        start += part.out_features
    return fused


def _project_hidden_states(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"hidden_states": attention.fused_projection(kwargs["hidden_states"])}


def _project_input(mlp: nn.Module, args: tuple) -> tuple:
    return (mlp.fused_projection(args[0]),)
