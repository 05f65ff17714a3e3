"""The model and the processor that a recipe starts from."""

import torch
from transformers import PreTrainedModel

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.acceleration.packed_attention import use_packed_attention
from modeling_llava.acceleration.quantization import four_bit_config
from modeling_llava.checkpoints.model_names import load_training_processor
from processing_llava import AnyLlavaProcessor
from processing_llava.original.original_folder import find_installed
from processing_llava.text_encoder import check_learn_tokens

from .lora import add_lora, refuse_adapter
from .recipe import Recipe
from .trainer import freeze_all_but


def load_processor(recipe: Recipe) -> AnyLlavaProcessor:
    """The processor of the model, with the conversation format, the image mode and the image limits of the recipe.

    Raises:
        ValueError: as `load_training_processor`, if the model was not made for the image mode, or `learn_tokens` are
            none of its tokenizer.
    """
    processor = load_training_processor(recipe.model, template=recipe.template, backend=recipe.image_backend)
    if recipe.image_aspect_ratio == "anyres" and not processor.image_processor.image_grid_pinpoints:
        raise ValueError(
            f"got image_aspect_ratio 'anyres' for {recipe.model!r}, which has no image_grid_pinpoints; expected a "
            "model with them: make one with `llava assemble`"
        )
    if recipe.image_aspect_ratio is not None:
        processor.image_processor.image_aspect_ratio = recipe.image_aspect_ratio
    processor.image_processor.limits = recipe.image_limits
    if recipe.learn_tokens:
        check_learn_tokens(recipe.learn_tokens, processor.tokenizer, image_token=processor.image_token)
        processor.learn_tokens = recipe.learn_tokens
    return processor


def load_model(recipe: Recipe, *, bf16: bool) -> PreTrainedModel:
    """The model that a recipe starts from, with the parts that it trains ready to train.

    What trains is float32, also where `bf16` computes in bfloat16; what is frozen under a LoRA is then bfloat16 too.

    Raises:
        ValueError: if the model is an adapter.
    """
    keeps_bfloat16 = recipe.uses_lora and bf16
    model = AutoModelForVision2Seq.from_pretrained(
        find_installed(recipe.model),
        dtype=torch.bfloat16 if keeps_bfloat16 else torch.float32,
        attn_implementation=recipe.attn_implementation,
        quantization_config=four_bit_config() if recipe.stage == "qlora" else None,
    )
    refuse_adapter(model, recipe.model)
    # Whatever was loaded, checkpoints are in our layout, so that a run can be resumed from them.
    model.config.source_config = None
    if recipe.tokens_per_batch is not None:
        use_packed_attention(model)
    if recipe.uses_lora:
        return add_lora(model, recipe.lora, trained_parts=recipe.trained_parts, autocast=bf16)
    freeze_all_but(model, recipe.trained_parts)
    return model
