"""Every field of every JSON file of a folder, replaced by odd values: the space that strangers can write into."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILES = {
    "any_llava": ("config.json", "generation_config.json", "processor_config.json"),
    "llava": ("config.json", "generation_config.json", "processor_config.json"),
    "original": ("config.json", "generation_config.json", "../tower/config.json", "../tower/preprocessor_config.json"),
    "adapter": ("adapter_config.json", "../base/config.json"),
}
"""The files of each layout that are changed, from where its `model` is."""
ODD_VALUES = (
    None, True, False, 0, 1, -1, 3, 10**12, 10**400, 1.5, -0.5, 1e308, float("inf"), float("-inf"), float("nan"), "",
    "a", "float8_e4m3fn", "a\nb" * 1000, [], [0], [1e308] * 3, ["a", None], [[[]]], {}, {"a": 1}, {"1": [2]},
)  # fmt: skip
GENERATION = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "stop_strings",
    "do_sample", "num_beams", "use_cache", "cache_implementation", "max_cache_len", "temperature", "top_k", "top_p",
    "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "token_healing", "guidance_scale", "watermarking_config", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
    "encoder_no_repeat_ngram_size", "num_assistant_tokens", "prompt_lookup_num_tokens", "assistant_early_exit",
    "compile_config", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints",
    "force_words_ids", "prefill_chunk_size", "custom_generate", "trust_remote_code",
)  # fmt: skip
CONFIG = (
    "attribute_map", "to_dict", "__class__", "__init__", "base_model_tp_plan", "sub_configs", "base_config_key",
    "get_text_config", "validate", "num_labels", "use_return_dict", "quantization_config", "torch_dtype", "dtype",
    "_attn_implementation", "is_encoder_decoder", "name_or_path", "tie_word_embeddings", "forced_eos_token_id",
    "num_beams", "per_layer_config",
)  # fmt: skip
ADDED = {
    "generation_config.json": GENERATION,
    "config.json": CONFIG,
    "adapter_config.json": ("corda_config", "eva_config", "layers_pattern", "trainable_token_indices"),
}
"""Fields that a file need not have, and that are put in."""


def list_changes(root: Path) -> Iterator[tuple[str, str]]:
    """Layouts, and changes as texts: file, place and value.

    Args:
        root: Has a folder for each layout of `FILES`.
    """
    for layout, filenames in FILES.items():
        for filename in filenames:
            fields = _read(root / layout / "model" / filename)
            places = [(name,) for name in dict.fromkeys((*fields, *ADDED.get(Path(filename).name, ())))]
            for name, part in fields.items():
                places += [(name, inner) for inner in part] if isinstance(part, dict) else []
            for place in places:
                for number in range(len(ODD_VALUES)):
                    yield layout, json.dumps([filename, place, number])


def make_change(folder: Path, change: str) -> None:
    """Put a value in a place of a file of a folder."""
    filename, place, number = json.loads(change)
    content = _read(folder / filename)
    part = content
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = ODD_VALUES[number]
    (folder / filename).write_text(json.dumps(content))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
