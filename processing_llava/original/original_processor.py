"""The processor of a folder that has none of ours: of an original checkpoint, and of transformers' own LLaVAs.

What is surprising: the original chooses its conversation format by the name of the folder. Here it is inferred from
configuration and tokenizer; where these cannot tell (Vicuna and LLaMA 2 share everything), `template=` decides. And
transformers' processor keeps values of its own that the model has too (patch size, strategy, sizes of tiles). Here the
configuration of the model decides, and a processor that contradicts it is refused.
"""

import json
import re
from typing import Any

from transformers import (
    AddedToken,
    AutoConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from processing_llava.anyres_layout import MAX_TILES
from processing_llava.config_fields import build_config, check_part
from processing_llava.messages import shorten
from processing_llava.prompts import list_turn_texts
from processing_llava.template_bounds import CostlyTemplateError
from processing_llava.templates import change_template, load_template

from .config_bounds import log_ignored_code
from .file_checks import check_tokenizer_files, find_file, in_one_line, naming_file, read_json, select_download
from .model_parts import has_tokenizer, read_image_fields, read_image_processor, read_tokenizer, read_vision_config
from .older_versions import read_old_activation
from .original_folder import OriginalFolder, check_fields, check_model_type, override_tower, read_built_in, recognise

logger = logging.get_logger(__name__)


_PROCESSORS = {"llava": LlavaProcessor, "llava_next": LlavaNextProcessor}


def read_transformers_parts(name: str, raw: dict[str, Any], download: dict[str, Any]) -> dict[str, Any]:
    """The arguments of AnyLlavaProcessor.

    Args:
        name: Folder or Hub id.
        raw: Its config.json.
        download: Some of `DOWNLOAD_KWARGS`.

    Raises:
        ValueError: naming the values in which its processor contradicts its model.
    """
    config = read_built_in(raw)
    # AutoProcessor would follow the files, which may name ours.
    theirs = _PROCESSORS[config.model_type].from_pretrained(name, backend="pil", trust_remote_code=False, **download)
    tokenizer, token = theirs.tokenizer, theirs.image_token
    # Folders of before transformers 4.46 lack fields of the processor, and the token in the tokenizer.
    if token not in tokenizer.get_vocab() and len(tokenizer) == config.image_token_id:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    found = tokenizer.get_vocab().get(token)
    if found != config.image_token_id:
        raise ValueError(
            f"got {name} with image_token_index={config.image_token_id} in config.json, and a tokenizer that gives "
            f"{token!r} the id {found}; expected equal ids: correct one of them"
        )
    strategy = config.vision_feature_select_strategy
    for field, stored, expected in (
        ("patch_size", theirs.patch_size, config.vision_config.patch_size),
        ("vision_feature_select_strategy", theirs.vision_feature_select_strategy, strategy),
    ):
        if stored not in (None, expected):
            raise ValueError(
                f"got {name} with {field} {stored!r} in the files of its processor and {expected!r} in config.json; "
                "expected one value: correct the wrong one"
            )
    fields = theirs.image_processor.to_dict()
    is_tiled = config.model_type == "llava_next"
    pinpoints = config.image_grid_pinpoints if is_tiled else None
    if is_tiled:
        stored = fields.get("image_grid_pinpoints")
        if stored is not None and [list(size) for size in stored] != [list(size) for size in pinpoints]:
            raise ValueError(
                f"got {name} with image_grid_pinpoints {pinpoints} in config.json and {stored} in its image "
                "processor; expected equal ones: correct one of them"
            )
        image_aspect_ratio = "anyres"
    else:
        image_aspect_ratio = "pad" if fields.get("do_pad") else "square"
    is_clip = config.vision_config.model_type == "clip_vision_model"
    return {
        "image_processor": read_image_fields(
            fields, image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=pinpoints
        ),
        "tokenizer": theirs.tokenizer,
        "chat_template": theirs.chat_template,
        "patch_size": config.vision_config.patch_size,
        "num_prefix_tokens": int(is_clip and strategy == "full"),
        "patch_merge_type": "spatial_unpad" if is_tiled else "flat",
        "image_token": theirs.image_token,
    }


TURN_END_TOKENS = {
    "chatml_direct": "<|im_end|>",
    "mpt": "<|im_end|>",
    "qwen": "<|im_end|>",
    "llama_3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
}
"""What ends an answer, for formats in which it is not the end token of the language model."""

_PINPOINT_RANGE = re.compile(r"\((\d+)x(\d+)\)")
# Text-model settings that newer configuration classes renamed but still accept.
_OLD_TEXT_FIELDS = ("rope_theta", "rope_scaling")


class OriginalProcessorMixin(ProcessorMixin):
    """A ProcessorMixin that reads original folders, and formats by name."""

    @classmethod
    @in_one_line()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        template: str | None = None,
        base_model: str | None = None,
        vision_tower: str | None = None,
        **kwargs,
    ) -> ProcessorMixin:
        """As in transformers; a folder of the original LLaVA, which has no processor, gets one that fits, and so does
        one of transformers' own `llava` and `llava_next`, whose processor is another; an adapter that of its base.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            template: Name of a conversation format, instead of the stored or inferred one.
            base_model: Folder or Hub id with the tokenizer, for an original folder that has none; or the base of an
                adapter, instead of the one that it names.
            vision_tower: Folder or Hub id of the tower, instead of the one that an original folder names.

        Raises:
            ValueError: if an original folder lacks something, or there is no such template.
        """
        name = str(pretrained_model_name_or_path)
        download = select_download(kwargs)
        stored = read_json(name, "processor_config.json", download)
        found = recognise(name, download, base_model=base_model)
        if found.layout is None:
            check_model_type(found.raw)
        if found.layout == "adapter" and stored is None:
            kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
            return cls.from_pretrained(found.base, template=template, vision_tower=vision_tower, **kwargs)
        # A processor saved beside original weights is ours.
        if found.layout == "original" and stored is None:
            config = override_tower(found.raw, vision_tower)
            folder = OriginalFolder(name=name, config=config, base_model=base_model, download=download)
            return cls(**read_original_parts(folder, template=template))
        kwargs["trust_remote_code"] = False
        check_tokenizer_files(name, download)
        with naming_file(name, download):
            for filename in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
                log_ignored_code(read_json(name, filename, download), f"{name}/{filename}")
            if found.layout == "transformers" and (stored or {}).get("processor_class") != cls.__name__:
                processor = cls(**read_transformers_parts(name, found.raw, download))
            else:
                processor = super().from_pretrained(name, **kwargs)
            _check_template(name, processor, download)
        if template is not None:
            processor.chat_template = change_template(processor.chat_template, template)
        return processor


