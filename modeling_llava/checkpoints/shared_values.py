"""The values that a model and its processor must share: checked wherever the two meet."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from modeling_llava.configuration_llava import AnyLlavaConfig
from processing_llava.original.model_types import TRANSFORMERS_CONFIGS
from processing_llava.processing_llava import AnyLlavaProcessor

from .layouts import read_transformers_config


def check_pair(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Refuse for answering what is not of our classes, and a processor that prepares other inputs than a model takes.

    Raises:
        ValueError: naming the classes, or the values that differ.
    """
    if not isinstance(model.config, AnyLlavaConfig) or not isinstance(processor, AnyLlavaProcessor):
        raise ValueError(
            f"got a {type(model).__name__} with a {type(processor).__name__}; expected "
            "AnyLlavaForConditionalGeneration with AnyLlavaProcessor, which read checkpoints of transformers' own "
            "LLaVAs too: load both with load_for_inference"
        )
    check_processor(model.config, processor)


def check_processor(config: PreTrainedConfig, processor: AnyLlavaProcessor) -> None:
    """Refuse a processor that prepares other inputs than a model takes.

    Args:
        config: Configuration of the model: ours, or transformers' own `llava` or `llava_next`; others are not checked.

    Raises:
        ValueError: naming the values that differ.
    """
    if not isinstance(config, AnyLlavaConfig):
        if config.model_type not in TRANSFORMERS_CONFIGS:
            return
        config = AnyLlavaConfig(**read_transformers_config(config.to_dict()))
    found, expected = _read_ours(processor), _read_model(config)
    differing = [name for name in found if found[name] != expected[name]]
    if differing:
        raise ValueError(
            f"got a processor with {_list(found, differing)} for a model with {_list(expected, differing)}; expected "
            "equal values: load both from the same folder"
        )


def _read_model(config: AnyLlavaConfig) -> dict[str, Any]:
    pinpoints = config.image_grid_pinpoints
    return {
        "image_token_id": config.image_token_id,
        "patch_size": config.vision_config.patch_size,
        "image size": config.vision_config.image_size,
        "num_prefix_tokens": config.num_prefix_tokens,
        "visual_tokens": config.visual_tokens,
        "image_grid_pinpoints": _as_lists(pinpoints),
        # Of one tile nothing is merged.
        "patch_merge_type": config.patch_merge_type if pinpoints else None,
    }


def _read_ours(processor: AnyLlavaProcessor) -> dict[str, Any]:
    image_processor = processor.image_processor
    pinpoints = image_processor.image_grid_pinpoints
    return {
        "image_token_id": processor.image_token_id,
        "patch_size": processor.patch_size,
        "image size": image_processor.tile_size,
        "num_prefix_tokens": processor.num_prefix_tokens,
        "visual_tokens": processor.visual_tokens,
        "image_grid_pinpoints": _as_lists(pinpoints),
        "patch_merge_type": processor.patch_merge_type if pinpoints else None,
    }


def _as_lists(pinpoints: Any) -> list[list[int]] | None:
    return None if pinpoints is None else [list(size) for size in pinpoints]


def _list(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={values[name]!r}" for name in names)
