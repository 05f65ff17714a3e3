"""The language model of a LLaVA as llama.cpp reads it: settings and weights of a GGUF file.

What is surprising:
- llama.cpp rotates neighbours in a head of a Llama or Mistral where transformers rotates halves, so rows of queries
  and keys change places. Qwen and Gemma keep transformers' order there.
- Gemma's norms are written with their 1, and llama.cpp scales everything that enters a Gemma, image features too
  (llama.cpp b11549, src/models/gemma.cpp): `scale_features` says what the projector has to undo or do.
- A Mistral with a window says a context that ends where the window would begin to matter, since llama.cpp knows none
  for it.

A field that is neither written nor without effect must have the default of its class: a field that a later version of
transformers adds is refused until somebody has looked at it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_llava.configuration_llava import AnyLlavaConfig
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma"}
"""Language models of transformers, and what llama.cpp calls them."""
_WRITTEN = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({
    "initializer_range", "attention_dropout", "use_cache", "pretraining_tp", "max_window_layers", "layer_types",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_factor", "projection_dim", "vision_use_head",
})  # fmt: skip
"""Fields of language models and towers that change no answer; `layer_types` follows from `use_sliding_window`."""
_OF_ONE_KIND = {"llama": {"attention_bias", "mlp_bias"}, "mistral": {"sliding_window"}, "qwen2": {"sliding_window"},
                "qwen3": {"sliding_window"}}  # fmt: skip
"""Further fields: biases are weights like others; without `use_sliding_window`, a window of Qwen's is not used."""
_ROPE_FIELDS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One weight under llama.cpp's name; `read` makes it when it is written, so that one at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    dtype: torch.dtype = torch.float32
    """Of what is written, unless it is quantized: float32 for vectors, and for what is added to activations."""


def check_text(config: AnyLlavaConfig) -> None:
    """Refuse a language model that llama.cpp cannot compute.

    Raises:
        ValueError: naming the field.
    """
    text = config.text_config
    refuse_others("text_config.model_type", text.model_type, tuple(ARCHITECTURES))
    refuse_others("lm_head_bias", config.lm_head_bias, (False,))
    check_fields("text_config", text, written=_WRITTEN | _OF_ONE_KIND.get(text.model_type, set()))
    if text.model_type == "gemma":
        refuse_others("tie_word_embeddings", config.tie_word_embeddings, (True,))
    width = text.num_attention_heads * _head_width(text)
    if text.model_type == "qwen2":
        refuse_others("text_config.head_dim times num_attention_heads", width, (text.hidden_size,))
    rope = dict(text.rope_parameters)
    kind = rope.pop("rope_type")
    refuse_others("text_config.rope_parameters.rope_type", kind, tuple(_ROPE_FIELDS))
    for name in rope.keys() - _ROPE_FIELDS[kind]:
        refuse_others(f"text_config.rope_parameters.{name}", rope[name], (None,))


def check_fields(part: str, config: PreTrainedConfig, *, written: frozenset[str] | set[str]) -> None:
    """Refuse fields that have no place in the file and are not as the class has them.

    Args:
        part: Name of the configuration, for the message.
        config: Of a language model or a vision tower.
        written: Fields that the file expresses.

    Raises:
        ValueError: naming the field.
    """
    defaults = type(config)().to_dict()
    ignored = written | _WITHOUT_EFFECT | PreTrainedConfig().to_dict().keys() | {"model_type", "_name_or_path"}
    for name, value in config.to_dict().items():
        if name not in ignored:
            refuse_others(f"{part}.{name}", value, (defaults.get(name),))


def refuse_others(field: str, value: Any, expected: tuple[Any, ...]) -> None:
    """Refuse a value for which a GGUF file, or llama.cpp, has no place.

    Raises:
        ValueError: naming the field.
    """
    if value not in expected:
        raise ValueError(
            f"got {field}={value!r}, which GGUF as llama.cpp reads it cannot express; expected "
            f"{' or '.join(map(repr, expected))}: choose another layout"
        )


def scale_features(config: AnyLlavaConfig) -> float:
    """What the last layer of the projector is multiplied by."""
    root = math.sqrt(config.text_config.hidden_size)
    return (root if config.scale_image_features else 1.0) / (root if config.text_config.model_type == "gemma" else 1.0)


def add_text_settings(writer: Any, config: AnyLlavaConfig) -> None:
    """Write the settings of the language model.

    Args:
        writer: `gguf.GGUFWriter` of its architecture.
        config: One that `check_text` accepts.
    """
    import gguf

    text = config.text_config
    context = text.max_position_embeddings
    if text.model_type == "mistral" and text.sliding_window is not None:
        context = min(context, text.sliding_window)
    writer.add_context_length(context)
    writer.add_vocab_size(text.vocab_size)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(_head_width(text))
    writer.add_value_length(_head_width(text))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(_head_width(text))
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    if text.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(text.rope_parameters["factor"])


def list_text_tensors(model: AnyLlavaForConditionalGeneration) -> Iterator[GgufTensor]:
    """The weights of the language model and its output layer.

    Raises:
        ValueError: for a weight that llama.cpp has no name for.
    """
    import gguf

    config = model.config
    text = config.text_config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[text.model_type])
    names = gguf.get_tensor_name_map(architecture, text.num_hidden_layers)
    weights = {f"model.{name}": weight for name, weight in model.model.language_model.named_parameters()}
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = model.lm_head.weight
    for name, weight in weights.items():
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ValueError(f"got a weight {name!r} of a {text.model_type}; expected one that llama.cpp has")
        yield GgufTensor(
            name=written,
            shape=tuple(weight.shape),
            read=lambda name=name, weight=weight: _as_llama_cpp_has_it(name, weight, text),
            dtype=weight.dtype if weight.ndim == 2 else torch.float32,
        )
    if text.rope_parameters["rope_type"] == "llama3":
        factors = _list_rope_factors(text)
        yield GgufTensor(name="rope_freqs.weight", shape=tuple(factors.shape), read=lambda: factors)


def interleave_halves(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Rows `[heads * width, ...]` of queries or keys, the two halves of each head put side by side, one row of each.

    Args:
        weight: A matrix, or a bias.
        width: Width of a head.
    """
    heads, half = len(weight) // width, width // 2
    return weight.reshape(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


def _as_llama_cpp_has_it(name: str, weight: torch.Tensor, text: PreTrainedConfig) -> torch.Tensor:
    if ARCHITECTURES[text.model_type] == "llama" and (".q_proj." in name or ".k_proj." in name):
        return interleave_halves(weight, _head_width(text))
    if text.model_type == "gemma" and name.endswith("norm.weight"):
        return weight.float() + 1
    return weight


def _list_rope_factors(text: PreTrainedConfig) -> torch.Tensor:
    """What each frequency `[width / 2]` of a head is divided by, for Llama 3.1 (transformers' `llama3`)."""
    rope = text.rope_parameters
    width = _head_width(text)
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] / lengths
    smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    smooth = smooth.clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _head_width(text: PreTrainedConfig) -> int:
    return text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
