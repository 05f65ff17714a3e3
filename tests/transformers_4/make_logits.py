"""What transformers 4.56.1 (torch 2.13.0, CPU, float32) computes for tiny LLaVAs that it saved.

Only numbers are stored: cases.json holds the config.json and the shapes of the weights that version wrote, and
logits.safetensors what it computed after it loaded them. The weights themselves are drawn from a seed. To make both
again, in an environment with these two versions: `python tests/transformers_4/make_logits.py`.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
TILE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
NEXT = {"class": "LlavaNext", "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
SIGLIP = {"vision": "siglip_vision_model", "vision_feature_select_strategy": "full"}
CASES = {
    "llama": {"text": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}},
    "llama-3-rope": {"text": {"model_type": "llama", "rope_scaling": LLAMA3_ROPE}},
    "llama-layers": {"text": {"model_type": "llama", "attention_bias": True}, "vision_feature_layer": [1, -2]},
    "llama-tied-outside": {"text": {"model_type": "llama"}, "stored": {"tie_word_embeddings": True}},
    "mistral": {"text": {"model_type": "mistral", "sliding_window": 4}, "vision_feature_select_strategy": "full"},
    "mistral-last-layer": {"text": {"model_type": "mistral", "rope_theta": 1e6}, "vision_feature_layer": -1},
    "mixtral": {"text": {"model_type": "mixtral", "num_local_experts": 3}},
    "qwen2": {"text": {"model_type": "qwen2", "tie_word_embeddings": True}, **SIGLIP},
    "qwen2-last-layer": {"text": {"model_type": "qwen2"}, "vision_feature_layer": -1, **SIGLIP},
    "qwen2-window": {
        "text": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    },
    "qwen2-own-head": {"text": {"model_type": "qwen2", "tie_word_embeddings": True}, "stores_head": True},
    "phi3": {"text": {"model_type": "phi3", "partial_rotary_factor": 0.5, "sliding_window": 4}},
    "persimmon": {"text": {"model_type": "persimmon"}},
    "granite": {"text": {"model_type": "granite", "embedding_multiplier": 3.0}},
    "gemma": {"text": {"model_type": "gemma"}},
    "gemma-siglip": {"text": {"model_type": "gemma", "hidden_act": "gelu"}, **SIGLIP},
    "gemma2": {"text": {"model_type": "gemma2", "final_logit_softcapping": None}},
    "gemma3": {"text": {"model_type": "gemma3_text"}},
    "next-mistral": {"text": {"model_type": "mistral"}, **NEXT},
    "next-qwen2": {"text": {"model_type": "qwen2", "tie_word_embeddings": True}, **NEXT},
    "next-gemma": {"text": {"model_type": "gemma"}, **NEXT},
}
"""What each configuration is made of; the rest is that version's default."""


def draw_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights of these names and shapes, the same in every version of PyTorch."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in sorted(shapes.items()):
        weights[name] = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else 0.4)
        if len(shape) == 1 and "norm" in name and name.endswith("weight"):
            weights[name] += 1
    return weights


def draw_inputs(*, is_tiled: bool, num_image_tokens: int) -> dict[str, torch.Tensor]:
    """One row with one picture; image_token_index is 39."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[1, 5, 9, *[39] * num_image_tokens, 7, 12, 30]])
    if not is_tiled:
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    sizes = torch.tensor([[5, 16]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 3, 8, 8, generator=generator), "image_sizes": sizes}


def count_image_tokens(config: dict) -> int:
    if config["model_type"] == "llava_next":
        return 4 + 2 * 5  # the picture of 5 by 16 pixels leaves two rows of four patches, each with a newline
    return 5 if config["vision_config"]["model_type"].startswith("clip") and keeps_all(config) else 4


def keeps_all(config: dict) -> bool:
    return config.get("vision_feature_select_strategy") == "full"


def run_case(settings: dict) -> tuple[dict, dict[str, list[int]], torch.Tensor]:
    """config.json, shapes of the stored weights, and logits."""
    import transformers

    settings = dict(settings)
    name, text = settings.pop("class", "Llava"), settings.pop("text")
    stores_head, changes = settings.pop("stores_head", False), settings.pop("stored", {})
    vision = {"model_type": settings.pop("vision", "clip_vision_model"), **TILE, "num_hidden_layers": 3}
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config=TEXT | text, image_token_index=39, **settings
    )
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    with tempfile.TemporaryDirectory() as folder:
        model_class(config).save_pretrained(folder)
        path = Path(folder, "model.safetensors")
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        if stores_head:
            shapes["language_model.lm_head.weight"] = [40, 16]
        save_file(draw_weights(shapes), path, metadata={"format": "pt"})
        stored = json.loads(Path(folder, "config.json").read_text()) | changes
        Path(folder, "config.json").write_text(json.dumps(stored))
        model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = draw_inputs(is_tiled=name == "LlavaNext", num_image_tokens=count_image_tokens(stored))
    with torch.no_grad():
        return stored, shapes, model(**inputs).logits


if __name__ == "__main__":
    cases, logits = {}, {}
    for case, settings in CASES.items():
        config, shapes, logits[case] = run_case(settings)
        cases[case] = {"config": config, "shapes": shapes}
    save_file(logits, HERE / "logits.safetensors")
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(found, sort_keys=True)}" for case, found in cases.items())
    (HERE / "cases.json").write_text(f"{{\n{lines}\n}}\n")
