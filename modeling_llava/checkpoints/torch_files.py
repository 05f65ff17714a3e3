"""Weights in files of torch.save, read without running code, and in memory that the size of the file bounds.

torch.load(weights_only=True) runs no code, but makes whatever a pickle of a few bytes asks for: arrays of bytes of any
size, entries of the zip file that inflate, tensors of any shape on a storage of one number (torch 2.13,
_weights_only_unpickler.py). So the pickle is looked through before, and its tensors after.
"""

import io
import os
import pickle
import pickletools
import re
import zipfile
from typing import Any, BinaryIO

import torch

from processing_llava.messages import shorten

MAX_PICKLE_BYTES = 2**21
MAX_STEPS = 500_000
"""Most operations of a pickle; a tensor takes about 40."""
_GLOBALS = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|"
    r"torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2"
)
"""What a pickle of weights is made of: module and name."""
_LEGACY_PICKLES = 5
"""What a file from before torch 1.6 begins with: magic number, version, system, content, and names of storages."""


def load_torch_file(path: str) -> dict[str, torch.Tensor]:
    """The weights of a file of torch.save; mapped, unless it is from before torch 1.6.

    Raises:
        ValueError: naming the file, if it is damaged, holds anything but tensors, or more than its bytes.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        _check_pickle(path, is_zip=is_zip)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"got {path}, which holds more than tensors and would run code; expected tensors only: ask its author for "
            "safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"got {path}, which is damaged ({reason}); expected a whole file: download it again"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"got {path}, which is no dict of tensors; expected the weights of a model")
    _check_tensors(path, content)
    return content


def _check_pickle(path: str, *, is_zip: bool) -> None:
    """Look through the pickle of a file without making anything of it.

    Raises:
        pickle.UnpicklingError: if it is made of anything but tensors.
        ValueError: if it is too large, or compressed.
    """
    if not is_zip:
        with open(path, "rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _check_steps(file)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(f"{entry.filename} is compressed, which torch.save does not do")
            if entry.filename.endswith(".pkl"):
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes of at most {MAX_PICKLE_BYTES:,}")
                _check_steps(io.BytesIO(archive.read(entry)))


def _check_steps(file: BinaryIO) -> None:
    for step, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name == "GLOBAL" and not _GLOBALS.fullmatch(argument):
            raise pickle.UnpicklingError(argument)
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(operation.name)
        if step > MAX_STEPS:
            raise ValueError(f"a pickle of more than {MAX_STEPS:,} operations")


def _check_tensors(path: str, content: dict[Any, torch.Tensor]) -> None:
    """Refuse tensors that stand for more than is stored.

    Raises:
        ValueError: naming file and weight.
    """
    total, num_stored = 0, os.path.getsize(path)
    for key, tensor in content.items():
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not isinstance(key, str) or not is_plain or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(
                f"got {shorten(key)} in {path}, which is no dense tensor by a name; expected the weights of a model"
            )
        num_bytes = tensor.numel() * tensor.itemsize
        total += num_bytes
        # Two names may share one tensor, as input and output embeddings do.
        if num_bytes > tensor.untyped_storage().nbytes() or total > 2 * num_stored:
            raise ValueError(
                f"got {key} of shape {list(tensor.shape)} in {path}, a file of {num_stored:,} bytes that holds less; "
                "expected one storage for each weight: save them again"
            )
