"""The chat template of each conversation format, by the name that the original LLaVA gives it.

What is stored in a checkpoint is the text that `load_template` returns: plain Jinja that transformers renders without
this package. Answers, with the space before and the end token after them, stand inside `{% generation %}`: that is
what is trained on.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

TEMPLATE_FILES = {
    "default": "llava_v0",
    "v0": "llava_v0",
    "llava_v0": "llava_v0",
    "v0_mmtag": "v0_mmtag",
    "v1": "vicuna_v1",
    "vicuna_v1": "vicuna_v1",
    "llava_v1": "llava_v1",
    "v1_mmtag": "v1_mmtag",
    "llama_2": "llama_2",
    "llava_llama_2": "llava_llama_2",
    "mistral_instruct": "mistral_instruct",
    "mpt": "mpt",
    "chatml_direct": "chatml_direct",
    "mistral_direct": "chatml_direct",
    "plain": "plain",
    "v0_plain": "plain",
    "llama_3": "llama_3",
    "llava_llama_3": "llama_3",
    "gemma": "gemma",
    "gemma_instruct": "gemma",
    "phi_3": "phi_3",
    "qwen": "qwen",
    "qwen_1_5": "qwen",
    "qwen_2": "qwen",
}
"""Format name to file of `templates/`. Names with one file are written alike by the original, byte for byte."""

_IMAGE_TEXT = re.compile(r'\{%- set image_text = ("(?:[^"\\]|\\.)*") -%\}')
_FOLDER = Path(__file__).parent


@lru_cache
def load_template(name: str, *, image: str = "<image>") -> str:
    """The chat template of a conversation format.

    Args:
        name: A key of `TEMPLATE_FILES`.
        image: Text that is written for an image; `<im_start><image><im_end>` for checkpoints with start and end
            tokens.

    Returns:
        Jinja text that needs nothing beside transformers' own renderer.

    Raises:
        ValueError: there is no such format.
    """
    if name not in TEMPLATE_FILES:
        raise ValueError(f"got conversation format {name!r}; expected one of {', '.join(sorted(TEMPLATE_FILES))}")
    shared = (_FOLDER / "_content.jinja").read_text(encoding="utf-8")
    own = (_FOLDER / f"{TEMPLATE_FILES[name]}.jinja").read_text(encoding="utf-8")
    return f"{{%- set image_text = {json.dumps(image)} -%}}\n{shared}{own}"


def change_template(stored: str | None, name: str) -> str:
    """The chat template of another conversation format, for a model that was trained with the stored one.

    It writes the same for an image: start and end tokens belong to the model, and not to the format.

    Raises:
        ValueError: as `load_template`.
    """
    image_text = _IMAGE_TEXT.match(stored or "")
    return load_template(name) if image_text is None else load_template(name, image=json.loads(image_text[1]))
