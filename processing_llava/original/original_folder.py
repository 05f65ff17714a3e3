"""What a checkpoint in the layout of the original LLaVA says of itself, and where its parts are.

Nothing is read from the name of a folder. What is surprising:
- `model_type` does not tell: "llava" is also transformers' own class, and old delta weights say "llama".
- The vision tower is only named (`mm_vision_tower`), as a Hub id or a path; a relative path starts at the folder.
- A LoRA folder and a projector folder have a complete config.json, but neither tokenizer nor language model: both
  come from the base model.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from processing_llava.config_fields import build_config, check_dtype, check_part, check_sub_configs, use_one_side
from processing_llava.messages import shorten, write_line

from .config_bounds import check_values, log_ignored_code
from .file_checks import find_file, read_json, select_download
from .model_types import TEXT_MODEL_OF_CLASS, TEXT_MODEL_OF_TYPE, TRANSFORMERS_CONFIGS

logger = logging.get_logger(__name__)

_ORIGINAL_CLASS = re.compile(r"Llava\w*ForCausalLM")


def override_tower(config: dict[str, Any], vision_tower: str | None) -> dict[str, Any]:
    """The config.json of an original LLaVA, naming the tower that the caller chose, if there is one."""
    return config if vision_tower is None else config | {"mm_vision_tower": str(vision_tower)}


class Recognised(NamedTuple):
    """What a folder or Hub repository holds."""

    layout: str | None
    """"any_llava", "original", "transformers" (its own `llava` and `llava_next`); "adapter" for an adapter without a
    model; None for any other model, and for none."""
    raw: dict[str, Any]
    """The content of config.json, empty where there is none."""
    base: str | None
    """Folder or Hub id of the model under an adapter without a model."""


def recognise(name: str, download: dict[str, Any], *, base_model: str | None = None) -> Recognised:
    """What is behind the name of a model, for every `from_pretrained`.

    Args:
        name: Folder or Hub id.
        download: Some of `DOWNLOAD_KWARGS`.
        base_model: What the caller gave as the base, instead of what an adapter names.

    Raises:
        ValueError: config.json is no JSON or lacks a part, or nothing says which model is under an adapter.
        OSError: in one line, if there is no such folder or repository.
    """
    raw = read_config_file(name, download)
    if raw is not None:
        layout = find_layout(raw)
        if layout is not None:
            check_dtype(raw.get("dtype", raw.get("torch_dtype")))
        if layout in ("any_llava", "transformers"):
            check_sub_configs(raw, required=("text_config",))
        if layout == "transformers":
            read_built_in(raw)
        return Recognised(layout, raw, None)
    base = find_adapter_base(name, download, base_model=base_model)
    return Recognised(None if base is None else "adapter", {}, base)


def read_config_file(name: str, download: dict[str, Any]) -> dict[str, Any] | None:
    """The config.json of a folder or Hub repository, with numbers that a model can have; None if there is none.

    Raises:
        ValueError: naming the file, and the field.
    """
    raw = read_json(name, "config.json", download)
    if raw is not None:
        check_values(raw, f"{name}/config.json")
        log_ignored_code(raw, f"{name}/config.json")
    return raw


def find_layout(raw: dict[str, Any]) -> str | None:
    """The layout of a checkpoint by its config.json; None for a model of another kind.

    Raises:
        ValueError: for a field of the wrong type.
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    for name, value, kind in (("model_type", model_type, str), ("architectures", architectures, list)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"got {name}={shorten(value)}; expected a {kind.__name__}: correct config.json")
    if architectures and not all(isinstance(item, str) for item in architectures):
        raise ValueError(f"got architectures={shorten(architectures)}; expected texts: correct config.json")
    quantization = raw.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ValueError(f"got quantization_config={shorten(quantization)}; expected an object: correct config.json")
    if model_type == "any_llava":
        return "any_llava"
    is_named = any(_ORIGINAL_CLASS.fullmatch(str(name)) for name in architectures or [])
    if is_named or "mm_vision_tower" in raw or "mm_projector_type" in raw:
        return "original"
    return "transformers" if model_type in TRANSFORMERS_CONFIGS else None


def read_built_in(raw: dict[str, Any]) -> PreTrainedConfig:
    """transformers' own configuration for the config.json of one of its LLaVAs.

    Raises:
        ValueError: naming the field from which it cannot be built.
    """
    for part in ("text_config", "vision_config"):
        fields = raw.get(part)
        if isinstance(fields, dict) and "model_type" in fields:
            build_config(part, fields, lambda fields: AutoConfig.for_model(**fields))
    config = build_config("config", raw, TRANSFORMERS_CONFIGS[raw["model_type"]].from_dict)
    check_part("vision_config", use_one_side(config.vision_config))
    check_part("text_config", config.text_config)
    return config


