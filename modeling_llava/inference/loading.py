"""Loading a LLaVA for answering, and making it fast on its device."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_llava.acceleration.cpu_attention import use_cpu_attention
from modeling_llava.acceleration.cpu_linear import pack_linear_layers
from modeling_llava.acceleration.fused_layers import fuse_norms, fuse_projections
from modeling_llava.checkpoints.shared_values import check_pair
from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from processing_llava.original.original_folder import EMBEDDED_NAME, find_installed
from processing_llava.processing_llava import AnyLlavaProcessor

from .generation_memory import read_config
from .precision import choose_precision, parse_memory

EMBEDDED_MODEL = find_installed(EMBEDDED_NAME)
"""The small LLaVA that ships in this package."""


def load_for_inference(
    name: str = EMBEDDED_MODEL,
    *,
    template: str | None = None,
    base_model: str | None = None,
    vision_tower: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    memory: int | str | None = None,
    visual_tokens: int | None = None,
) -> tuple[AnyLlavaForConditionalGeneration, AnyLlavaProcessor]:
    """Load a LLaVA of any layout and its processor, for answering; of transformers' own layout too, in our class.

    The model is prepared for its device and does nothing but answer: to train it or to save it, load it with
    `AutoModelForVision2Seq.from_pretrained`.

    Args:
        name: Folder or Hub id.
        template: Name of a conversation format to use instead of the one stored with the model.
        base_model: Folder or Hub id of the language model, for a LoRA, projector or delta that does not name its own.
        vision_tower: Folder or Hub id of the tower, instead of the one that an original folder names.
        device: Name of the device; the first GPU by default, or the CPU where there is none.
        dtype: "float32", "bfloat16" or "float16". By default the dtype of the checkpoint, or float32 where a CPU is
            slow in it, if that fits; else bfloat16 on a CPU with units for it, int8, or 4 bits on a GPU.
        quantization: "int4", "fp8" or "nf4" on a GPU, "int8" on a CPU, for the language model.
        memory: Bytes, or a text such as "8GiB", that the model and an answer about one picture may take; what is free
            by default.
        visual_tokens: Most tokens of an image, instead of the number stored with the model; see `AnyLlavaConfig`.

    Raises:
        ValueError: if there is no such model or template, the model or device cannot run what was chosen, or nothing
            fits into the memory.
    """
    name = find_installed(name)
    base = {} if base_model is None else {"base_model": find_installed(base_model)}
    base |= {} if vision_tower is None else {"vision_tower": vision_tower}
    base |= {} if visual_tokens is None else {"visual_tokens": visual_tokens}
    chosen = {} if template is None else {"template": template}
    device = find_device(device)
    memory = parse_memory(memory) if isinstance(memory, str) else memory
    try:
        processor = AnyLlavaProcessor.from_pretrained(name, **chosen, **base)
        config = read_config(name, base_model=base.get("base_model"), vision_tower=vision_tower)
        precision = choose_precision(config, device, name=name, dtype=dtype, quantization=quantization, memory=memory)
        settings = {"dtype": precision.dtype}
        if precision.quantization is not None:
            placement = {} if device.type == "cpu" else {"device_map": device}
            settings = {"quantization": precision.quantization} | placement
        model = AnyLlavaForConditionalGeneration.from_pretrained(name, **base, **settings)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        adapter = Path(name, "adapter_config.json")
        if adapter.is_file():
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            reason = f"it is an adapter of {base!r}, to be found from {str(Path.cwd())!r} or on the Hub ({reason})"
        raise ValueError(f"got model {name!r}; expected a folder or a Hub id of a LLaVA: {reason}") from error
    check_pair(model, processor)
    # Before the model moves: a Space of ZeroGPU cannot compute on its GPU while it loads.
    prepare_for_answering(model, device)
    if precision.quantization is None and device.type != "cpu":
        model = model.to(device)
    return model.eval(), processor


def prepare_for_answering(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """Make a LLaVA answer faster, in place (BENCHMARKS.md, Decoding); afterwards it can only answer.

    Its results change by rounding alone. On a CPU, its weights are packed, and it has attention functions of its own.
    On a GPU, its norms are fused, and so are its projections, unless they are quantized or have an adapter.

    Args:
        model: The model.
        device: Device on which it will answer; its own by default.
    """
    device = model.device if device is None else device
    if device.type == "cpu":
        pack_linear_layers(model)
        use_cpu_attention(model.base_model.language_model)
        use_cpu_attention(model.base_model.vision_tower)
        return
    language_model = model.base_model.language_model
    fuse_norms(language_model)
    if not (getattr(model, "is_quantized", False) or model._hf_peft_config_loaded):
        fuse_projections(language_model)


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; the first GPU by default, or the CPU where there is none.

    Raises:
        ValueError: if this machine does not have it.
    """
    num_gpus = torch.cuda.device_count()
    try:
        found = torch.device(device or ("cuda" if num_gpus else "cpu"))
    except RuntimeError:
        found = None
    if found is None or (found.type == "cuda" and (found.index or 0) >= num_gpus):
        raise ValueError(
            f"got device={str(device)!r}; expected cpu, or cuda:N below the {num_gpus} GPUs of this machine: leave it "
            "out for the fastest"
        )
    return found
