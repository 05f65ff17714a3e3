"""Weights of a folder or Hub repository, by name, unread until they are needed; and what is wrong with a file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modeling_llava.acceleration.devices import release_mapped
from processing_llava.config_fields import DTYPES
from processing_llava.messages import shorten
from processing_llava.original.file_checks import find_file, read_json

from .torch_files import load_torch_file

MAX_HEADER_BYTES = 2**23
"""Of a safetensors file, about 100 for each weight; safetensors itself reads up to 100 MB (0.8)."""
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a complete model may be stored as; the first that exists is read."""


_SHARD = re.compile(r"[^/\\\0]+\.(safetensors|bin)")
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
    """What holds a weight, in a dtype if it is one, or the name of one."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
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
        for shard in list_shards(name, filename, download):
            shard_path = find_file(name, shard, download)
            if shard_path is None:
                raise ValueError(f"got {path}, which lists {shard}; expected that file beside it: download it again")
            shard_weights = read_file(shard_path)
            for key in weights.keys() & shard_weights.keys():
                if not torch.equal(weights[key].data[...], shard_weights[key].data[...]):
                    raise ValueError(
                        f"got {key} in {shard_path}, and another one in {weights[key].file}; expected it once: "
                        "download them again"
                    )
            weights |= shard_weights
        return weights
    raise ValueError(f"got {name!r} without weights; expected one of {', '.join(MODEL_FILES)}")


def list_shards(name: str, filename: str, download: dict[str, Any]) -> list[str]:
    """The files that an index names, which lie beside it.

    Raises:
        ValueError: naming index and file, if it would be read from somewhere else.
    """
    weight_map = read_json(name, filename, download).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"got {name}/{filename} with weight_map={shorten(weight_map)}; expected the file of each weight: download "
            "it again"
        )
    shards = {shard if isinstance(shard, str) else repr(shard) for shard in weight_map.values()}
    for shard in sorted(shards):
        if not _SHARD.fullmatch(shard):
            raise ValueError(
                f"got {name}/{filename}, which names {shorten(shard)}; expected a .safetensors or .bin file beside "
                "it: download it again"
            )
    return sorted(shards)


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


def refuse_needless_bits(name: str, config: dict[str, Any], weights: dict[str, Weight]) -> None:
    """Refuse a config.json that says how weights in few bits are to be read, where all are stored whole.

    Raises:
        ValueError: naming the field.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    is_stored = any(
        key.rsplit(".", 1)[-1] in QUANTIZED_PARTS or str(weight.dtype).removeprefix("torch.") not in DTYPES
        for key, weight in weights.items()
    )
    if not is_stored:
        raise ValueError(
            f"got quantization_config={shorten(quantization)} in {name}/config.json, and weights of which none is "
            "stored in fewer bits; expected neither: take the field out, and load it with quantization= instead"
        )


def refuse_integers(name: str, weights: dict[str, Weight]) -> None:
    """Refuse integers where a model computes with floating-point weights: their scale is missing.

    Raises:
        ValueError: naming file and weight.
    """
    for weight in weights.values():
        is_computed_with = weight.key.endswith((".weight", ".bias", "image_newline")) or ".lora_" in weight.key
        if is_computed_with and not weight.dtype.is_floating_point:
            raise ValueError(
                f"got {weight.key} in {weight.file}, of {weight.dtype}; expected 16 or 32 bits, since nothing in "
                f"{name} says how to scale it: take the unquantized checkpoint"
            )


def refuse_infinite(weights: dict[str, Weight]) -> None:
    """Refuse weights that hold NaN or infinite values, with which a model answers nothing or noise.

    Raises:
        ValueError: naming file and weight.
    """
    for weight in weights.values():
        values = weight.data[...]
        if values.is_floating_point() and not values.float().isfinite().all():
            raise ValueError(
                f"got {weight.key} in {weight.file} with NaN or infinite values; expected finite ones: the training "
                "that wrote it failed, or the file is damaged"
            )


def read_file(path: str) -> dict[str, Weight]:
    """The weights of one file; torch files are read without running any code in them.

    Raises:
        ValueError: naming the file, if it is damaged or holds anything but tensors.
    """
    return {key: Weight(path, key, data) for key, data in _read_pairs(path)}


def _read_pairs(path: str) -> Iterator[tuple[str, Any]]:
    if not path.endswith(".safetensors"):
        yield from load_torch_file(path).items()
        return
    try:
        _check_header(path)
        # The slices keep the file open.
        file = safe_open(path, framework="pt")
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            yield key, file.get_slice(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"got {path}, which is damaged ({' '.join(str(error).split())}); expected a whole file: download it again"
        ) from error


def _check_header(path: str) -> None:
    """Refuse a header that takes much more memory than any model needs, before safetensors reads it.

    Raises:
        SafetensorError: with its size.
    """
    with open(path, "rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > MAX_HEADER_BYTES:
        raise SafetensorError(f"a header of {num_bytes:,} bytes, of at most {MAX_HEADER_BYTES:,}")


def find_base_dtype(weights: dict[str, Weight]) -> torch.dtype:
    """The floating type that the language model is stored in."""
    return next(weight.dtype for weight in weights.values() if weight.dtype.is_floating_point)
