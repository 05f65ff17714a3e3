"""`llava doctor`: versions, device, cached models, and the memory that a model needs.

A model that is named needs the memory of an answer (`generation_memory.py`); a number of parameters, that of weights.
"""

import argparse
import importlib.metadata
import platform

import torch
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from modeling_llava.acceleration.devices import count_free_bytes, format_bytes

PACKAGES = ("anyllava", "torch", "transformers", "safetensors", "huggingface_hub", "peft", "trl", "datasets", "gradio")
BYTES_PER_PARAMETER = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


def run_doctor(options: argparse.Namespace) -> None:
    print(
        report(
            num_parameters=options.parameters,
            model=options.model,
            num_images=options.images,
            num_new_tokens=options.new_tokens,
            num_rows=options.rows,
            quantization=options.quantization,
            visual_tokens=options.visual_tokens,
        )
    )


def report(
    *,
    num_parameters: float,
    model: str | None = None,
    num_images: int = 1,
    num_new_tokens: int = 256,
    num_rows: int = 1,
    quantization: str | None = None,
    visual_tokens: int | None = None,
) -> str:
    """The whole report.

    Args:
        num_parameters: Size of a model, whose weights are computed if no model is named.
        model: Folder or Hub id of the model that is to answer.
        num_images: Images in each of its prompts.
        num_new_tokens: Length of each answer.
        num_rows: Number of answers at a time.
        quantization: The same as for `load_for_inference`.
        visual_tokens: The same as for `load_for_inference`.

    Raises:
        ValueError: if there is no such model or quantization, or a number is too small.
    """
    if model is None:
        needs = _memory_needs(num_parameters)
    else:
        needs = _generation_needs(
            model,
            num_images=num_images,
            num_new_tokens=num_new_tokens,
            num_rows=num_rows,
            quantization=quantization,
            visual_tokens=visual_tokens,
        )
    return "\n\n".join([_versions(), _device(), needs, _cached_models()])


def _versions() -> str:
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return "\n".join(lines)


def _device() -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"GPU {torch.cuda.get_device_name()}: {format_bytes(free)} of {format_bytes(total)} free"
    free = count_free_bytes(torch.device("cpu"))
    return f"CPU with {torch.get_num_threads()} threads, {format_bytes(free)} of memory free; no GPU"


def _memory_needs(num_parameters: float) -> str:
    lines = [f"weights of a model with {num_parameters:,.0f} parameters:"]
    lines += [f"  {dtype}: {format_bytes(num_parameters * size)}" for dtype, size in BYTES_PER_PARAMETER.items()]
    return "\n".join(lines)


def _generation_needs(
    model: str,
    *,
    num_images: int,
    num_new_tokens: int,
    num_rows: int,
    quantization: str | None,
    visual_tokens: int | None,
) -> str:
    from modeling_llava.checkpoints.model_names import explain_missing
    from modeling_llava.inference.chat_cache import DEFAULT_MAX_BYTES
    from modeling_llava.inference.generation_memory import (
        predict_generation,
        predict_loading,
        read_config,
    )
    from modeling_llava.inference.loading import Precision, choose_dtype, choose_precision
    from modeling_llava.inference.token_stream import limit_new_tokens

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with explain_missing(model):
        config = read_config(model, visual_tokens=visual_tokens)
    refusal = None
    try:
        precision = choose_precision(config, device, name=model, quantization=quantization)
    except ValueError as error:
        precision, refusal = Precision(choose_dtype(config, device, quantization=quantization), quantization), error
    chosen = {"dtype": precision.dtype, "quantization": precision.quantization}
    needs = predict_generation(
        config, **chosen, num_images=num_images, num_new_tokens=num_new_tokens, num_rows=num_rows
    )
    # A GPU takes each weight as it is read.
    loading = needs.weights
    if device.type == "cpu":
        loading = predict_loading(config, **chosen, num_threads=torch.get_num_threads())
    dtype = str(precision.dtype).removeprefix("torch.")
    free = count_free_bytes(device)
    parts = {
        f"weights in {dtype if precision.quantization is None else f'{precision} and {dtype}'}": needs.weights,
        "largest moment of loading": loading,
        "keys and values of all tokens": needs.cache,
        "activations": needs.activations,
        "together": needs.total,
        "free": free,
    }
    lines = [
        f"{model}, {num_rows} x {needs.num_prompt_tokens} tokens with {num_images} images, answers of "
        f"{num_new_tokens} tokens:"
    ]
    lines += [f"  {name}: {format_bytes(size)}" for name, size in parts.items()]
    try:
        limit_new_tokens(config, num_prompt_tokens=needs.num_prompt_tokens, max_new_tokens=num_new_tokens)
    except ValueError as error:
        refusal = refusal or error
    if refusal is not None:
        return "\n".join([*lines, f"  it does not run: {refusal}"])
    lines.append(f"  it {'fits' if max(loading, needs.total) <= free else 'does not fit'}")
    kept = format_bytes(min(needs.cache, DEFAULT_MAX_BYTES))
    lines.append(f"  a conversation that goes on keeps up to {kept} of keys and values beside")
    return "\n".join(lines)


def _cached_models() -> str:
    try:
        repositories = [repository for repository in scan_cache_dir().repos if repository.repo_type == "model"]
    except CacheNotFound:
        repositories = []
    if not repositories:
        return "no models in the local cache"
    lines = ["models in the local cache:"]
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        lines.append(f"  {repository.repo_id} ({format_bytes(repository.size_on_disk)})")
    return "\n".join(lines)
