"""PyTorch's own RMS norm for that of transformers: one kernel of a GPU instead of six, and no copies in 32 bits.

Both compute in 32 bits; in 16 bits this one rounds once, at its end, where transformers rounds before it multiplies by
the weights, too. On a processor PyTorch has no kernel of its own for it, so nothing is gained there.
"""

from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, MixtralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
"""Those that multiply by their weights as they are; Gemma's adds one to them."""


def fuse_norms(model: nn.Module) -> None:
    """Replace them in place; names and weights stay."""
    for name, module in list(model.named_modules()):
        if type(module) in RMS_NORMS:
            fused = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, device="meta")
            fused.weight = module.weight
            model.set_submodule(name, fused.train(module.training))
