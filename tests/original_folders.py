"""Checkpoint folders in every published layout of the original LLaVA, made of tiny models with random weights.

The names of files, weights and settings are written out here once more, on purpose: the loader is tested against what
the original writes, not against its own tables.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModel, PreTrainedModel

from modeling_llava import AnyLlavaConfig, AnyLlavaForConditionalGeneration
from tests.conftest import GOLDENS
from tests.tiny import TEXT_CONFIGS, TILE_SIZE, VISION_CONFIGS, tiny_tokenizer

SPM_VOCAB_SIZE = 32000
PINPOINTS_WIDTH_FIRST = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
CLIP_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": TILE_SIZE},
    "crop_size": {"height": TILE_SIZE, "width": TILE_SIZE},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIGLIP_PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": TILE_SIZE, "width": TILE_SIZE},
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
NAMES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "gemma": ("llava_gemma", "LlavaGemmaForCausalLM"),
    "mpt": ("llava_mpt", "LlavaMptForCausalLM"),
}


def make_tower(vision: str, *, seed: int = 1) -> PreTrainedModel:
    """A whole vision model of transformers, nothing of it pruned."""
    torch.manual_seed(seed)
    tower = AutoModel.from_config(VISION_CONFIGS[vision]())
    widen(tower)
    return tower


def widen(model: torch.nn.Module) -> None:
    """Default initial weights are so small that every logit is close to zero; wider ones make errors visible."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)


def save_tower(tower: PreTrainedModel, folder: Path) -> Path:
    """A vision repository, as `mm_vision_tower` names one."""
    tower.save_pretrained(folder)
    is_clip = tower.config.model_type == "clip_vision_model"
    settings = CLIP_PREPROCESSOR if is_clip else SIGLIP_PREPROCESSOR
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def make_model(
    tower: PreTrainedModel, *, text: str = "llama", vocab_size: int = SPM_VOCAB_SIZE, seed: int = 2, **settings
) -> AnyLlavaForConditionalGeneration:
    """What the original folder should compute: the same weights in a model built directly."""
    torch.manual_seed(seed)
    text_config = TEXT_CONFIGS[text]()
    text_config.vocab_size = vocab_size
    config = AnyLlavaConfig(tower.config, text_config, image_token_id=vocab_size, **settings)
    model = AnyLlavaForConditionalGeneration(config)
    widen(model)
    if model.model.image_newline is not None:
        model.model.image_newline.data.normal_()
    state = tower.state_dict()
    model.model.vision_tower.load_state_dict({key: state[key] for key in model.model.vision_tower.state_dict()})
    return model.eval()


def original_weights(
    model: AnyLlavaForConditionalGeneration, tower: PreTrainedModel | None = None
) -> dict[str, torch.Tensor]:
    """The model's weights under the original's names, with the whole tower inside if it is given."""
    weights = {}
    for key, value in model.state_dict().items():
        if key.startswith("model.language_model."):
            weights[key.replace("model.language_model.", "model.")] = value
        elif not key.startswith("model.vision_tower."):
            weights[key] = value
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    # An old buffer that every early checkpoint carries.
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if tower is not None:
        for key, value in tower.state_dict().items():
            weights[f"model.vision_tower.vision_tower.vision_model.{key}"] = value
    return weights


def write_config(
    folder: Path, model: AnyLlavaForConditionalGeneration, *, vision_tower: Path | str, text: str, **fields
) -> None:
    """config.json as the original writes it; a field given as None is left out."""
    model_type, class_name = NAMES[text]
    config = model.config
    written: dict[str, Any] = config.text_config.to_dict() | {
        "model_type": model_type,
        "architectures": [class_name],
        "torch_dtype": "float32",
        "mm_vision_tower": str(vision_tower),
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": config.projector_type,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": config.vision_feature_select_strategy,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": config.patch_merge_type,
        "tokenizer_padding_side": "right",
        "unfreeze_mm_vision_tower": False,
    }
    written.pop("dtype", None)
    written |= fields
    written = {name: value for name, value in written.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written, indent=2))


def write_sentencepiece(folder: Path, *added_tokens: str) -> None:
    """A slow LLaMA tokenizer, with tokens that its training added."""
    shutil.copy(GOLDENS / "tokenizer.model", folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "model_max_length": 2048, "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {token: SPM_VOCAB_SIZE + index for index, token in enumerate(added_tokens)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))


def write_fast_tokenizer(folder: Path, *added_tokens: str) -> int:
    """A tokenizer.json, as the checkpoints on Qwen and LLaMA 3 have; returns its length."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(added_tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_safetensors(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")


def write_torch_shards(folder: Path, weights: dict[str, torch.Tensor], *, num_shards: int = 2) -> None:
    """pytorch_model-0000N-of-0000M.bin with their index."""
    weight_map = {}
    for shard in range(num_shards):
        filename = f"pytorch_model-{shard + 1:05}-of-{num_shards:05}.bin"
        part = dict(list(weights.items())[shard::num_shards])
        torch.save(part, folder / filename)
        weight_map |= dict.fromkeys(part, filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_v15(folder: Path, *, text: str = "llama", **settings) -> AnyLlavaForConditionalGeneration:
    """A v1.5 checkpoint: `folder/checkpoint` with its tower beside it; returns what it should compute."""
    tower = make_tower("clip")
    save_tower(tower, folder / "tower")
    model = make_model(tower, text=text, **settings)
    write_config(folder / "checkpoint", model, vision_tower="../tower", text=text)
    write_sentencepiece(folder / "checkpoint")
    write_safetensors(folder / "checkpoint", original_weights(model))
    return model


def example_inputs(model: AnyLlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """One row with one image: random pixels and a few text tokens around the image tokens."""
    generator = torch.Generator().manual_seed(0)
    if model.config.image_grid_pinpoints is None:
        images = {"pixel_values": torch.randn(1, 3, TILE_SIZE, TILE_SIZE, generator=generator)}
    else:
        images = {
            "pixel_values": torch.randn(1, 3, 3, TILE_SIZE, TILE_SIZE, generator=generator),
            "image_sizes": torch.tensor([[TILE_SIZE, 2 * TILE_SIZE]]),
        }
    num_tokens = model.model.plan_images(**images)[0].num_tokens
    ids = [1, 5, 9, *[model.config.image_token_id] * num_tokens, 7, 12, 40]
    return {"input_ids": torch.tensor([ids]), **images}


def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits
