"""What the Auto classes of transformers load, and AutoModelForVision2Seq. Importing this file registers it."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from processing_llava.config_fields import naming_config
from processing_llava.image_processing_fast import AnyLlavaImageProcessor
from processing_llava.image_processing_llava import AnyLlavaImageProcessorPil
from processing_llava.original.config_bounds import check_values
from processing_llava.original.file_checks import in_one_line, read_json, select_download
from processing_llava.original.model_types import TRANSFORMERS_CONFIGS
from processing_llava.original.original_folder import (
    find_layout,
    read_built_in,
    recognise,
)
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.transformers_versions import FIRST, LAST, VERSION, AutoImageProcessor

from .checkpoints.checkpoint_mixin import refuse_bit_arguments, refuse_parts
from .checkpoints.generation_settings import check_generation_config, leave_out_settings
from .checkpoints.layouts import find_changed_fields, read_transformers_config, translate_config
from .checkpoints.original_adapters import load_adapted, needs_our_class
from .checkpoints.original_weights import is_left_out
from .checkpoints.weight_checks import check_fit, refuse_unfit_weights
from .checkpoints.weight_files import Weight, has_model, read_model, refuse_integers
from .checkpoints.weight_names import rename_to_ours
from .configuration_llava import AnyLlavaConfig
from .modeling_llava import AnyLlavaForConditionalGeneration, AnyLlavaModel

logger = logging.get_logger(__name__)


class AutoModelForVision2Seq(_BaseAutoModelClass):
    """The Auto class that transformers 5 dropped: every image-text-to-text model, built in or registered."""

    # The same object, not a copy: pipelines find registered models through the mapping's back reference.
    _model_mapping = AutoModelForImageTextToText._model_mapping

    @classmethod
    @in_one_line()
    def from_pretrained(cls, pretrained_model_name_or_path: str, *model_args, **kwargs) -> PreTrainedModel:
        """As in transformers; an original LLaVA is recognised whatever its model_type says.

        Raises:
            ValueError: naming file, weight and shapes, if a part of a LLaVA or of an adapter does not fit.
        """
        refuse_bit_arguments(kwargs)
        name, download = str(pretrained_model_name_or_path), select_download(kwargs)
        ours = AnyLlavaForConditionalGeneration
        found = recognise(name, download, base_model=kwargs.get("base_model"))
        if found.layout == "original":
            kwargs.pop("trust_remote_code", None)
            return ours.from_pretrained(name, *model_args, **kwargs)
        if found.layout == "adapter":
            kwargs.pop("base_model", None)
            merge = kwargs.pop("merge_adapter", True)
            loader = ours if needs_our_class(name, download) else cls
            return load_adapted(loader, found.base, name, download, *model_args, merge=merge, **kwargs)
        kwargs["trust_remote_code"] = found.layout is None and bool(kwargs.get("trust_remote_code"))
        if found.layout != "transformers":
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        check_generation_config(name, download)
        refuse_parts(
            {part: kwargs.get(part) for part in ("base_model", "delta", "vision_tower")}, "transformers", name
        )
        weights = read_model(name, download) if has_model(name, download) else {}
        if not found.raw.get("quantization_config"):
            refuse_integers(name, weights)
        if kwargs.get("quantization") is not None or needs_class_of_writer(name, found.raw, weights):
            kwargs.pop("trust_remote_code", None)
            return ours.from_pretrained(name, *model_args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("merge_adapter", "quantization")}
        wants_info = kwargs.pop("output_loading_info", False)
        takes_any_shape = kwargs.pop("ignore_mismatched_sizes", False)
        checks = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        if weights:
            config = read_built_in(found.raw)
            is_exact = not (found.raw.get("quantization_config") or wants_info)
            renamed = {rename_to_ours(key, "transformers"): weight for key, weight in weights.items()}
            model_class = cls._model_mapping[type(config)]
            check_fit(model_class, config, renamed, name, is_exact=is_exact, takes_any_shape=takes_any_shape)
        with naming_config(f"{name}/config.json"):
            model, info = super().from_pretrained(name, *model_args, **checks, **kwargs)
        if takes_any_shape:
            info["mismatched_keys"] = []
        num_layers = model.config.vision_config.num_hidden_layers
        names = {key: rename_to_ours(key, "transformers") for key in info["unexpected_keys"]}
        unexpected = [key for key, our_name in names.items() if not is_left_out(our_name, num_layers=num_layers)]
        refuse_unfit_weights(info | {"unexpected_keys": unexpected}, weights, name)
        leave_out_settings(model, name)
        return (model, info) if wants_info else model


def needs_class_of_writer(name: str, raw: dict[str, Any], weights: dict[str, Weight]) -> bool:
    """Whether our class computes what the writer of a checkpoint of transformers' layout did, and its present class
    something else; logs either."""
    has_output_layer = any(rename_to_ours(key, "transformers") == "lm_head.weight" for key in weights)
    changed = find_changed_fields(raw, has_output_layer=has_output_layer)
    if not changed:
        return False
    try:
        read_transformers_config(raw)
        loaded, fits = "AnyLlavaForConditionalGeneration is loaded, which computes what that version did", True
    except ValueError as error:
        loaded, fits = f"it is loaded for want of a class that computes what that version did ({error})", False
    logger.warning(
        f"{name} was written by transformers {raw['transformers_version']}, which read {' and '.join(changed)} "
        f"otherwise than its present class: {loaded}"
    )
    return fits


@in_one_line()
def read_config(model_type: str, config_dict: dict[str, Any], **kwargs) -> PreTrainedConfig:
    """What a config.json of our model_type, or of one of the original LLaVA, is read as.

    An original one becomes an AnyLlavaConfig. For a model_type that transformers knows too ("llava"), every other one
    gives transformers' own class.
    """
    name = kwargs.get("name_or_path", config_dict.get("_name_or_path", ""))
    check_values(config_dict, f"{name}/config.json" if name else "config.json")
    if model_type == AnyLlavaConfig.model_type:
        return AnyLlavaConfig.from_dict(config_dict, **kwargs)
    built_in = TRANSFORMERS_CONFIGS.get(model_type)
    if built_in is not None and find_layout(config_dict) == "transformers":
        read_built_in(config_dict)
        return built_in.from_dict(config_dict, **kwargs)
    return AnyLlavaConfig.from_dict(translate_config(config_dict, **kwargs | {"name": name}), **kwargs)


class NoCausalLM(PreTrainedModel):
    """What the Auto classes of language models find for a LLaVA: a sentence that names the right one."""

    config_class = AnyLlavaConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *model_args, **kwargs) -> PreTrainedModel:
        """Refuse to load.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"got {str(pretrained_model_name_or_path)!r} for an Auto class of language models; expected "
            "AutoModelForVision2Seq (or AutoModelForImageTextToText), since it is a LLaVA: import it from "
            "modeling_llava; adapters load there too, as AutoModelForVision2Seq.from_pretrained(adapter)"
        )

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
        return cls.from_pretrained(config.name_or_path)


@in_one_line()
def load_processor(load_upstream: Callable[..., ProcessorMixin], name: str, **kwargs) -> ProcessorMixin:
    """What AutoProcessor.from_pretrained gives.

    Args:
        load_upstream: That of transformers.
    """
    # transformers takes a ValueError of a configuration for an unknown model, and goes on to build a bare tokenizer
    # (5.17 to 5.24, models/auto/processing_auto.py); and it knows no processor of an adapter.
    name, download = str(name), select_download(kwargs)
    kwargs.setdefault("trust_remote_code", False)
    if read_json(name, "processor_config.json", download) is None:
        found = recognise(name, download, base_model=kwargs.get("base_model"))
        if found.layout == "adapter":
            dropped = ("base_model", "revision", "subfolder")
            kwargs = {key: value for key, value in kwargs.items() if key not in dropped}
            return load_processor(load_upstream, found.base, **kwargs)
        if found.layout in ("original", AnyLlavaConfig.model_type):
            kwargs = {key: value for key, value in kwargs.items() if key not in ("config", "trust_remote_code")}
            return AnyLlavaProcessor.from_pretrained(name, **kwargs)
    return load_upstream(name, **kwargs)


def _warn_of_other_versions() -> None:
    """Say once that this version of transformers is not tested."""
    if not FIRST <= VERSION <= LAST:
        first, last = (".".join(map(str, version)) for version in (FIRST, LAST))
        logger.warning_once(
            f"got transformers {transformers.__version__}; AnyLLaVA is tested with {first} to {last}: if something "
            f"fails, pip install 'transformers>={first},<={last}.99'"
        )


def register_classes() -> None:
    """Register with the Auto classes; calling it again changes nothing."""
    _warn_of_other_versions()
    AutoModel.register(AnyLlavaConfig, AnyLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(AnyLlavaConfig, AnyLlavaForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(AnyLlavaConfig, AnyLlavaForConditionalGeneration, exist_ok=True)
    # Where torchvision is installed, transformers takes the entry of that name unless it is asked for another.
    image_processors = {
        "pil": AnyLlavaImageProcessorPil,
        **dict.fromkeys(("torch", "torchvision"), AnyLlavaImageProcessor),
    }
    AutoImageProcessor.register(AnyLlavaConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoProcessor.register(AnyLlavaConfig, AnyLlavaProcessor, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto_class.register(AnyLlavaConfig, NoCausalLM, exist_ok=True)


register_classes()
