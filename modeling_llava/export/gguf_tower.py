"""Vision tower and projector of a LLaVA as llama.cpp reads them: the file that it calls mmproj.

What is surprising:
- llama.cpp runs one layer less than the file has unless `clip.vision.feature_layer` says which it takes.
- It puts the class embedding of CLIP behind the patches, and then reads rows from 1 on as if it stood in front
  (llama.cpp b11549, tools/mtmd/models/llava.cpp; issue #25814, pull request #25844). Every CLIP LLaVA suffers: the
  first patch is lost, the class token takes the last place, and positions are off by one. SigLIP has no class token,
  and is exact.
- `for_issue_25814` moves the position of the class token behind the others. llama.cpp then computes every patch right
  but the first, whose place the others take, and the class token stands last. A llama.cpp without the fault would
  compute nonsense of such a file.
- GELU of a tower or projector is llama.cpp's, by tanh: that of SigLIP, and within 5e-4 of CLIP's other one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from PIL.Image import Resampling

from modeling_llava.configuration_llava import AnyLlavaConfig
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from processing_llava import AnyLlavaImageProcessorPil

from .gguf_text import GgufTensor, check_fields, refuse_others, scale_features

ISSUE = "https://github.com/ggml-org/llama.cpp/issues/25814"
_ACTIVATIONS = {"quick_gelu": False, "gelu_pytorch_tanh": True, "gelu": True}
"""Activations of towers, and whether `clip.use_gelu` is set for them."""
_WRITTEN = frozenset({
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps",
})  # fmt: skip
_PROJECTOR = {"mm_projector.0": "mm.0", "mm_projector.2": "mm.2"}
_PAD_COLOR = (122, 116, 104)
"""Of llama.cpp, for every LLaVA (llama.cpp b11549, tools/mtmd/clip.cpp)."""


def check_tower(config: AnyLlavaConfig, image_processor: AnyLlavaImageProcessorPil) -> None:
    """Refuse a tower, a projector or a way to prepare pictures that llama.cpp does not have.

    Raises:
        ValueError: naming the field.
    """
    vision = config.vision_config
    refuse_others("vision_config.model_type", vision.model_type, ("clip_vision_model", "siglip_vision_model"))
    refuse_others("vision_config.hidden_act", vision.hidden_act, tuple(_ACTIVATIONS))
    check_fields("vision_config", vision, written=_WRITTEN)
    refuse_others("projector_type", config.projector_type, ("mlp2x_gelu",))
    if config.num_prefix_tokens:
        refuse_others("vision_feature_select_strategy", config.vision_feature_select_strategy, ("patch",))
    refuse_others("image_grid_pinpoints", config.image_grid_pinpoints, (None,))
    refuse_others("visual_tokens", config.visual_tokens, (None,))
    layers = config.vision_feature_layers
    if 0 in layers or layers != sorted(set(layers)):
        # llama.cpp puts the features of several layers side by side in the order in which it computes them.
        refuse_others("vision_feature_layer", config.vision_feature_layer, (sorted(set(layers) - {0}) or 1,))
    refuse_others("image_aspect_ratio", image_processor.image_aspect_ratio, ("pad",))
    refuse_others("resample", image_processor.resample, (Resampling.BICUBIC,))
    for name in ("size", "crop_size") if image_processor.do_center_crop else ("size",):
        sides = {side for side in dict(getattr(image_processor, name) or {}).values() if side is not None}
        refuse_others(name, sorted(sides), ([vision.image_size],))
    for name in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"):
        refuse_others(name, getattr(image_processor, name), (True,))
    refuse_others("rescale_factor", image_processor.rescale_factor, (1 / 255,))


def list_tower_notices(
    config: AnyLlavaConfig, image_processor: AnyLlavaImageProcessorPil, *, for_issue_25814: bool
) -> Iterator[str]:
    """What llama.cpp computes otherwise than this package about pictures."""
    if config.vision_config.model_type == "clip_vision_model":
        if for_issue_25814:
            yield (
                f"the file is made for a llama.cpp with {ISSUE}: every patch of a picture but the first is right, and "
                "the class token stands behind them; a llama.cpp without that fault computes nonsense of it"
            )
        else:
            yield (
                f"the file is right, and stock llama.cpp computes pictures of CLIP towers wrongly: {ISSUE} (pull "
                "request 25844 mends it); --for-llama-cpp-with-issue-25814 loses one patch instead"
            )
    yield (
        "llama.cpp resizes a picture before it pads it, and this package after: they differ at the borders of "
        "pictures that are not square"
    )
    color = tuple(int(mean * 255) for mean in image_processor.image_mean)
    if color != _PAD_COLOR:
        yield f"llama.cpp pads pictures that are not square with {_PAD_COLOR}, and this package with {color}"


def add_tower_settings(writer: Any, config: AnyLlavaConfig, image_processor: AnyLlavaImageProcessorPil) -> None:
    """Write the settings of tower and projector.

    Args:
        writer: `gguf.GGUFWriter` of the architecture "clip".
        config: One that `check_tower` accepts.
        image_processor: How pictures are prepared.
    """
    import gguf

    vision = config.vision_config
    layers = config.vision_feature_layers
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool(gguf.Keys.Clip.HAS_LLAVA_PROJECTOR, True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(_ACTIVATIONS[vision.hidden_act])
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_block_count(max(layers))
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([float(mean) for mean in image_processor.image_mean])
    writer.add_vision_image_std([float(std) for std in image_processor.image_std])
    writer.add_array("clip.vision.feature_layer", layers)


def list_tower_tensors(
    model: AnyLlavaForConditionalGeneration, *, for_issue_25814: bool = False
) -> Iterator[GgufTensor]:
    """The weights of tower and projector.

    Raises:
        ValueError: for a weight that llama.cpp has no name for.
    """
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(config.vision_feature_layers))
    for name, weight in model.model.vision_tower.named_parameters():
        written = names.get_name(f"vision_tower.vision_model.{name}", try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ValueError(
                f"got a weight {name!r} of a {config.vision_config.model_type}; expected one that llama.cpp has"
            )
        yield _describe(written, weight, roll=for_issue_25814 and written == "v.position_embd.weight")
    scale = scale_features(config)
    for module, written in _PROJECTOR.items():
        for name, weight in model.model.get_submodule(module).named_parameters():
            yield _describe(f"{written}.{name}", weight, scale=scale if written == "mm.2" else 1.0)


def _describe(name: str, weight: torch.Tensor, *, roll: bool = False, scale: float = 1.0) -> GgufTensor:
    def read() -> torch.Tensor:
        moved = weight.roll(-1, dims=0) if roll else weight
        return moved if scale == 1.0 else moved.float() * scale

    # llama.cpp adds embeddings to activations, and convolves with the kernel of the patches.
    is_exact = weight.ndim != 2 or name == "v.position_embd.weight" or scale != 1.0
    return GgufTensor(
        name=name, shape=tuple(weight.shape), read=read, dtype=torch.float32 if is_exact else weight.dtype
    )
