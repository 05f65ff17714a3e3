"""What each model_type of a LLaVA means. These names are needed to register, so that nothing slow is imported here."""

from transformers import LlavaConfig, LlavaNextConfig

TRANSFORMERS_CONFIGS = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
"""transformers' own configurations that AnyLlavaConfig can express, by model_type."""
# fmt: off
TEXT_MODEL_OF_CLASS = {
    "LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaMixtralForCausalLM": "mixtral",
    "LlavaQwenForCausalLM": "qwen2", "LlavaQwen2ForCausalLM": "qwen2", "LlavaQwenMoeForCausalLM": "qwen2_moe",
    "LlavaGemmaForCausalLM": "gemma", "LlavaMptForCausalLM": "mpt", "LlavaMPTForCausalLM": "mpt",
}
"""The text model that an original class is built on, as transformers calls it."""
TEXT_MODEL_OF_TYPE = {
    "llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_mixtral": "mixtral",
    "llava_qwen": "qwen2", "llava_qwen2": "qwen2", "llava_qwen_moe": "qwen2_moe", "llava_gemma": "gemma",
    "llava_mpt": "mpt",
}
"""The same by every `model_type` under which originals are published, for those without a telling class name."""
# fmt: on
