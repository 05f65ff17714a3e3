"""Makes AnyLLaVA known to transformers without loading its classes, which takes as long as `import torch` does.

Configurations and the names of classes are registered here. Importing `auto.py` registers the classes: that happens
when a configuration of ours is read, a processor is loaded, or one of our names is taken from `transformers`.

What is surprising: registering is not enough. TRL and `transformers serve` look classes up as attributes of the
`transformers` module or in its tables of names, and there can be two `transformers` modules at once, because
importing `transformers.processing_utils` executes the package a second time.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import transformers
import transformers.models.auto
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from processing_llava.original.model_types import TEXT_MODEL_OF_TYPE, TRANSFORMERS_CONFIGS

MODEL_TYPE = "any_llava"
_CLASS, _BASE = "AnyLlavaForConditionalGeneration", "AnyLlavaModel"
EXPORTED = (
    "AnyLlavaConfig", _BASE, _CLASS, "AnyLlavaProcessor", "AnyLlavaImageProcessor", "AnyLlavaImageProcessorPil",
    "AutoModelForVision2Seq",
)  # fmt: skip
"""What `transformers` has under the same name."""


def load_classes() -> ModuleType:
    """The module that has all that is exported, with its classes registered."""
    return import_module("modeling_llava.auto")


def build_dispatch_config(model_type: str) -> type[PreTrainedConfig]:
    """A configuration class for our model_type or one of the original LLaVA, as which AutoConfig reads a config.json.

    It becomes an AnyLlavaConfig. For a model_type that transformers knows too ("llava"), every use but an original
    config.json gives transformers' own class.
    """
    built_in = TRANSFORMERS_CONFIGS.get(model_type)

    class DispatchConfig(built_in or PreTrainedConfig):
        def __new__(cls, *args, **kwargs) -> PreTrainedConfig:
            return (built_in or load_classes().AnyLlavaConfig)(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> PreTrainedConfig:
            return load_classes().read_config(model_type, config_dict, **kwargs)

    DispatchConfig.model_type = model_type
    return DispatchConfig


def _load_exported(name: str) -> Any:
    # A module's own `__getattr__` (PEP 562), which Python asks before the one of transformers' class of lazy modules.
    if name not in EXPORTED:
        raise AttributeError(f"module 'transformers' has no attribute {name!r}")
    return getattr(load_classes(), name)


def _export() -> None:
    """Give our names to every module object called "transformers" that some module holds: users may have imported the
    one that is no longer in sys.modules."""
    modules = [module for module in list(sys.modules.values()) if issubclass(type(module), ModuleType)]
    held = [value for module in modules for value in list(vars(module).values()) if type(value) is type(transformers)]
    for module in (transformers, *modules, *held):
        if module.__name__ == "transformers":
            module.__getattr__ = _load_exported
    transformers.models.auto.__getattr__ = modeling_auto.__getattr__ = _load_exported


def _load_before_processors(module: ModuleType) -> None:
    load_upstream = module.AutoProcessor.from_pretrained

    @functools.wraps(load_upstream)
    def load(pretrained_model_name_or_path: str, **kwargs) -> Any:
        return load_classes().load_processor(load_upstream, pretrained_model_name_or_path, **kwargs)

    module.AutoProcessor.from_pretrained = load


def _load_before_image_processors(module: ModuleType) -> None:
    load_upstream = module.AutoImageProcessor.from_pretrained

    @functools.wraps(load_upstream)
    def load(*args, **kwargs) -> Any:
        load_classes()
        return load_upstream(*args, **kwargs)

    module.AutoImageProcessor.from_pretrained = load


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "transformers.processing_utils": lambda module: _export(),
    "transformers.models.auto.processing_auto": _load_before_processors,
    "transformers.models.auto.image_processing_auto": _load_before_image_processors,
}
"""What is done to modules of transformers that take two seconds to import, when somebody has imported them."""


class _AfterImport:
    """A finder of `sys.meta_path` that has a module changed as soon as it was executed."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _AFTER_IMPORT:
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            _AFTER_IMPORT[name](module)

        spec.loader.exec_module = execute_and_change
        return spec


def register() -> None:
    """Register with transformers what needs no class of a model."""
    for model_type in (MODEL_TYPE, *TEXT_MODEL_OF_TYPE):
        AutoConfig.register(model_type, build_dispatch_config(model_type), exist_ok=True)
    modeling_auto.MODEL_MAPPING_NAMES[MODEL_TYPE] = _BASE
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[MODEL_TYPE] = _CLASS
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[MODEL_TYPE] = _CLASS
    _export()
    sys.meta_path.insert(0, _AfterImport)
    for name, change in _AFTER_IMPORT.items():
        if name in sys.modules:
            change(sys.modules[name])
