"""`llava export --layout gguf`: a LLaVA as the files that llama.cpp, Ollama and LM Studio read.

The folder has the language model, tower and projector beside it (`mmproj-...`), and Ollama's Modelfile. That is the
form of LM Studio and of llama-server's router, too.

What is surprising: nothing is written before everything was checked, and what llama.cpp computes otherwise although
the file is right stands in the file's own description, since a file travels without the folder. Weights keep their
precision, and `quantize` is for the matrices of the language model alone.
"""

import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from modeling_llava.modeling_llava import AnyLlavaForConditionalGeneration
from processing_llava import AnyLlavaProcessor

from .export_settings import Exported
from .gguf_templates import adapt_template, has_own_content, write_modelfile
from .gguf_text import ARCHITECTURES, GgufTensor, add_text_settings, check_text, list_text_tensors, refuse_others
from .gguf_tokenizer import add_tokenizer, check_tokenizer, list_tokenizer_notices
from .gguf_tower import add_tower_settings, check_tower, list_tower_notices, list_tower_tensors
from .merged_adapter import merge_adapter

QUANTIZATIONS = ("q8_0", "q4_k_m")
QUANTIZER = "llama-quantize"
"""llama.cpp's own program. The package gguf 0.19 reads 4-bit K-quants and cannot make them (gguf/quants.py)."""
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
"""What `gguf` calls a file by the kind of its matrices."""
_PRECISIONS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(kw_only=True)
class GgufSettings:
    """What a person decides about GGUF files.

    Raises:
        ValueError: for an odd name, an unknown quantization, or one that cannot be made here.
    """

    name: str
    """Begins the names of the files."""
    quantize: str | None = None
    """"q8_0" or "q4_k_m" for the matrices of the language model; None keeps their precision."""
    for_issue_25814: bool = False
    """Make the file for a llama.cpp with that fault: see `gguf_tower.py`."""
    license: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name, flags=re.ASCII):
            raise ValueError(
                f"got {self.name!r} as the name of GGUF files; expected letters, digits and . _ -: give --repo-id"
            )
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise ValueError(f"got quantize={self.quantize!r}; expected one of {', '.join(QUANTIZATIONS)}")
        if self.quantize == "q4_k_m" and shutil.which(QUANTIZER) is None:
            raise ValueError(
                f"got quantize='q4_k_m' without {QUANTIZER}, the program of llama.cpp that makes it; expected it on "
                f"PATH: install llama.cpp, or export without --quantize and run {QUANTIZER} MODEL.gguf OUT.gguf Q4_K_M"
            )


def export_gguf(source: Path, out: Path, settings: GgufSettings) -> Exported:
    """Write a model of any layout, or an adapter with its base, as GGUF.

    Args:
        source: Folder of the model or adapter.
        out: Folder to write; must be new or empty. Nothing of it stays if something is wrong.
        settings: What a person decides.

    Raises:
        ValueError: naming the field that GGUF, or llama.cpp, cannot express.
        ModuleNotFoundError: without the package gguf.
    """
    import gguf  # noqa: F401

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"got {out}, which holds files; expected a new or empty folder")
    if (source / "adapter_config.json").is_file() and not (source / "config.json").is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="llava-merge-", dir=out.parent) as merged:
            merge_adapter(str(source), Path(merged))
            return export_gguf(Path(merged), out, settings)
    model = AnyLlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    processor = AnyLlavaProcessor.from_pretrained(source)
    _check(model, processor, settings)
    tower_notices = list(
        list_tower_notices(model.config, processor.image_processor, for_issue_25814=settings.for_issue_25814)
    )
    text_notices = list(list_tokenizer_notices(processor.tokenizer))
    if not has_own_content(processor.chat_template):
        text_notices.append("the chat template is of others: how llama.cpp writes pictures in it was not compared")
    precision = _PRECISIONS[model.lm_head.weight.dtype]
    text_file = f"{settings.name}-{settings.quantize or precision}.gguf"
    tower_file = f"mmproj-{settings.name}-{precision}.gguf"
    out.mkdir(parents=True, exist_ok=True)
    try:
        _write_text(model, processor, out / text_file, settings, notices=text_notices)
        _write_tower(model, processor, out / tower_file, settings, notices=tower_notices)
        notices = write_modelfile(processor, out / "Modelfile", files=(text_file, tower_file))
    except BaseException:
        shutil.rmtree(out)
        raise
    return Exported(folder=out, kind="model", layout="gguf", notices=[*tower_notices, *text_notices, *notices])


