"""Makes AnyLLaVA known to transformers: Auto classes, the tables others read by name, and AutoModelForVision2Seq.

What is surprising: registering is not enough. TRL and `transformers serve` look classes up as attributes of the
`transformers` module or in its tables of names, and there can be two `transformers` modules at once, because
importing `transformers.processing_utils` executes the package a second time.
"""

import gc
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers.models.auto
import transformers.processing_utils
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from processing_llava.image_processing_fast import AnyLlavaImageProcessor
from processing_llava.image_processing_llava import AnyLlavaImageProcessorPil
from processing_llava.original_folder import (
    EMBEDDED_NAME,
    TEXT_MODEL_OF_TYPE,
    OriginalFolder,
    find_installed,
    is_original,
)
from processing_llava.processing_llava import AnyLlavaProcessor
from processing_llava.transformers_versions import AutoImageProcessor, warn_of_other_versions

from .configuration_llava import AnyLlavaConfig
from .modeling_llava import AnyLlavaForConditionalGeneration, AnyLlavaModel
from .original_layout import TRANSFORMERS_CONFIGS, translate_config

logger = logging.get_logger(__name__)


class AutoModelForVision2Seq(_BaseAutoModelClass):
    """The Auto class that transformers 5 dropped: every image-text-to-text model, built in or registered."""

    # The same object, not a copy: pipelines find registered models through the mapping's back reference.
    _model_mapping = AutoModelForImageTextToText._model_mapping

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *model_args, **kwargs) -> PreTrainedModel:
        """As in transformers; an original LLaVA is recognised whatever its model_type says."""
        if OriginalFolder.find(str(pretrained_model_name_or_path), **kwargs) is not None:
            kwargs.pop("trust_remote_code", None)
            return AnyLlavaForConditionalGeneration.from_pretrained(
                pretrained_model_name_or_path, *model_args, **kwargs
            )
        adapter = Path(pretrained_model_name_or_path, "adapter_config.json")
        adapter_config = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
        if adapter_config.get("base_model_name_or_path") == EMBEDDED_NAME:
            # transformers would look for that folder from the working directory, and from nowhere else.
            kwargs["adapter_kwargs"] = {"_adapter_model_path": str(pretrained_model_name_or_path)}
            return AnyLlavaForConditionalGeneration.from_pretrained(
                find_installed(EMBEDDED_NAME), *model_args, **kwargs
            )
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)


def build_dispatch_config(model_type: str) -> type[PreTrainedConfig]:
    """A configuration class for a model_type of the original LLaVA, as which AutoConfig reads a config.json.

    An original one becomes an AnyLlavaConfig. For a model_type that transformers knows too ("llava"), every other
    use gives transformers' own class.
    """
    built_in = TRANSFORMERS_CONFIGS.get(model_type)

    class DispatchConfig(built_in or AnyLlavaConfig):
        def __new__(cls, *args, **kwargs) -> PreTrainedConfig:
            return (built_in or AnyLlavaConfig)(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> PreTrainedConfig:
            if built_in is not None and not is_original(config_dict):
                return built_in.from_dict(config_dict, **kwargs)
            name = kwargs.get("name_or_path", config_dict.get("_name_or_path", ""))
            try:
                translated = translate_config(config_dict, **kwargs | {"name": name})
            except ValueError as error:
                # AutoProcessor drops the error and goes on to look for a tokenizer.
                logger.error(str(error))
                raise
            return AnyLlavaConfig.from_dict(translated, **kwargs)

    DispatchConfig.model_type = model_type
    return DispatchConfig


EXPORTED = {
    "AnyLlavaConfig": AnyLlavaConfig,
    "AnyLlavaModel": AnyLlavaModel,
    "AnyLlavaForConditionalGeneration": AnyLlavaForConditionalGeneration,
    "AnyLlavaProcessor": AnyLlavaProcessor,
    "AnyLlavaImageProcessor": AnyLlavaImageProcessor,
    "AnyLlavaImageProcessorPil": AnyLlavaImageProcessorPil,
    "AutoModelForVision2Seq": AutoModelForVision2Seq,
}


def register() -> None:
    """Register with transformers; calling it again changes nothing."""
    warn_of_other_versions()
    model_type = AnyLlavaConfig.model_type
    AutoConfig.register(model_type, AnyLlavaConfig, exist_ok=True)
    for original_type in TEXT_MODEL_OF_TYPE:
        AutoConfig.register(original_type, build_dispatch_config(original_type), exist_ok=True)
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

    class_name = AnyLlavaForConditionalGeneration.__name__
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = AnyLlavaModel.__name__
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type] = class_name
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type] = class_name

    for module in _transformers_modules():
        for name, value in EXPORTED.items():
            setattr(module, name, value)
    transformers.models.auto.AutoModelForVision2Seq = AutoModelForVision2Seq
    modeling_auto.AutoModelForVision2Seq = AutoModelForVision2Seq


def _transformers_modules() -> list[ModuleType]:
    """Every module object called "transformers": users may hold the one that is no longer in sys.modules."""
    # type() and not isinstance(): the latter would run the properties of every object of the process.
    modules = [candidate for candidate in gc.get_objects() if issubclass(type(candidate), ModuleType)]
    return [module for module in modules if module.__name__ == "transformers"]
