"""Makes AnyLLaVA known to transformers: Auto classes, the tables others read by name, and AutoModelForVision2Seq.

What is surprising: registering is not enough. TRL and `transformers serve` look classes up as attributes of the
`transformers` module or in its tables of names, and there can be two `transformers` modules at once, because
importing `transformers.processing_utils` executes the package a second time.
"""

import gc
from types import ModuleType

import transformers.models.auto
import transformers.processing_utils
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass, auto_class_update

from processing_llava.image_processing_llava import AnyLlavaImageProcessorPil
from processing_llava.processing_llava import AnyLlavaProcessor

from .configuration_llava import AnyLlavaConfig
from .modeling_llava import AnyLlavaForConditionalGeneration, AnyLlavaModel


class AutoModelForVision2Seq(_BaseAutoModelClass):
    """The Auto class that transformers 5 dropped: every image-text-to-text model, built in or registered."""

    # The same object, not a copy: pipelines find registered models through the mapping's back reference.
    _model_mapping = AutoModelForImageTextToText._model_mapping


AutoModelForVision2Seq = auto_class_update(AutoModelForVision2Seq, head_doc="image-text-to-text modeling")

EXPORTED = {
    "AnyLlavaConfig": AnyLlavaConfig,
    "AnyLlavaModel": AnyLlavaModel,
    "AnyLlavaForConditionalGeneration": AnyLlavaForConditionalGeneration,
    "AnyLlavaProcessor": AnyLlavaProcessor,
    "AnyLlavaImageProcessorPil": AnyLlavaImageProcessorPil,
    "AutoModelForVision2Seq": AutoModelForVision2Seq,
}


def register() -> None:
    """Register with transformers; calling it again changes nothing."""
    model_type = AnyLlavaConfig.model_type
    AutoConfig.register(model_type, AnyLlavaConfig, exist_ok=True)
    AutoModel.register(AnyLlavaConfig, AnyLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(AnyLlavaConfig, AnyLlavaForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(AnyLlavaConfig, AnyLlavaForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        AnyLlavaConfig, image_processor_classes={"pil": AnyLlavaImageProcessorPil}, exist_ok=True
    )
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
