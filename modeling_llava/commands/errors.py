"""Mistakes of a user, each as one line."""

import re

from jinja2 import TemplateError
from safetensors import SafetensorError

from modeling_llava.records.yaml_fields import ACCESS_TOKEN

PATH_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors that a path of a user can cause."""

USER_ERRORS = (ValueError, TemplateError, SafetensorError, *PATH_ERRORS)

EXTRAS = {
    "trl": "'anyllava[train]'",
    "peft": "'anyllava[train]'",
    "datasets": "'anyllava[train]'",
    "accelerate": "'anyllava[train]'",
    "matplotlib": "'anyllava[train]'",
    "pyarrow": "'anyllava[train]'",
    "gradio": "'anyllava[demo]'",
    "gradio_client": "'anyllava[demo]'",
    "starlette": "'anyllava[demo]'",
    "llguidance": "'anyllava[serve]'",
    "prometheus_client": "'anyllava[serve]'",
    "uvicorn": "'anyllava[serve]'",
    "spaces": "spaces",
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "deepspeed",
    "gguf": "'anyllava[gguf]'",
    "vllm": "'anyllava[vllm]'",
    "fastapi": "'transformers[serving]'",
    "torchao": "torchao",
}
"""Packages that a command may need, and the argument of pip that installs them."""


def explain(error: Exception) -> str:
    """One line for a mistake of a user.

    Raises:
        Exception: as it was given, if it is a fault of ours.
    """
    if isinstance(error, USER_ERRORS):
        return one_line(error)
    if isinstance(error, ImportError):
        return missing_extra(error)
    raise error


def missing_extra(error: ImportError) -> str:
    """One line that names a missing package; one that no command may need is an error of ours.

    Raises:
        ImportError: as it was given.
    """
    if not isinstance(error, ModuleNotFoundError):
        # transformers and this package name the package, and how to install it, in a plain ImportError.
        return one_line(error)
    # Where the name belongs is a sentence (transformers 5.23, utils/versions.py): "The 'deepspeed>=0.9.3' distribution
    # was not found".
    package = re.match(r"(?:The ')?([\w-]*)", error.name or "")[1]
    if package not in EXTRAS:
        raise error
    return f"{package} is not installed; this command needs it: pip install {EXTRAS[package]}"


def one_line(error: Exception) -> str:
    """The message of an error without line breaks and without tokens."""
    text = ACCESS_TOKEN.sub("hf_...", str(error))
    if isinstance(error, SafetensorError):
        text = f"got weights that cannot be read ({text}); expected whole files: copy or download the model again"
    if "Original Traceback" in text:
        # A worker of a data loader sends its whole traceback (torch 2.13, _utils.py); the last line has the error.
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    return " ".join(text.split())
