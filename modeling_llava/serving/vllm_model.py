"""The class that vLLM finds for a LLaVA in our layout: its own backend for models of transformers, which loads, fuses
and shards `AnyLlavaModel` (vLLM 0.32, model_executor/models/transformers), and the rows of `vllm_config.py`.
"""

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

_OUTPUT = {"lm_head.weight", "lm_head.bias"}


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class AnyLlavaForVllm(TransformersMultiModalForCausalLM):
    """A LLaVA of any layout, projector, tower and language model that `AnyLlavaModel` expresses."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """What stands for an image in the text of a message."""
        if modality != "image":
            raise ValueError(f"got {modality} for a LLaVA; expected images: leave it out")
        return "<image>"

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, whose tables may end before the id of images."""
        return super().load_weights(self._add_rows(weights))

    def _add_rows(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        embeddings = self.model.get_input_embeddings()
        names = {f"model.{name}.weight" for name, module in self.model.named_modules() if module is embeddings}
        for name, weight in weights:
            if name in names | _OUTPUT:
                num_missing = self.text_config.vocab_size - len(weight)
                weight = torch.cat([weight, weight.new_zeros(num_missing, *weight.shape[1:])])
            yield name, weight

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits `[L, V]`; nothing of the rows that were added is ever sampled."""
        logits = super().compute_logits(hidden_states)
        if logits is not None:  # one process of several has them
            logits[:, self.text_config.num_stored_tokens :] = torch.finfo(logits.dtype).min
        return logits
