"""From raw conversations and pictures to tensors; holds no weights.

What is surprising: names are imported when they are asked for, since `import modeling_llava` needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.collator import LlavaDataCollator as LlavaDataCollator
    from .data.image_urls import UrlPolicy as UrlPolicy
    from .image_limits import ImageLimits as ImageLimits
    from .image_loading import load_image as load_image
    from .image_processing_fast import AnyLlavaImageProcessor as AnyLlavaImageProcessor
    from .image_processing_llava import AnyLlavaImageProcessorPil as AnyLlavaImageProcessorPil
    from .processing_llava import AnyLlavaProcessor as AnyLlavaProcessor

_MODULES = {
    "AnyLlavaImageProcessor": "image_processing_fast",
    "AnyLlavaImageProcessorPil": "image_processing_llava",
    "AnyLlavaProcessor": "processing_llava",
    "ImageLimits": "image_limits",
    "LlavaDataCollator": "data.collator",
    "UrlPolicy": "data.image_urls",
    "load_image": "image_loading",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
