"""Where versions of transformers differ, from 5.17 to 5.24: each difference once, with the version that made it.

Private names of transformers that are used elsewhere stand in `tests/upstream_names.py`, with the signatures that they
have in each version.
"""

from typing import Any

import transformers
from transformers import PreTrainedModel

# transformers 5.17 shows a stand-in for it where torchvision is not installed (utils/import_utils.py there).
from transformers.models.auto.image_processing_auto import AutoImageProcessor as AutoImageProcessor

FIRST, LAST = (5, 17), (5, 24)
"""The versions that the tests run with."""
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

KV_CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
"""What models and their outputs call their KV cache. The old name goes at 5.40."""
OTHER_KV_CACHE = "past_key_values" if VERSION >= (5, 24) else "cache"
CAN_PREFILL_IMAGES_IN_CHUNKS = VERSION >= (5, 23)
"""Whether `prefill_chunk_size` gives each chunk of a prompt its own images."""
HAS_OLD_DINOV2_NAMES = VERSION < (5, 18)
"""Whether DINOv2 calls its weights as it was published; models of ours that newer versions wrote have others."""
CHECKPOINTING_FIELD = "activation_checkpointing" if VERSION >= (5, 23) else "gradient_checkpointing"
"""The field of TrainingArguments; from 5.23 on they warn of the old name."""
CAN_CAPTURE_LAYERS = VERSION >= (5, 23)
"""Whether `output_hidden_states` takes a list of layers; before it is only true or false."""


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether activations are computed again in the backward pass; 5.23 renamed the property."""
    return model.is_activation_checkpointing if VERSION >= (5, 23) else model.is_gradient_checkpointing


def pop_replacement_offsets(kwargs: dict[str, Any]) -> bool:
    """The flag `return_text_replacement_offsets` of merged processor arguments, taken out of the tokenizer's.

    5.23 made it an argument of the processor, and keeps it as one of the tokenizer beside it.
    """
    name = "return_text_replacement_offsets"
    wants_offsets = bool(kwargs["text_kwargs"].pop(name, False))
    return wants_offsets or (VERSION >= (5, 23) and bool(kwargs[name]))
