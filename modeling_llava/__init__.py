"""AnyLLaVA: the LLaVA family as first-class models of transformers.

Importing this package registers its classes with the Auto classes and restores `AutoModelForVision2Seq`.
"""

from .auto import AutoModelForVision2Seq, register
from .configuration_llava import AnyLlavaConfig
from .modeling_llava import AnyLlavaForConditionalGeneration, AnyLlavaModel

register()

__all__ = ["AnyLlavaConfig", "AnyLlavaForConditionalGeneration", "AnyLlavaModel", "AutoModelForVision2Seq"]
