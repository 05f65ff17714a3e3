"""Tokenizer and image settings of the parts that a LLaVA is made of: a language model and a vision tower."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from processing_llava.config_fields import check_part, naming_config, use_one_side
from processing_llava.image_processing_llava import AnyLlavaImageProcessorPil
from processing_llava.prompt_ids import refusing_panics
from processing_llava.transformers_versions import AutoImageProcessor

from .config_bounds import log_ignored_code
from .file_checks import check_tokenizer_files, find_file, is_hub_id, limit_download, naming_file, read_json
from .original_folder import read_config_file
from .sentencepiece_tokenizer import load_sentencepiece_tokenizer

logger = logging.get_logger(__name__)

_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14": _CLIP_LARGE | {"image_size": 224},
    "openai/clip-vit-large-patch14-336": _CLIP_LARGE | {"image_size": 336},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
}
"""The towers of nearly every published LLaVA, so that one with its tower inside needs no second repository."""
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_IMAGE_FIELDS = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")


def read_vision_config(vision_tower: str, **download) -> PreTrainedConfig:
    """The configuration of a tower, also where its repository is an image-text model such as CLIP.

    Raises:
        ValueError: if there is none.
    """
    if (known := find_known_tower(vision_tower)) is not None:
        config = AutoConfig.for_model(**KNOWN_TOWERS[known])
        config.name_or_path = vision_tower
        return config
    with explain_tower(vision_tower), naming_config(f"vision tower {vision_tower!r}"):
        read_config_file(vision_tower, download)
        download = limit_download(vision_tower, download)
        config = AutoConfig.from_pretrained(vision_tower, trust_remote_code=False, **download)
    if "vision_config" in config.sub_configs:
        config = config.vision_config
    config.name_or_path = vision_tower
    check_part("vision_config", use_one_side(config))
    return config


def find_known_tower(vision_tower: str) -> str | None:
    """Which of `KNOWN_TOWERS` a name means: itself, or the end of somebody's path that is not on this machine."""
    if vision_tower in KNOWN_TOWERS:
        return vision_tower
    if is_hub_id(vision_tower) or Path(vision_tower).exists():
        return None
    for known in KNOWN_TOWERS:
        if Path(vision_tower).name == Path(known).name:
            logger.warning(f"there is no folder {vision_tower!r} on this machine; its settings are those of {known}")
            return known
    return None


@contextlib.contextmanager
def explain_tower(vision_tower: str) -> Iterator[None]:
    """Tell why a tower cannot be read inside of this, and what to do.

    Raises:
        ValueError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"got vision tower {vision_tower!r}, which cannot be read; expected the folder or Hub id of a vision "
            f"model: give the right one as vision_tower= to model and processor, or as --vision-tower: {reason}"
        ) from error


def read_image_processor(
    vision_tower: str, vision_config: PreTrainedConfig, *, download: dict[str, Any] | None = None, **fields
) -> AnyLlavaImageProcessorPil:
    """The image processor of a LLaVA on this tower.

    Args:
        vision_tower: Folder or Hub id.
        vision_config: Of that tower.
        download: Some of `DOWNLOAD_KWARGS`.
        **fields: `image_aspect_ratio` and `image_grid_pinpoints`.

    Raises:
        ValueError: if the tower does not say how its images are made.
    """
    if find_known_tower(vision_tower) is not None:
        return AnyLlavaImageProcessorPil(**_known_image_fields(vision_config), **fields)
    with explain_tower(vision_tower):
        download = limit_download(vision_tower, download or {})
    try:
        with naming_file(vision_tower, download):
            log_ignored_code(read_json(vision_tower, "preprocessor_config.json", download), vision_tower)
            tower_fields = AutoImageProcessor.from_pretrained(
                vision_tower, backend="pil", trust_remote_code=False, **download
            ).to_dict()
    except OSError as error:
        raise ValueError(
            f"got vision tower {vision_tower!r} without preprocessor_config.json; expected one with size, image_mean "
            "and image_std: add the file that belongs to the tower"
        ) from error
    return read_image_fields(tower_fields, **fields)


def read_image_fields(stored: dict[str, Any], **fields) -> AnyLlavaImageProcessorPil:
    """Our image processor with what another one of transformers stores, and fields of ours."""
    kept = {name: stored[name] for name in _IMAGE_FIELDS if stored.get(name) is not None}
    # SigLIP's processor has no such field, where ours would crop.
    return AnyLlavaImageProcessorPil(do_center_crop=bool(stored.get("do_center_crop")), **kept, **fields)


def _known_image_fields(vision_config: PreTrainedConfig) -> dict[str, Any]:
    side = vision_config.image_size
    square = {"height": side, "width": side}
    if vision_config.model_type == "clip_vision_model":
        return {"size": {"shortest_edge": side}, "crop_size": square}
    half = (0.5, 0.5, 0.5)
    return {"size": square, "do_center_crop": False, "image_mean": half, "image_std": half}


def has_tokenizer(name: str, download: dict[str, Any]) -> bool:
    """Whether a folder or Hub repository has the files of a tokenizer."""
    return any(find_file(name, filename, download) for filename in _TOKENIZER_FILES)


def read_tokenizer(
    name: str,
    *,
    text_config: PreTrainedConfig | None = None,
    prefer_sentencepiece: bool = False,
    download: dict[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub repository, exact where it is a `tokenizer.model`.

    It pads on the left, where `generate` needs it; trainers say themselves where they pad.

    Args:
        name: Folder or Hub id.
        text_config: Decides the class where the files do not; needed if config.json is an original LLaVA's.
        prefer_sentencepiece: Read `tokenizer.model` even beside a `tokenizer.json`, which may be a conversion that
            splits runs of spaces differently.
        download: Some of `DOWNLOAD_KWARGS`.

    Raises:
        ValueError: if there is no tokenizer, or it encodes every text to nothing.
    """
    download = download or {}
    try:
        sentencepiece_file = find_file(name, "tokenizer.model", download)
    except OSError as error:
        raise ValueError(
            f"got {name!r} as the model with the tokenizer; expected a folder or Hub id: {error}"
        ) from error
    if sentencepiece_file and (prefer_sentencepiece or find_file(name, "tokenizer.json", download) is None):
        for filename in _SIDE_FILES:
            find_file(name, filename, download)
        with naming_file(name, download):
            tokenizer = load_sentencepiece_tokenizer(Path(sentencepiece_file).parent)
        tokenizer.padding_side = "left"
        return tokenizer
    # The class that AutoTokenizer finds for an original folder may change what its tokenizer.json says.
    is_original_file = text_config is not None and find_file(name, "tokenizer.json", download)
    tokenizer_class = PreTrainedTokenizerFast if is_original_file else AutoTokenizer
    config = {} if is_original_file else {"config": text_config}
    try:
        check_tokenizer_files(name, download)
        with naming_file(name, download):
            log_ignored_code(read_json(name, "tokenizer_config.json", download), f"{name}/tokenizer_config.json")
            tokenizer = tokenizer_class.from_pretrained(name, trust_remote_code=False, **config, **download)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"got {name!r} without a usable tokenizer; expected one beside the model: {reason}"
        ) from error
    with refusing_panics():
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"got tokenizer files in {name!r} from which transformers builds a tokenizer that encodes every text to "
            "nothing; expected tokenizer.model or tokenizer.json"
        )
    tokenizer.padding_side = "left"
    return tokenizer
