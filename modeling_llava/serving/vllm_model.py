"""The class that vLLM finds for a LLaVA in our layout: its own backend for models of transformers, and two guards.

The backend loads, fuses and shards `AnyLlavaModel` (vLLM 0.32, model_executor/models/transformers). It expects ids of
images inside of the vocabulary, where original checkpoints have none.
"""

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_plugin import TOKENIZER_MODE

# vLLM shows what is below its own name.
logger = init_logger("vllm.anyllava")


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class AnyLlavaForVllm(TransformersMultiModalForCausalLM):
    """A LLaVA of any layout, projector, tower and language model that `AnyLlavaModel` expresses."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        mode = vllm_config.model_config.tokenizer_mode
        if mode != TOKENIZER_MODE:
            logger.warning_once(
                "got tokenizer_mode=%s for a model of AnyLLaVA: what users type can act as a control token or move an "
                "image; start vLLM with --tokenizer-mode %s",
                mode,
                TOKENIZER_MODE,
                scope="global",
            )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """What stands for an image in the text of a message."""
        if modality != "image":
            raise ValueError(f"got {modality} for a LLaVA; expected images: leave it out")
        return "<image>"

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: list[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings `[L, D]`, with features in the places of images.

        The id of images may lie outside of the vocabulary. A table that is asked for it ends the engine, and in other
        tokenizer modes a user who types <image> without a picture has it there.
        """
        input_ids = input_ids.masked_fill(input_ids >= self.text_config.vocab_size, 0)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
