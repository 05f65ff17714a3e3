"""Any vision tower + any causal language model -> a new LLaVA, ready for alignment.

Weights are copied, nothing is resized: the image token gets the first id after the tokenizer's own, and image
positions never reach the embedding table.
"""

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from processing_llava.original.model_parts import read_image_processor, read_tokenizer, read_vision_config
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.templates import load_template

from .checkpoints.layouts import merge_ids
from .checkpoints.model_names import explain_missing
from .configuration_llava import AnyLlavaConfig
from .image_encoder import vision_tower_family
from .modeling_llava import AnyLlavaForConditionalGeneration


def assemble(
    *,
    vision_tower: str,
    language_model: str,
    template: str,
    projector_type: str = "mlp2x_gelu",
    image_aspect_ratio: str = "pad",
    image_grid_pinpoints: list[list[int]] | None = None,
    patch_merge_type: str = "flat",
    vision_feature_layer: int | list[int] = -2,
    seed: int = 0,
) -> tuple[AnyLlavaForConditionalGeneration, AnyLlavaProcessor]:
    """Build a LLaVA with an untrained projector from two trained parts.

    Args:
        vision_tower: Folder or Hub id of a CLIP, SigLIP or DINOv2, with its preprocessor_config.json.
        language_model: Folder or Hub id of a causal language model, with its tokenizer.
        template: Name of the conversation format.
        image_aspect_ratio: "pad", "square" or "anyres".
        image_grid_pinpoints: (height, width) pairs in pixels, for "anyres".
        seed: Seed of the projector's initial weights.
        The others: see AnyLlavaConfig.

    Raises:
        ValueError: if a part is missing, or cannot be used in a LLaVA.
    """
    chat_template = load_template(template)
    with explain_missing(vision_tower, part="vision_tower", kind=""):
        vision_config = read_vision_config(vision_tower)
        vision_tower_family(vision_config)
        tower = AutoModel.from_pretrained(
            vision_tower, config=vision_config, dtype=torch.float32, trust_remote_code=False
        )
        image_processor = read_image_processor(
            vision_tower,
            vision_config,
            image_aspect_ratio=image_aspect_ratio,
            image_grid_pinpoints=image_grid_pinpoints,
        )
    with explain_missing(language_model, part="language_model", kind=""):
        text_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32, trust_remote_code=False)
        tokenizer = read_tokenizer(language_model)
    processor = AnyLlavaProcessor(
        image_processor,
        tokenizer,
        chat_template=chat_template,
        patch_size=tower.config.patch_size,
        patch_merge_type=patch_merge_type,
    )
    config = AnyLlavaConfig(
        tower.config,
        text_model.config,
        image_token_id=processor.image_token_id,
        projector_type=projector_type,
        vision_feature_layer=vision_feature_layer,
        patch_merge_type=patch_merge_type,
        image_grid_pinpoints=image_grid_pinpoints,
        lm_head_bias=text_model.get_output_embeddings().bias is not None,
    )
    torch.manual_seed(seed)
    model = AnyLlavaForConditionalGeneration(config)
    _copy_weights(tower, model.model.vision_tower)
    _copy_weights(text_model.base_model, model.model.language_model)
    _copy_weights(text_model.get_output_embeddings(), model.lm_head)
    _check_text_logits(text_model, model)
    model.generation_config = text_model.generation_config
    model.generation_config.eos_token_id = merge_ids(
        text_model.generation_config.eos_token_id, processor.tokenizer.eos_token_id
    )
    return model.eval(), processor


def _copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy every parameter that the target has; a pruned tower has fewer than its source."""
    state = source.state_dict()
    target.load_state_dict({name: state[name] for name in target.state_dict()})


def _check_text_logits(text_model: PreTrainedModel, model: AnyLlavaForConditionalGeneration) -> None:
    """Refuse a language model that has more than a linear layer after its last hidden state (soft caps, scales)."""
    ids = torch.arange(min(8, text_model.config.vocab_size))[None]
    ids = ids[ids != model.config.image_token_id][None]
    with torch.no_grad():
        expected, ours = text_model.eval()(ids).logits, model.eval()(ids).logits
    difference = (expected - ours).abs().max().item()
    if difference > 1e-4 * expected.abs().max().item():
        raise ValueError(
            f"got a language model of type {text_model.config.model_type!r} whose logits differ by {difference:.2g} "
            "from a linear layer on its last hidden state; expected a plain output layer"
        )
