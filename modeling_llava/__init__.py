"""AnyLLaVA: the LLaVA family as first-class models of transformers.

Importing this package makes its classes known to the Auto classes and restores `transformers.AutoModelForVision2Seq`.

What is surprising: the classes themselves are imported when they are asked for, since what they build on takes twice
the time of `import torch, transformers`.
"""

from typing import TYPE_CHECKING, Any

from .registration import load_classes, register

if TYPE_CHECKING:
    from .auto import AutoModelForVision2Seq
    from .configuration_llava import AnyLlavaConfig
    from .modeling_llava import AnyLlavaForConditionalGeneration, AnyLlavaModel

__all__ = ["AnyLlavaConfig", "AnyLlavaForConditionalGeneration", "AnyLlavaModel", "AutoModelForVision2Seq"]

register()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(load_classes(), name)
