"""The output layer on supervised positions only, on every device, in place of the one that TRL puts on a model.

What is surprising: TRL has such a layer, `add_fused_lm_head` (TRL 1.16, trainer/utils.py). Where there is no Triton it
scores every position, most of which are image features and questions; and it reads the weights of the output layer
outside of that layer's forward, where FSDP2 has not gathered them, so that each process keeps the gradient of its own
rows alone. Here all of it happens in one call of the output layer, however many chunks there are: the processes of a
run must take part in the same number of gatherings.
"""

# Shape suffixes: B rows, L tokens, N supervised tokens of the batch, D text width, V vocabulary

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from processing_llava.prompt_inputs import IGNORED_LABEL

MAX_LOGITS = 2**25
"""How many logits exist at a time, 128 MiB in float32. A batch with more is scored in chunks, again in backward."""


def add_supervised_head(model: PreTrainedModel, *, dummy: str) -> None:
    """Let `model(..., labels=labels, fused_lm_head=True)` return what TRL's SFTTrainer computes its loss from.

    Other calls are those of the model. In the output, `log_probs`, `entropy` and `is_top1` are `[N]`, float32.

    Args:
        dummy: What a batch without images is given: a dummy "image", which runs tower and projector, or dummy
            "features", which run the projector. As in the original LLaVA, which feeds a dummy image, the loss is that
            without it, and what only images reach has a gradient of zero. Without a gradient, a batch of texts would
            stop stage align, and processes that wait for each other's gradients would wait for ever. Those that hold
            shards of a model wait at every layer, so all of them must come to the same layers.
    """
    vocab_size = model.config.get_text_config().vocab_size
    plain_forward = model.forward

    # The signature is that of the class: `generate` looks its arguments up there.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head: bool = False, **inputs):
        if not fused_lm_head:
            return plain_forward(*args, **inputs)
        labels_BL = inputs.pop("labels")[:, 1:]
        # Before the language model, as with images.
        zero = _run_dummy(self.base_model, inputs, dummy=dummy)
        hidden_BLD = self.base_model(*args, **inputs).last_hidden_state[:, :-1] + zero
        is_supervised_BL = labels_BL != IGNORED_LABEL
        log_probs, entropy, is_top1 = _score(
            self.get_output_embeddings(),
            hidden_BLD[is_supervised_BL],
            labels_BL[is_supervised_BL],
            chunk_size=max(1, MAX_LOGITS // vocab_size),
        )
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=is_supervised_BL)

    model.forward = types.MethodType(forward, model)


def _run_dummy(model: nn.Module, inputs: dict[str, Any], *, dummy: str) -> torch.Tensor:
    """Zero, with a gradient of zero for all that images come through, also where this batch has none.

    Args:
        dummy: "image" or "features"; see `add_supervised_head`.
    """
    config, device = model.config, inputs["input_ids"].device
    zero = torch.zeros((), device=device)
    if model.image_newline is not None:
        zero = zero + 0 * model.image_newline.mean()
    if "pixel_values" in inputs or "mm_encoder_outputs" in inputs:
        return zero
    if dummy == "image":
        side = config.vision_config.image_size
        features = model.encode_tiles(torch.zeros(1, 3, side, side, device=device)).pooler_output
    else:
        # FSDP casts what a model is given, which this was not.
        dtype = next((parameter.dtype for parameter in model.mm_projector.parameters()), torch.float32)
        shape = 1, config.patches_per_side**2 + config.num_prefix_tokens, config.vision_feature_size
        features = model.project_features(torch.zeros(shape, device=device, dtype=dtype))
    return zero + 0 * features.mean()


def _score(
    output_layer: nn.Module, hidden_ND: torch.Tensor, targets_N: torch.Tensor, *, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each target, and whether it is the top token, `[N]` each.

    Args:
        output_layer: Called once, so that what gathers its weights does so once.
        chunk_size: How many positions are scored at a time.
    """
    compute_logits = output_layer.forward

    def score_all(hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        score_some = functools.partial(_score_chunk, compute_logits)
        if len(targets_N) > chunk_size:
            score_some = functools.partial(checkpoint, score_some, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(hidden_ND.split(chunk_size), targets_N.split(chunk_size))
        return tuple(torch.cat(values) for values in zip(*(score_some(*chunk) for chunk in chunks)))

    output_layer.forward = score_all
    try:
        return output_layer(hidden_ND, targets_N)
    finally:
        output_layer.forward = compute_logits


def _score_chunk(
    compute_logits: Callable[[torch.Tensor], torch.Tensor], hidden_ND: torch.Tensor, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs_NV = compute_logits(hidden_ND).float().log_softmax(dim=-1)
    log_probs_N = log_probs_NV.gather(1, targets_N[:, None]).squeeze(1)
    with torch.no_grad():
        entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(dim=-1)
        is_top1_N = log_probs_NV.argmax(dim=-1) == targets_N
    return log_probs_N, entropy_N, is_top1_N