def check_model_type(raw: dict[str, Any]) -> str:
    """The layout of a config.json, which must be that of a LLaVA.

    Raises:
        ValueError: for any other model.
    """
    layout = find_layout(raw)
    # AnyLlavaConfig is also made from dicts without model_type.
    if layout is None and "model_type" in raw:
        raise ValueError(
            f"got a configuration with model_type={raw['model_type']!r}; expected one of an original LLaVA "
            f"(mm_vision_tower), {', '.join(TRANSFORMERS_CONFIGS)}, or any_llava"
        )
    return layout or "any_llava"


def find_adapter_base(name: str, download: dict[str, Any], *, base_model: str | None = None) -> str | None:
    """Folder or Hub id of the model under a folder that holds an adapter and no model; None for any other folder.

    Args:
        base_model: What the caller gave as the base, instead of what the adapter names.

    Raises:
        ValueError: if nothing says which model it is.
    """
    if find_file(name, "config.json", download) is not None:
        return None
    # The adapter second: a model that was downloaded for use without a network may hold no word on it.
    adapter = read_json(name, "adapter_config.json", download)
    if adapter is None:
        return None
    named = read_base_name(adapter, name)
    if not base_model and not named:
        raise ValueError(
            f"got adapter {name} without base_model_name_or_path; expected base_model=: the folder or Hub id of the "
            "model that it was trained on"
        )
    found = find_installed(str(base_model)) if base_model else resolve_beside(name, named)
    _refuse_circle(name, found)
    return found


def _refuse_circle(name: str, base: str) -> None:
    """Refuse adapters on this machine that name each other as their base.

    Raises:
        ValueError: naming them.
    """
    seen = [Path(name).resolve()]
    while Path(base).is_dir() and not Path(base, "config.json").exists():
        seen.append(Path(base).resolve())
        if seen[-1] in seen[:-1]:
            raise ValueError(f"got adapter {name} on {base}, an adapter on itself; expected a model: give base_model=")
        named = read_base_name(read_json(base, "adapter_config.json", {}), base)
        if not named:
            return
        base = resolve_beside(base, named)


def read_base_name(adapter: dict[str, Any] | None, name: str) -> str | None:
    """What the adapter_config.json of a folder or Hub repository names as the model under it, if anything.

    Raises:
        ValueError: if it is no text.
    """
    base = (adapter or {}).get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or "\0" in base):
        raise ValueError(
            f"got base_model_name_or_path={shorten(base)} in {name}/adapter_config.json; expected the folder or "
            "Hub id of a model: correct it, or give base_model="
        )
    return base


def resolve_beside(folder: str, name: str) -> str:
    """A path that a file of a folder gives, from there or from here, as an absolute one; Hub ids stay."""
    path = next((path for path in (Path(folder) / name, Path(name)) if path.is_dir()), None)
    return find_installed(name) if path is None else str(path.resolve())


@dataclass(frozen=True, kw_only=True)
class OriginalFolder:
    """An original checkpoint.

    Args:
        name: Folder or Hub id.
        config: Its config.json.
        base_model: Folder or Hub id that the caller gave as the base; None to use what the folder says.
        download: Some of `DOWNLOAD_KWARGS`.
    """

    name: str
    config: dict[str, Any]
    base_model: str | None = None
    download: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(
        cls, name: str, *, base_model: str | None = None, vision_tower: str | None = None, **kwargs
    ) -> "OriginalFolder | None":
        """The original checkpoint of that name, or None if there is no config.json or it is another layout."""
        download = select_download(kwargs)
        config = read_config_file(name, download)
        if config is None or find_layout(config) != "original":
            return None
        config = override_tower(config, vision_tower)
        return cls(name=name, config=config, base_model=base_model, download=download)

    @property
    def text_model_type(self) -> str:
        """The `model_type` of the text model in transformers.

        Raises:
            ValueError: if no text model of transformers is known for this checkpoint.
        """
        for class_name in self.config.get("architectures") or []:
            if class_name in TEXT_MODEL_OF_CLASS:
                return TEXT_MODEL_OF_CLASS[class_name]
        model_type = self.config.get("model_type", "llava")
        if model_type in TEXT_MODEL_OF_CLASS.values():
            return model_type
        if model_type not in TEXT_MODEL_OF_TYPE:
            raise ValueError(
                f"got {self.name} with model_type={model_type!r} and "
                f"architectures={self.config.get('architectures')}; expected one of "
                f"{', '.join(sorted(set(TEXT_MODEL_OF_CLASS) | set(TEXT_MODEL_OF_TYPE)))}"
            )
        return TEXT_MODEL_OF_TYPE[model_type]

    @property
    def vision_tower(self) -> str:
        """Folder or Hub id of the vision tower.

        Raises:
            ValueError: if the configuration names none.
        """
        name = self.config.get("mm_vision_tower")
        if not name or not isinstance(name, str) or "\0" in name:
            raise ValueError(
                f"got {self.name} with mm_vision_tower={shorten(name)}; expected the Hub id or path of its vision "
                "tower: add it to config.json"
            )
        return resolve_beside(self.name, name)

    @property
    def base_name(self) -> str | None:
        """Folder or Hub id of the base model: what the caller gave, else what the LoRA adapter says."""
        if self.base_model is not None:
            return str(self.base_model)
        base = read_base_name(read_json(self.name, "adapter_config.json", self.download), self.name)
        return resolve_beside(self.name, base) if base else None

    @property
    def base_download(self) -> dict[str, Any]:
        """The download settings for other repositories: a revision or subfolder belongs to this one alone."""
        return {key: value for key, value in self.download.items() if key not in ("revision", "subfolder")}


