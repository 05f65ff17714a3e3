"""What the fields of a stored config.json meant to the version of transformers that wrote it.

A checkpoint keeps the meaning that it had when it was stored; where a later version reads the same fields otherwise,
`transformers_version` decides. A file that does not say its version means what it means today.
"""

import re
from typing import Any

_VERSION = re.compile(r"v?(\d+)(?:\.(\d+))?")
SCALED_EVERY_EMBEDDING = {"gemma", "gemma2"}
"""Text models that multiplied every input embedding by sqrt(hidden_size), image features included, before
transformers 5.4 (models/gemma/modeling_gemma.py); since then their embedding table does it, for tokens alone."""


def is_older(raw: dict[str, Any], *version: int) -> bool:
    """Whether the content of a config.json was written by a transformers below (major, minor)."""
    found = _VERSION.match(str(raw.get("transformers_version") or ""))
    return found is not None and tuple(map(int, found.groups(default="0"))) < version


def read_old_activation(raw: dict[str, Any], text_fields: dict[str, Any]) -> dict[str, str]:
    """`hidden_act` of a text model with these fields, if the version that wrote them read it otherwise.

    Gemma's first configurations say "gelu" where its tanh approximation is meant. transformers 4.39 to 4.47 ignored
    `hidden_act` for `hidden_activation`, which was that approximation where it was missing; all others computed "gelu"
    as it says, until 5.18 took it for the approximation.
    """
    if text_fields.get("model_type") != "gemma" or not is_older(raw, 5, 18):
        return {}
    if is_older(raw, 4, 48) and not is_older(raw, 4, 39):
        return {"hidden_act": text_fields.get("hidden_activation") or "gelu_pytorch_tanh"}
    # The same function under a name that stays.
    return {"hidden_act": "gelu_python"} if text_fields.get("hidden_act") == "gelu" else {}


def scales_image_features(raw: dict[str, Any], text_model_type: str) -> bool:
    """Whether the language model multiplied image features by sqrt(hidden_size), for transformers' own layout."""
    return text_model_type in SCALED_EVERY_EMBEDDING and is_older(raw, 5, 4)