def _check_template(name: str, processor: ProcessorMixin, download: dict[str, Any]) -> None:
    """Refuse a chat template that costs more than one that writes messages; what else is wrong is told by `render`.

    Raises:
        ValueError: naming its file.
    """
    stored = processor.chat_template
    templates = stored if isinstance(stored, dict) else {} if stored is None else {"default": stored}
    for template in templates.values():
        _check_one_template(name, template, processor, download)


def _check_one_template(name: str, template: str, processor: ProcessorMixin, download: dict[str, Any]) -> None:
    try:
        list_turn_texts(template, processor.tokenizer.special_tokens_map)
    except CostlyTemplateError as error:
        files = ("processor_config.json", "chat_template.json", "tokenizer_config.json")
        holders = (file for file in files if (read_json(name, file, download) or {}).get("chat_template") == template)
        file = "chat_template.jinja" if find_file(name, "chat_template.jinja", download) else next(holders, None)
        place = f"{name}/{file}" if file else f"the chat template of {name}"
        raise ValueError(str(error).replace("the chat template", place, 1)) from None


def read_text_config(folder: OriginalFolder) -> PreTrainedConfig:
    """The configuration of the language model, whose fields lie between those of the LLaVA."""
    model_type = folder.text_model_type
    known = AutoConfig.for_model(model_type).to_dict()
    taken = {name: folder.config[name] for name in (*known, *_OLD_TEXT_FIELDS) if name in folder.config}
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        taken.pop(name, None)
    taken |= read_old_activation(folder.config, folder.config | {"model_type": model_type})
    config = build_config("config", taken, lambda fields: AutoConfig.for_model(model_type, **fields))
    check_part("config.json", config)
    return config


