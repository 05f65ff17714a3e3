"""`from_pretrained(..., quantization="int8")`: fewer bits for the language model, chosen by one name.

Vision tower, projector and output layer stay as they are: they take a small part of the time, and their errors reach
every answer. On a GPU the work is done by torchao and bitsandbytes, through transformers. On a CPU int8 is our own
(`cpu_layers.py`, `fused_layers.py`).
"""

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .cpu_layers import Int8Linear
from .devices import release_mapped, returning_memory
from .fused_layers import ATTENTIONS, MLPS, fuse_projections

KEPT_MODULES = ["model.vision_tower", "model.mm_projector", "lm_head"]


def _build_int4() -> QuantizationConfigMixin:
    from torchao.quantization import Int4WeightOnlyConfig

    # The layout of torch's own kernel: torchao's default needs a further package.
    weights = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(weights, modules_to_not_convert=KEPT_MODULES)


def _build_fp8() -> QuantizationConfigMixin:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    weights = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    return TorchAoConfig(weights, modules_to_not_convert=KEPT_MODULES)


def four_bit_config() -> BitsAndBytesConfig:
    """QLoRA's 4-bit weights for the language model; tower, projector and output layer stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        llm_int8_skip_modules=KEPT_MODULES,
    )


ON_CPU = "int8"
"""The name for CPUs: 8 bits, with a scale for each output channel of the weights and each row of the inputs."""
ON_GPU: dict[str, tuple[str, Callable[[], QuantizationConfigMixin]]] = {
    "int4": ("torchao", _build_int4),
    "fp8": ("torchao", _build_fp8),
    "nf4": ("bitsandbytes", four_bit_config),
}
"""Name to package and settings: weights of 4 bits; weights and inputs in float8, for which a GPU needs units (Ada,
Hopper and later); QLoRA's weights of 4 bits."""


def check_quantization(quantization: str, device: torch.device) -> None:
    """Refuse a name that a device cannot run.

    Raises:
        ValueError: with the names that it can run.
    """
    expected = (ON_CPU,) if device.type == "cpu" else tuple(ON_GPU)
    if quantization not in expected:
        raise ValueError(f"got quantization={quantization!r} on {device}; expected {' or '.join(expected)}")


def with_quantization(settings: dict[str, Any], quantization: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a name.

    Raises:
        ValueError: for another name, an argument that contradicts it, or a device that cannot run it.
        ImportError: if a package is missing.
    """
    if quantization not in (ON_CPU, *ON_GPU):
        names = ", ".join((ON_CPU, *ON_GPU))
        raise ValueError(f"got quantization={quantization!r}; expected one of {names}")
    for name in ("dtype", "torch_dtype", "quantization_config"):
        if settings.get(name) is not None:
            raise ValueError(f"got quantization={quantization!r} and {name}; expected no {name}: the name settles it")
    if quantization == ON_CPU:
        if settings.get("device_map") is not None:
            raise ValueError(
                "got quantization='int8' and a device_map; expected no device_map, as int8 runs on the CPU: on a GPU "
                f"choose one of {', '.join(ON_GPU)}"
            )
        # The weights are rounded from the dtype that they have, so that there is never a whole copy in float32.
        return settings | {"dtype": "auto"}
    package, build_config = ON_GPU[quantization]
    if not torch.cuda.is_available():
        raise ValueError(
            f"got quantization={quantization!r} on a machine without CUDA; expected a GPU: on a CPU choose int8"
        )
    for needed in (package, "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ImportError(f"{needed} is needed for quantization={quantization!r}; pip install {needed}")
    return {"device_map": "cuda"} | settings | {"quantization_config": build_config(), "dtype": torch.bfloat16}


def refuse_unchanged(model: PreTrainedModel, quantization: str) -> None:
    """Refuse a model of which no layer was quantized, because the kernels take none of its widths.

    Raises:
        ValueError: naming it.
    """
    layers = [layer for layer in model.base_model.language_model.modules() if isinstance(layer, nn.Linear)]
    if all(type(layer) is nn.Linear and type(layer.weight.data) is torch.Tensor for layer in layers):
        raise ValueError(
            f"got quantization={quantization!r} for a model of which no layer has a width that it takes; expected "
            "multiples of 128: leave quantization out, or take another"
        )


@returning_memory()
def quantize_to_int8(model: PreTrainedModel) -> None:
    """Give a language model fused projections with int8 weights, in place; everything else becomes float32.

    Raises:
        ValueError: if the model has an adapter, or PyTorch no kernels.
    """
    if torch.backends.quantized.engine == "none":
        raise ValueError("got a PyTorch without int8 kernels; expected one with fbgemm or qnnpack: leave int8 out")
    if model._hf_peft_config_loaded:
        raise ValueError("got quantization='int8' and merge_adapter=False; expected a merged adapter")
    language_model = model.base_model.language_model
    # Beside the result there is never more than a block for each thread in the dtype of the files.
    blocks = [module for module in language_model.modules() if type(module) in ATTENTIONS + MLPS]
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(_quantize_block, blocks))
    torch.set_num_threads(num_threads)
    _replace_linears(language_model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            stored, tensor.data = tensor.data, tensor.data.float()
            release_mapped([stored])
    model.config.dtype = torch.float32


def _quantize_block(block: nn.Module) -> None:
    stored = [module.weight.data for module in block.modules() if type(module) is nn.Linear]
    fuse_projections(block)
    release_mapped(stored)
    _replace_linears(block)


def _replace_linears(module: nn.Module) -> None:
    # Names alone: in a list of modules, the old weights of each would live until the end.
    for name in [name for name, inner in module.named_modules() if type(inner) is nn.Linear]:
        inner = module.get_submodule(name)
        module.set_submodule(name, Int8Linear(inner))
        release_mapped([inner.weight.data])
