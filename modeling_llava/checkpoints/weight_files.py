"""Weights of a folder or Hub repository, by name, unread until they are needed; and what is wrong with a file."""

import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modeling_llava.acceleration.devices import release_mapped
from processing_llava.original.original_folder import find_file, read_json

MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a complete model may be stored as; the first that exists is read."""


COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""How the names of buffers end that old checkpoints hold."""
QUANTIZED_PARTS = {
    "qweight": "AWQ or GPTQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or FP8",
    "weight_scale_inv": "FP8",
    "W_q": "HQQ",
}
"""What stands beside or instead of a weight of fewer bits: the last part of its name, and who writes it."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a file."""

    file: str
    key: str
    """Its name in the file."""
    data: Any
    """A tensor, or a slice of a safetensors file; `data[...]` is the tensor."""

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape) if isinstance(self.data, torch.Tensor) else self.data.get_shape()

    @property
    def dtype(self) -> torch.dtype:
        if isinstance(self.data, torch.Tensor):
            return self.data.dtype
        return self.data[:0].dtype if self.shape else self.data[...].dtype


class Sum:
    """A delta plus its base, added when it is read. Rows that the base does not have are those of the delta."""

    def __init__(self, delta: Weight, base: Weight) -> None:
        self.delta, self.base = delta, base

    def get_shape(self) -> list[int]:
        return self.delta.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        total, base = self.delta.data[...].clone(), self.base.data[...]
        total[: len(base)] += base
        return total[index]


class Cast:
    """A weight in another dtype, converted when it is read; a mapped file gives its memory back at once."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def get_shape(self) -> list[int]:
        return self.weight.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        stored = self.weight.data[...]
        converted = stored.to(self.dtype)
        release_mapped([stored])
        return converted[index]


def read_as(weight: Weight, dtype: Any) -> Any:
    """What holds a weight, in a dtype if it is one."""
    is_other = isinstance(dtype, torch.dtype) and weight.dtype.is_floating_point and weight.dtype != dtype
    return Cast(weight, dtype) if is_other else weight.data


def has_model(name: str, download: dict[str, Any]) -> bool:
    """Whether there is a complete model."""
    return any(find_file(name, filename, download) for filename in MODEL_FILES)


def read_model(name: str, download: dict[str, Any]) -> dict[str, Weight]:
    """The weights of a complete model, safetensors or torch files, in one file or in shards.

    Raises:
        ValueError: naming the file that is missing or cannot be read.
    """
    for filename in MODEL_FILES:
        path = find_file(name, filename, download)
        if path is None:
            continue
        if not filename.endswith(".index.json"):
            return read_file(path)
        weights: dict[str, Weight] = {}
        for shard in sorted(set(read_json(name, filename, download)["weight_map"].values())):
            shard_path = find_file(name, shard, download)
            if shard_path is None:
                raise ValueError(f"got {path}, which lists {shard}; expected that file beside it: download it again")
            weights |= read_file(shard_path)
        return weights
    raise ValueError(f"got {name!r} without weights; expected one of {', '.join(MODEL_FILES)}")


def refuse_quantized(name: str, config: dict[str, Any] | None, weights: dict[str, Weight]) -> None:
    """Refuse a model whose weights are stored in fewer bits, under names and in shapes that are not the model's.

    Args:
        name: Folder or Hub id.
        config: Its config.json.
        weights: Its weights by name; may be left empty where the configuration tells.

    Raises:
        ValueError: naming who wrote it.
    """
    quantization = (config or {}).get("quantization_config")
    method = quantization.get("quant_method", "in an unknown way") if isinstance(quantization, dict) else None
    for key, weight in weights.items():
        if method is None and (part := key.rsplit(".", 1)[-1]) in QUANTIZED_PARTS:
            method = f"{QUANTIZED_PARTS[part]}, as {weight.key} in {weight.file} says"
    if method is not None:
        raise ValueError(
            f"got {name}, whose weights are stored quantized ({method}); expected them in 16 or 32 bits: take the "
            "unquantized checkpoint, and quantization= or quantization_config= to load it in fewer bits"
        )
    refuse_integers(name, weights)


def refuse_integers(name: str, weights: dict[str, Weight]) -> None:
    """Refuse integers where a model computes with floating-point weights: their scale is missing.

    Raises:
        ValueError: naming file and weight.
    """
    for weight in weights.values():
        if not weight.dtype.is_floating_point and weight.key.endswith((".weight", ".bias", "image_newline")):
            raise ValueError(
                f"got {weight.key} in {weight.file}, of {weight.dtype}; expected 16 or 32 bits, since nothing in "
                f"{name} says how to scale it: take the unquantized checkpoint"
            )


def refuse_unfit_weights(found: dict[str, Any], weights: dict[str, Weight], name: str) -> None:
    """Refuse a model or adapter of which a part was not loaded, or weights that have no place.

    Args:
        found: `mismatched_keys` (name, found and expected shape), `missing_keys` and `unexpected_keys`, as
            transformers reports them.
        weights: What was read, by the names in `found` as far as they are the same.
        name: Folder or Hub id.

    Raises:
        ValueError: naming file, weight and shapes.
    """

    def place(key: str) -> str:
        return f"{weights[key].key} in {weights[key].file}" if key in weights else f"{key} in {name}"

    for key, shape, expected in sorted(found["mismatched_keys"]):
        stored = weights[key].key if key in weights else key
        where = weights[key].file if key in weights else name
        raise ValueError(
            f"got {stored} of shape {list(shape)} in {where}; expected {list(expected)} as the configuration of the "
            f"model says: this weight belongs to another model than {name}"
        )
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise ValueError(
            f"got {name} without {len(missing)} weights, {missing[0]} among them; expected all: a file is incomplete "
            "or of another model"
        )
    if unexpected:
        raise ValueError(
            f"got {len(unexpected)} weights without a place in the model, {place(unexpected[0])} among them; expected "
            "those of this architecture alone: they are of another model"
        )


def read_file(path: str) -> dict[str, Weight]:
    """The weights of one file; torch files are read without running any code in them.

    Raises:
        ValueError: naming the file, if it is damaged or holds anything but tensors.
    """
    return {key: Weight(path, key, data) for key, data in _read_pairs(path)}


def _read_pairs(path: str) -> Iterator[tuple[str, Any]]:
    if path.endswith(".safetensors"):
        try:
            # The slices keep the file open.
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"got {path}, which is damaged ({error}); expected a whole file: download it again"
            ) from error
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            yield key, file.get_slice(key)
        return
    try:
        content = _load_torch_file(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"got {path}, which holds more than tensors and would run code; expected tensors only: ask its author for "
            "safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"got {path}, which is damaged ({reason}); expected a whole file: download it again"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"got {path}, which is no dict of tensors; expected the weights of a model")
    yield from content.items()


def _load_torch_file(path: str) -> Any:
    # Files from before torch 1.6 are no zip archives and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def find_base_dtype(weights: dict[str, Weight]) -> torch.dtype:
    """The floating type that the language model is stored in."""
    return next(weight.dtype for weight in weights.values() if weight.dtype.is_floating_point)
