"""From raw conversations and pictures to tensors; holds no weights."""

from .image_limits import ImageLimits
from .image_loading import load_image
from .image_processing_fast import AnyLlavaImageProcessor
from .image_processing_llava import AnyLlavaImageProcessorPil
from .processing_llava import AnyLlavaProcessor

# isort: split
from .data.collator import LlavaDataCollator
from .data.image_urls import UrlPolicy

__all__ = [
    "AnyLlavaImageProcessor",
    "AnyLlavaImageProcessorPil",
    "AnyLlavaProcessor",
    "ImageLimits",
    "LlavaDataCollator",
    "UrlPolicy",
    "load_image",
]
