"""What vLLM changes in the settings of a LLaVA before it loads one: the id of images becomes a word of the vocabulary.

Original checkpoints give images an id behind the vocabulary. vLLM looks ids of prompts up in tables as long as the
vocabulary, in more places than the embeddings: one request for `prompt_logprobs` of a picture ended the engine (vLLM
0.32, v1/worker/gpu_model_runner.py). The vocabulary is therefore counted up to that id; `vllm_model.py` adds the rows.
"""

from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .vllm_plugin import TOKENIZER_MODE, logger


class AnyLlavaVllmConfig(VerifyAndUpdateConfig):
    """Called in the process that starts the engine."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Count the id of images, and warn of a mode in which user text is more than text."""
        config = model_config.hf_config
        text_config = config.text_config
        text_config.num_stored_tokens = text_config.vocab_size
        text_config.vocab_size = max(text_config.vocab_size, config.image_token_id + 1)
        model_config.model_arch_config = model_config.get_model_arch_config()
        if model_config.tokenizer_mode != TOKENIZER_MODE:
            logger.warning(
                "got tokenizer_mode=%s for a model of AnyLLaVA: what users type can act as a control token or move an "
                "image; start vLLM with --tokenizer-mode %s",
                model_config.tokenizer_mode,
                TOKENIZER_MODE,
            )
