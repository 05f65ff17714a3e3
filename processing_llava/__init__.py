"""From raw conversations and pictures to tensors; holds no weights."""

from .image_loading import ImageLimits, load_image
from .image_processing_llava import AnyLlavaImageProcessorPil
from .processing_llava import AnyLlavaProcessor

__all__ = ["AnyLlavaImageProcessorPil", "AnyLlavaProcessor", "ImageLimits", "load_image"]