def _check(model: AnyLlavaForConditionalGeneration, processor: AnyLlavaProcessor, settings: GgufSettings) -> None:
    model.config.check()
    check_tower(model.config, processor.image_processor)
    check_text(model.config)
    check_tokenizer(processor.tokenizer, model.generation_config)
    if processor.chat_template is None:
        raise ValueError("got a processor without chat_template; expected one: set it, and save the processor")
    if settings.for_issue_25814 and model.config.vision_config.model_type != "clip_vision_model":
        raise ValueError(
            f"got --for-llama-cpp-with-issue-25814 for a {model.config.vision_config.model_type}, which has no class "
            "token and is computed right; expected a CLIP tower: leave it out"
        )
    # Whatever has no name in llama.cpp is found before anything is written.
    for tensor in (*list_text_tensors(model), *list_tower_tensors(model)):
        refuse_others(f"dtype of {tensor.name}", tensor.dtype, tuple(_PRECISIONS))


def _write_text(
    model: AnyLlavaForConditionalGeneration,
    processor: AnyLlavaProcessor,
    path: Path,
    settings: GgufSettings,
    *,
    notices: list[str],
) -> None:
    text = model.config.text_config
    with TemporaryDirectory(prefix="llava-gguf-", dir=path.parent) as scratch:
        written = Path(scratch) / path.name if settings.quantize == "q4_k_m" else path
        writer = _start(written, ARCHITECTURES[text.model_type], settings, notices=notices)
        writer.add_type("model")
        add_text_settings(writer, model.config)
        add_tokenizer(writer, processor.tokenizer, model.generation_config, vocab_size=text.vocab_size)
        writer.add_chat_template(adapt_template(processor.chat_template))
        _write_tensors(writer, list_text_tensors(model), quantize="Q8_0" if settings.quantize == "q8_0" else None)
        if written != path:
            _quantize(written, path)


def _write_tower(
    model: AnyLlavaForConditionalGeneration,
    processor: AnyLlavaProcessor,
    path: Path,
    settings: GgufSettings,
    *,
    notices: list[str],
) -> None:
    writer = _start(path, "clip", settings, notices=notices)
    add_tower_settings(writer, model.config, processor.image_processor)
    _write_tensors(writer, list_tower_tensors(model, for_issue_25814=settings.for_issue_25814))


def _start(path: Path, architecture: str, settings: GgufSettings, *, notices: list[str]) -> Any:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(settings.name)
    writer.add_description(". ".join([f"Written by AnyLLaVA {version('anyllava')}", *notices]))
    if settings.license is not None:
        writer.add_license(settings.license)
    return writer


def _write_tensors(writer: Any, tensors: Iterable[GgufTensor], *, quantize: str | None = None) -> None:
    """Write one tensor after the other; matrices whose rows are no whole blocks stay as they are."""
    import gguf

    tensors = list(tensors)
    kinds = [_choose_kind(tensor, quantize) for tensor in tensors]
    for tensor, kind in zip(tensors, kinds):
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
    most = max(kinds, key=lambda kind: (kind.name != "F32", kinds.count(kind)))
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[most.name]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in zip(tensors, kinds):
        array = np.ascontiguousarray(tensor.read().detach().float().numpy())
        writer.write_tensor_data(gguf.quantize(array, kind))
    writer.close()


def _choose_kind(tensor: GgufTensor, quantize: str | None) -> Any:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if quantize is not None and len(tensor.shape) == 2:
        kind = GGMLQuantizationType[quantize]
        if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return GGMLQuantizationType[_PRECISIONS[tensor.dtype].upper()]


def _quantize(source: Path, path: Path) -> None:
    command = [QUANTIZER, str(source), str(path), "Q4_K_M"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not path.is_file():
        last = (result.stderr or result.stdout).strip().splitlines()[-1:]
        raise ValueError(
            f"got {' '.join(last) or 'no file'} from {' '.join(command)}; expected a file: see its output"
        )