EMBEDDED_NAME = "modeling_llava/tiny_llava/checkpoint"
"""What recipes and adapters call the embedded model: its path from where this package is installed."""
SHORT_NAME = "embedded"
"""What `llava ask` calls it; a folder of that name goes first."""


def find_installed(name: str) -> str:
    """The folder of the embedded model for its names, whatever the working directory; any other name as it is."""
    is_embedded = Path(name).as_posix() == EMBEDDED_NAME or (name == SHORT_NAME and not Path(name).exists())
    return str(Path(__file__).resolve().parents[2] / EMBEDDED_NAME) if is_embedded else name


def name_installed(path: str) -> str:
    """The name of the embedded model for its folder, which another machine has elsewhere; any other name as it is."""
    is_embedded = Path(path).resolve() == Path(find_installed(EMBEDDED_NAME))
    return EMBEDDED_NAME if is_embedded else path


# fmt: off
READ_FIELDS = {
    "architectures", "dtype", "hidden_activation", "image_aspect_ratio", "image_grid_pinpoints", "image_token_id",
    "mm_hidden_size", "mm_patch_merge_type", "mm_projector_type", "mm_use_im_patch_token", "mm_use_im_start_end",
    "mm_vision_select_feature", "mm_vision_select_layer", "mm_vision_tower", "model_type", "quantization_config",
    "rope_scaling", "rope_theta", "torch_dtype", "transformers_version",
}
"""Beside those of the language model."""
INERT_FIELDS = {
    "_attn_implementation", "_flash_attn_2_enabled", "_name_or_path", "add_cross_attention", "attn_implementation",
    "auto_map", "chunk_size_feed_forward", "delay_load", "faster_token_stride", "freeze_backbone",
    "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "image_crop_resolution", "image_split_resolution",
    "max_sequence_length", "mm_mask_drop_mode", "mm_mask_drop_ratio", "mm_mask_drop_ratio_lower",
    "mm_mask_drop_ratio_upper", "mm_mask_drop_skip_percentage", "mm_perceiver_depth", "mm_perceiver_ff_mult",
    "mm_perceiver_latents", "mm_perceiver_pretrained", "mm_projector_lr", "mm_qformer_depth", "mm_qformer_latents",
    "mm_qformer_pretrained", "mm_tunable_parts", "mm_vision_tower_lr", "pos_skipping_range", "pretrain_mm_mlp_adapter",
    "pretraining_tp", "s2_scales", "tokenizer_model_max_length", "tokenizer_padding_side", "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler", "unfreeze_mm_vision_tower", "use_mm_proj", "use_pos_skipping",
    "vision_tower_pretrained",
}
"""Of training, of files, or without effect where no field of another kind has a value."""
OTHER_KINDS = {
    "add_faster_video": (False,), "add_time_instruction": (False,), "force_sample": (False,),
    "image_projector_type": (), "image_tower": (), "mm_image_tower": (), "mm_newline_position": ("one_token",),
    "mm_resampler_type": (), "mm_spatial_pool_mode": (), "mm_spatial_pool_out_channels": (),
    "mm_spatial_pool_stride": (), "mm_video_tower": (), "mm_vision_tower_aux": (), "moe": (), "moe_enable": (False,),
    "s2": (False,), "video_tower": (),
}
"""Fields of models that see video, mix experts, resample or scale, with the values that no such model has; None and
empty ones are further ones."""
# fmt: on


def check_fields(folder: OriginalFolder) -> None:
    """Refuse a model of another kind, which would load as one that sees pictures and computes something else.

    Raises:
        ValueError: naming the field.
    """
    text_fields = AutoConfig.for_model(folder.text_model_type).to_dict()
    known = {*text_fields, *GenerationConfig().to_dict(), *PreTrainedConfig().to_dict()} | READ_FIELDS | INERT_FIELDS
    unknown = []
    for name, value in folder.config.items():
        if name in known or not value or value in OTHER_KINDS.get(name, ()):
            continue
        if name in OTHER_KINDS or name.startswith("mm_"):
            raise ValueError(
                f"got {folder.name} with {name}={value!r}, which is not computed here; expected a LLaVA that sees "
                "pictures, with one tower, a projector and a dense language model: take another checkpoint"
            )
        unknown.append(name)
    if unknown:
        logger.warning(
            write_line(f"{folder.name}: config.json holds {', '.join(unknown)}, of which nothing is known; no effect")
        )