def read_original_tokenizer(folder: OriginalFolder, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with the image tokens that the original adds when it loads the checkpoint.

    Raises:
        ValueError: if neither the folder nor its base model has one.
    """
    has_own = has_tokenizer(folder.name, folder.download)
    if not has_own and folder.base_name is None:
        raise ValueError(
            f"got {folder.name}, which holds no tokenizer and does not say which model it was trained on; expected "
            "base_model=: the folder or Hub id of that model"
        )
    tokenizer = read_tokenizer(
        folder.name if has_own else folder.base_name,
        text_config=text_config,
        # The original reads LLaMA's with the slow class and the others with the fast one.
        prefer_sentencepiece=text_config.model_type == "llama",
        download=folder.download if has_own else folder.base_download,
    )
    added = []
    # The default of the original loader, for folders written before the field existed.
    if folder.config.get("mm_use_im_patch_token", True):
        added.append("<im_patch>")
    if folder.config.get("mm_use_im_start_end", False):
        added += ["<im_start>", "<im_end>"]
    missing = [token for token in added if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    if "<im_end>" in added and tokenizer.get_vocab()["<im_end>"] >= text_config.vocab_size:
        raise ValueError(
            f"got {folder.name} with mm_use_im_start_end={shorten(folder.config['mm_use_im_start_end'])} and "
            f"vocab_size={text_config.vocab_size}, without a place for <im_end>; expected {len(tokenizer)}: correct "
            "config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def infer_template(folder: OriginalFolder, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the conversation format that the checkpoint was trained with, as far as its files tell."""
    text_model_type = folder.text_model_type
    vocabulary = tokenizer.get_vocab()
    if text_model_type == "mpt":
        return "mpt"
    if "<|start_header_id|>" in vocabulary:
        return "llama_3"
    if "<start_of_turn>" in vocabulary:
        return "gemma"
    if "<|im_start|>" in vocabulary:
        return "qwen" if text_model_type.startswith("qwen") else "chatml_direct"
    if text_model_type in ("mistral", "mixtral"):
        return "mistral_instruct"
    if folder.config.get("mm_use_im_start_end", False):
        return "llava_v0"
    if folder.config.get("mm_projector_type", "linear") == "linear":
        return "llava_v1"
    return "vicuna_v1"


def read_pinpoints(folder: OriginalFolder, *, tile_size: int) -> list[list[int]] | None:
    """The sizes that images are tiled to as (height, width) in pixels; None where images are not tiled.

    The order is kept, since the first of equals is taken.

    Raises:
        ValueError: if the mode of the images is unknown, or its sizes cannot be read.
    """
    mode = folder.config.get("image_aspect_ratio") or "square"
    if mode in ("pad", "square"):
        return None
    if mode != "anyres":
        raise ValueError(f"got {folder.name} with image_aspect_ratio={mode!r}; expected 'pad', 'square' or 'anyres'")
    sizes = folder.config.get("image_grid_pinpoints")
    try:
        if isinstance(sizes, str) and "x" in sizes:
            (rows, columns), (last_rows, last_columns) = (map(int, ends) for ends in _PINPOINT_RANGE.findall(sizes))
            if max(last_rows, last_columns) > MAX_TILES:
                raise ValueError("too many tiles")
            sizes = [
                [row * tile_size, column * tile_size]
                for row in range(rows, last_rows + 1)
                for column in range(columns, last_columns + 1)
            ]
        elif isinstance(sizes, str):
            sizes = json.loads(sizes.replace("(", "[").replace(")", "]"))
        return [[int(height), int(width)] for width, height in sizes]
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"got {folder.name} with image_grid_pinpoints={shorten(sizes)}; expected a list of [width, height]"
        ) from error


def read_original_parts(folder: OriginalFolder, *, template: str | None = None) -> dict[str, Any]:
    """The arguments of AnyLlavaProcessor for an original checkpoint.

    Args:
        folder: The checkpoint.
        template: Name of a conversation format, instead of the inferred one.

    Raises:
        ValueError: if something of it is missing, unreadable, or not supported.
    """
    check_fields(folder)
    vision_config = read_vision_config(folder.vision_tower, **folder.base_download)
    image_processor = read_image_processor(
        folder.vision_tower,
        vision_config,
        download=folder.base_download,
        image_aspect_ratio=folder.config.get("image_aspect_ratio") or "square",
        image_grid_pinpoints=read_pinpoints(folder, tile_size=vision_config.image_size),
    )
    tokenizer = read_original_tokenizer(folder, read_text_config(folder))
    if template is None:
        template = infer_template(folder, tokenizer)
        logger.warning(f"{folder.name}: conversation format {template}, inferred; template= chooses another")
    has_ends = folder.config.get("mm_use_im_start_end", False)
    return {
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "chat_template": load_template(template, image="<im_start><image><im_end>" if has_ends else "<image>"),
        "patch_size": vision_config.patch_size,
        "num_prefix_tokens": count_kept_prefix_tokens(folder, vision_config),
        "patch_merge_type": folder.config.get("mm_patch_merge_type") or "flat",
    }


def count_kept_prefix_tokens(folder: OriginalFolder, vision_config: PreTrainedConfig) -> int:
    """Features of a tile that are not patches and are kept: CLIP's class token, where it is selected."""
    keeps_all = folder.config.get("mm_vision_select_feature", "patch") == "cls_patch"
    return int(keeps_all and vision_config.model_type == "clip_vision_model")
