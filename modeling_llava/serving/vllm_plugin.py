"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): LLaVAs in our layout, served by vLLM.

vLLM runs `AnyLlavaModel` as it is, in its backend for models of transformers; `vllm_config.py` and `vllm_model.py`
have what that backend lacks. Chats are written by `vllm_renderer.py` where vLLM was started with `--tokenizer-mode
any_llava`. Model and renderer are only named here, so that a vLLM of other models imports neither.

What is surprising: vLLM calls this whatever it serves, wherever this package is installed. It imports what is named in
processes of its own, for which a path in `sys.path` is not enough.
"""

import logging

# vLLM shows what is below its own name.
logger = logging.getLogger("vllm.anyllava")

ARCHITECTURE = "AnyLlavaForConditionalGeneration"
TOKENIZER_MODE = "any_llava"


def register() -> None:
    """Make LLaVAs in our layout known to vLLM; a second call changes nothing."""
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry

        from .vllm_config import AnyLlavaVllmConfig
    except ImportError as error:
        # An error here would end a vLLM of whatever model (vLLM 0.32, plugins/__init__.py).
        logger.warning("got a vLLM without what models of AnyLLaVA need (%s); expected 0.32: install it", error)
        return

    MODELS_CONFIG_MAP[ARCHITECTURE] = AnyLlavaVllmConfig
    # vLLM logs a warning for what is registered twice.
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "modeling_llava.serving.vllm_model:AnyLlavaForVllm")
    if TOKENIZER_MODE not in TokenizerRegistry.tokenizers:
        TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    if TOKENIZER_MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(TOKENIZER_MODE, "modeling_llava.serving.vllm_renderer", "AnyLlavaRenderer")
