"""LoRA on the language model, with the projector fully trained beside it: what LLaVA calls its LoRA recipe.

What is surprising: layers are chosen by their full path. By their last word alone ("q_proj"), as the original and
PEFT's shortcuts choose them, the layers of a CLIP tower would get adapters too.
"""

import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

LORA_DEFAULTS = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05, "bias": "none"}
"""Those of LLaVA v1.5."""


def add_lora(model: PreTrainedModel, settings: dict[str, Any], *, trained_parts: tuple[str, ...]) -> PeftModel:
    """Wrap a LLaVA so that adapters in its language model train, and whole parts beside them.

    Args:
        model: Its weights are frozen.
        settings: Fields of PEFT's LoraConfig.
        trained_parts: Modules that train fully and are saved with the adapter ("mm_projector", "vision_tower").
    """
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        **LORA_DEFAULTS | settings, target_modules=find_targets(model), modules_to_save=list(trained_parts)
    )
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            # Updates are smaller than what 16-bit weights can take up.
            parameter.data = parameter.data.float()
    return wrapped


def find_targets(model: PreTrainedModel) -> str:
    """A pattern for the full paths of all linear layers inside the language model."""
    prefix = "model.language_model."
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]
    last_words = sorted({name.rsplit(".", 1)[1] for name in layers})
    return rf"{re.escape(prefix)}.*\.({'|'.join(last_words)})"


def four_bit_config() -> BitsAndBytesConfig:
    """QLoRA's 4-bit weights for the language model; tower, projector and output layer stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        llm_int8_skip_modules=["model.vision_tower", "model.mm_projector", "lm_head"],
    )
