"""Folders as strangers might publish them: whole ones in every layout, and what is done to each.

Each entry of `CHANGES` changes a folder in place, and says by its name what is wrong with it. A folder in the list is
refused in one line; those in `HARMLESS` load. `python -m` with lines of JSON on its standard input is the worker of
the tests, and of those of `odd_values.py`: one process for many folders, which measures time and memory of each.
"""

import functools
import io
import json
import os
import pickle
import shutil
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_llava import AutoModelForVision2Seq
from modeling_llava.inference.loading import load_for_inference
from tests.modeling_llava.checkpoints import odd_values
from tests.modeling_llava.checkpoints.folder_changes import (
    LAYOUTS,
    MIB,
    PROCESSORS,
    WHOLE,
    add_index,
    call_pickle,
    change_json,
    change_pictures,
    change_text,
    change_tower,
    change_weights,
    lie_in_header,
    link,
    make_snapshot,
    make_special,
    move_out,
    nest,
    replace,
    resize,
    rewrite_zip,
    save_expanded,
    save_raw,
    save_shared,
    weight_file,
    write_archive,
    write_code,
    write_pieces,
)
from tests.modeling_llava.checkpoints.hostile_tokenizers import TEMPLATE_CHANGES, TOKENIZER_CHANGES

HUGE = 10**5
CONFIG_CHANGES: dict[str, Callable[[Path], None]] = {
    "hidden_size 1e5": lambda f: change_text(f, hidden_size=HUGE),
    "hidden_size 1e9": lambda f: change_text(f, hidden_size=10**9),
    "intermediate_size 1e7": lambda f: change_text(f, intermediate_size=10**7),
    "vocab_size 1e12": lambda f: change_text(f, vocab_size=10**12),
    "vocab_size 1e7": lambda f: change_text(f, vocab_size=10**7),
    "layers 1e6": lambda f: change_text(f, num_hidden_layers=10**6),
    "layers 250": lambda f: change_text(f, num_hidden_layers=250),
    "layers 1e30": lambda f: change_text(f, num_hidden_layers=10**30),
    "heads 0": lambda f: change_text(f, num_attention_heads=0),
    "heads 1e9": lambda f: change_text(f, num_attention_heads=10**9),
    "key-value heads 3": lambda f: change_text(f, num_key_value_heads=3),
    "head_dim 1e6": lambda f: change_text(f, head_dim=10**6),
    "hidden_size -1": lambda f: change_text(f, hidden_size=-1),
    "hidden_size 1.5": lambda f: change_text(f, hidden_size=1.5),
    "hidden_size true": lambda f: change_text(f, hidden_size=True),
    "hidden_size in words": lambda f: change_text(f, hidden_size="large"),
    "hidden_act of nobody": lambda f: change_text(f, hidden_act="foo"),
    "rope of nobody": lambda f: change_text(f, rope_parameters={"rope_type": "foo", "rope_theta": 1.0}),
    "rope without its fields": lambda f: change_text(f, rope_parameters={"rope_type": "yarn"}, rope_scaling=None),
    "dtype of nobody": lambda f: change_json(f, "config.json", dtype="float99", torch_dtype="float99"),
    "dtype of no weights": lambda f: change_json(f, "config.json", dtype="float8_e4m3fn", torch_dtype="float8_e4m3fn"),
    "dtype of integers": lambda f: change_json(f, "config.json", dtype="int8", torch_dtype="int8"),
    "a method as a field": lambda f: change_json(f, "config.json", to_dict=1),
    "names for other fields": lambda f: change_json(f, "config.json", attribute_map={"hidden_size": "x"}),
    "an end token of letters": lambda f: change_json(f, "config.json", eos_token_id="a"),
    "a million beams": lambda f: change_json(f, "config.json", num_beams=10**6),
    "bits that nothing is stored in": lambda f: change_json(
        f, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "a key of many lines": lambda f: change_json(f, "config.json", model_type="a\nb" * 10**4, architectures=None),
    "patch_size 0": lambda f: change_tower(f, patch_size=0),
    "patch_size 1": lambda f: change_tower(f, patch_size=1),
    "image_size 1e6": lambda f: change_tower(f, image_size=10**6),
    "tower of 1e6 layers": lambda f: change_tower(f, num_hidden_layers=10**6),
    "tower of 1e5 channels": lambda f: change_tower(f, hidden_size=HUGE),
    "tower of an unknown type": lambda f: change_tower(f, model_type="nobody"),
    "config.json a list": lambda f: replace(f, "config.json", "[]"),
    "config.json empty": lambda f: replace(f, "config.json", ""),
    "config.json null": lambda f: replace(f, "config.json", "null"),
    "config.json cut": lambda f: replace(f, "config.json", (f / "config.json").read_bytes()[:-40]),
    "config.json deep": lambda f: replace(f, "config.json", '{"a":' + nest(100_000) + "}"),
    "config.json deep in objects": lambda f: change_json(f, "config.json", id2label=json.loads(nest(300))),
    "config.json NaN": lambda f: replace(f, "config.json", (f / "config.json").read_text()[:-2] + ', "rms": NaN}'),
    "config.json a number of 5,000 digits": lambda f: replace(f, "config.json", '{"hidden_size":' + "9" * 5000 + "}"),
    "config.json a key twice": lambda f: replace(
        f, "config.json", '{"hidden_size": 1, "hidden_size": 2,' + (f / "config.json").read_text().lstrip()[1:]
    ),
    "config.json with a mark of UTF-8": lambda f: replace(
        f, "config.json", b"\xef\xbb\xbf" + (f / "config.json").read_bytes()
    ),
    "config.json not UTF-8": lambda f: replace(f, "config.json", b"\xff\xfe" + (f / "config.json").read_bytes()),
    "config.json in UTF-16": lambda f: replace(f, "config.json", (f / "config.json").read_text().encode("utf-16")),
    "config.json of 5 MB": lambda f: replace(f, "config.json", (f / "config.json").read_text() + " " * (5 * MIB)),
    "config.json of 4 MB in lists": lambda f: change_json(f, "config.json", pad=[[]] * 900_000),
    "config.json another model": lambda f: replace(f, "config.json", '{"model_type": "bert"}'),
    "model_type a list": lambda f: change_json(f, "config.json", model_type=["llava"], architectures=None),
    "architectures a text": lambda f: change_json(f, "config.json", architectures="LlavaLlamaForCausalLM"),
    "architectures of dicts": lambda f: change_json(f, "config.json", architectures=[{}], model_type="x"),
    "quantization_config a list": lambda f: change_json(f, "config.json", quantization_config=[1]),
    "config.json a link to /dev/zero": lambda f: link(f, "config.json", "/dev/zero"),
    "config.json a link to /dev/stdin": lambda f: link(f, "config.json", "/dev/stdin"),
    "config.json a link out": lambda f: move_out(f, "config.json"),
    "config.json a link to itself": lambda f: link(f, "config.json", "config.json"),
    "config.json a link to nothing": lambda f: link(f, "config.json", "nothing"),
    "config.json a pipe": lambda f: make_special(f, "config.json", "pipe"),
    "config.json a folder": lambda f: make_special(f, "config.json", "folder"),
    "config.json a socket": lambda f: make_special(f, "config.json", "socket"),
}
FILE_CHANGES: dict[str, Callable[[Path], None]] = {
    "generation_config.json a list": lambda f: replace(f, "generation_config.json", "[]"),
    "generation_config.json of odd values": lambda f: replace(
        f, "generation_config.json", '{"max_length": "a", "num_beams": [], "watermarking_config": 3}'
    ),
    "generation_config.json of 1e12 tokens": lambda f: replace(f, "generation_config.json", '{"max_length": 1e12}'),
    "generation_config.json of letters": lambda f: replace(f, "generation_config.json", '{"temperature": "x"}'),
    "generation_config.json NaN": lambda f: replace(f, "generation_config.json", '{"top_p": NaN}'),
    "generation_config.json a pipe": lambda f: make_special(f, "generation_config.json", "pipe"),
    "generation_config.json a link to /dev/zero": lambda f: link(f, "generation_config.json", "/dev/zero"),
    "tokenizer.json a list": lambda f: replace(f, "tokenizer.json", "[]"),
    "tokenizer.json deep": lambda f: replace(f, "tokenizer.json", nest(100_000)),
    "tokenizer.json of 65 MB": lambda f: os.truncate(f / "tokenizer.json", 65 * MIB),
    "tokenizer.json of 8 million lists": lambda f: replace(f, "tokenizer.json", "[" + "[]," * 4_000_000 + "[]]"),
    "tokenizer.json a link out": lambda f: move_out(f, "tokenizer.json"),
    "tokenizer.json a pipe": lambda f: make_special(f, "tokenizer.json", "pipe"),
    "tokenizer.json without a model": lambda f: change_json(f, "tokenizer.json", model=None),
    "tokenizer_config.json a list": lambda f: replace(f, "tokenizer_config.json", "[]"),
    "tokenizer_config.json deep": lambda f: change_json(f, "tokenizer_config.json", pad=json.loads(nest(500))),
    "tokenizer_config.json odd tokens": lambda f: change_json(f, "tokenizer_config.json", added_tokens_decoder=[1]),
    "tokenizer_config.json a pipe": lambda f: make_special(f, "tokenizer_config.json", "pipe"),
    "chat_template.jinja a link out": lambda f: link(f, "chat_template.jinja", "/etc/hostname"),
    "chat_template.jinja of 1 MB": lambda f: replace(f, "chat_template.jinja", "{% if a %}" * 100_000),
    "special_tokens_map.json a list": lambda f: replace(f, "special_tokens_map.json", "[]"),
    "added_tokens.json a link to /dev/zero": lambda f: link(f, "added_tokens.json", "/dev/zero"),
}
PROCESSOR_CHANGES: dict[str, Callable[[Path], None]] = {
    "processor_config.json a list": lambda f: replace(f, "processor_config.json", "[]"),
    "processor_config.json of odd values": lambda f: replace(f, "processor_config.json", '{"patch_size": "a"}'),
    "processor_config.json a socket": lambda f: make_special(f, "processor_config.json", "socket"),
    "processor_config.json a link to /dev/zero": lambda f: link(f, "processor_config.json", "/dev/zero"),
    "pictures of 1e6 pixels": lambda f: change_pictures(f, size={"shortest_edge": 10**6}),
    "pictures cut to 1e6 pixels": lambda f: change_pictures(f, crop_size={"height": 10**6, "width": 10**6}),
    "pictures of odd sizes": lambda f: change_pictures(f, size={"shortest_edge": "a"}),
    "pictures of a mean of 1e308": lambda f: change_pictures(f, image_mean=[1e308] * 3),
    "pictures of a spread of 0": lambda f: change_pictures(f, image_std=[0, 1, 1]),
    "pictures of four channels": lambda f: change_pictures(f, image_std=[1] * 4),
    "pictures without a scale": lambda f: change_pictures(f, rescale_factor=float("inf")),
    "an audio tokenizer": lambda f: change_json(
        f,
        "processor_config.json",
        audio_tokenizer={"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "/etc"},
    ),
}


WEIGHT_CHANGES: dict[str, Callable[[Path], None]] = {
    "a weight less": lambda f: change_weights(f, lambda weights: weights.pop(next(iter(weights)))),
    "a foreign weight": lambda f: change_weights(f, lambda weights: weights.update(foo=torch.ones(2))),
    "a foreign weight of many lines": lambda f: change_weights(
        f, lambda weights: weights.update({"a\nb" * 10**4: torch.ones(2)})
    ),
    "another shape": lambda f: change_weights(f, resize),
    "no weights": lambda f: change_weights(f, lambda weights: weights.clear()),
    "weights a link out": lambda f: move_out(f, weight_file(f).name),
    "weights a pipe": lambda f: make_special(f, weight_file(f).name, "pipe"),
    "weights cut": lambda f: os.truncate(weight_file(f), weight_file(f).stat().st_size // 2),
    "weights of 3 bytes": lambda f: weight_file(f).write_bytes(b"abc"),
    "weights a text": lambda f: weight_file(f).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9),
}
INDEX_CHANGES: dict[str, Callable[[Path], None]] = {
    "an index to a file outside": lambda f: (
        shutil.copy(weight_file(f), f.parent / "x.safetensors"),
        add_index(f, {"a": "../x.safetensors"}),
    ),
    "an index to an absolute path": lambda f: (
        shutil.copy(weight_file(f), f.parent / "x.safetensors"),
        add_index(f, {"a": str(f.parent.resolve() / "x.safetensors")}),
    ),
    "an index to /dev/zero": lambda f: add_index(f, {"a": "/dev/zero"}),
    "an index to config.json": lambda f: add_index(f, {"a": "config.json"}),
    "an index to nothing": lambda f: add_index(f, {"a": "nothing.safetensors"}),
    "an index to no text": lambda f: add_index(f, {"a": 5}),
    "an index of a list": lambda f: add_index(f, ["a"]),
    "an index without a map": lambda f: add_index(f, None),
    "an index to a folder of links": lambda f: (link(f, "x", ".."), add_index(f, {"a": "x/x.safetensors"})),
    "an index of .bin to nothing": lambda f: add_index(f, {"a": "../x.bin"}, of="pytorch_model.bin"),
}
HEADER_CHANGES: dict[str, Callable[[Path], None]] = {
    "a header of 2**63 bytes": lambda f: lie_in_header(f, length=2**63),
    "a header of 90 MB": lambda f: (lie_in_header(f, length=90 * MIB), os.truncate(weight_file(f), 91 * MIB)),
    "a header of no bytes": lambda f: lie_in_header(f, length=0),
    "a header of a list": lambda f: lie_in_header(f, ["a"]),
    "a header with a weight beyond the file": lambda f: lie_in_header(
        f, {"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    ),
    "a header with weights one over the other": lambda f: lie_in_header(
        f, {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}
    ),
    "a header with a dtype of nobody": lambda f: lie_in_header(
        f, {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}
    ),
}
TORCH_CHANGES: dict[str, Callable[[Path], None]] = {
    "a .bin that inflates": lambda f: save_raw(f, b"\x80\x02" + b"N0" * (16 * MIB), method=zipfile.ZIP_DEFLATED),
    "a compressed .bin": lambda f: rewrite_zip(weight_file(f), lambda name, data: data, method=zipfile.ZIP_DEFLATED),
    "a .bin with a pickle of 4 MB": lambda f: save_raw(f, b"\x80\x02" + b"]" * (4 * MIB) + b"."),
    "a .bin with a million notes": lambda f: save_raw(
        f, b"\x80\x02]" + b"".join(b"r" + struct.pack("<I", n) for n in range(300_000)) + b"."
    ),
    "a .bin with a note of number 4e9": lambda f: save_raw(f, b"\x80\x02}r\xff\xff\xff\xff."),
    "a .bin with lists in lists": lambda f: save_raw(f, b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b"."),
    "a .bin with 10 GB of bytes": lambda f: save_raw(f, call_pickle("__builtin__", "bytearray", 10**10)),
    "a .bin with a tensor of 10 GB": lambda f: save_raw(f, call_pickle("torch", "FloatTensor", 25 * 10**8)),
    "a .bin with code": lambda f: save_raw(f, call_pickle("os", "abort", 1)),
    "a .bin with a weight of one number": save_expanded,
    "a .bin with a thousand names of a weight": save_shared,
    "a .bin with a sparse weight": lambda f: change_weights(
        f, lambda weights: weights.update({next(iter(weights)): torch.eye(5).to_sparse()})
    ),
    "a .bin with a weight without numbers": lambda f: change_weights(
        f, lambda weights: weights.update({next(iter(weights)): torch.ones(10**6, 10**6, device="meta")})
    ),
    "a .bin with numbers for names": lambda f: change_weights(f, lambda weights: weights.update({3: torch.ones(2)})),
    "a .bin of a list": lambda f: torch.save([torch.ones(2)], weight_file(f)),
    "a .bin of a text": lambda f: torch.save("a", weight_file(f)),
    "a .bin from before torch 1.6, cut": lambda f: (
        torch.save(torch.load(weight_file(f)), weight_file(f), _use_new_zipfile_serialization=False),
        os.truncate(weight_file(f), weight_file(f).stat().st_size // 2),
    ),
    "a .bin from before torch 1.6, with code": lambda f: weight_file(f).write_bytes(
        pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        + pickle.dumps(1001, 2)
        + pickle.dumps({}, 2)
        + call_pickle("os", "abort", 1)
    ),
    "a .bin of an archive": lambda f: write_archive(weight_file(f)),
}


def split_unequal(folder: Path) -> None:
    """Two shards, of which both hold a weight, with other values."""
    weights = load_file(folder / "model.safetensors")
    key = min(weights)
    (folder / "model.safetensors").unlink()
    for number, shard in enumerate((weights, {key: weights[key] + 1})):
        save_file(shard, folder / f"model-{number}.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(weights, "model-0.safetensors") | {key: "model-1.safetensors"}
    replace(folder, "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))


ADAPTER_CHANGES: dict[str, Callable[[Path], None]] = {
    "adapter_config.json a list": lambda f: replace(f, "adapter_config.json", "[]"),
    "adapter_config.json a pipe": lambda f: make_special(f, "adapter_config.json", "pipe"),
    "adapter_config.json deep": lambda f: change_json(f, "adapter_config.json", pad=json.loads(nest(500))),
    "a base that is a list": lambda f: change_json(f, "adapter_config.json", base_model_name_or_path=["../base"]),
    "a base that is the adapter": lambda f: change_json(f, "adapter_config.json", base_model_name_or_path="."),
    "a base that is nowhere": lambda f: change_json(f, "adapter_config.json", base_model_name_or_path="../nowhere"),
    "a rank of 1e9": lambda f: change_json(f, "adapter_config.json", r=10**9),
    "a rank of words": lambda f: change_json(f, "adapter_config.json", r="a"),
    "a factor of 0": lambda f: change_json(f, "adapter_config.json", lora_alpha=0),
    "a factor without end": lambda f: change_json(f, "adapter_config.json", lora_alpha=float("inf")),
    "weights that are no numbers": lambda f: change_weights(
        f, lambda weights: weights.update({key: value * torch.nan for key, value in weights.items()})
    ),
    "an output layer of another size": lambda f: change_weights(
        f, lambda weights: weights.update({"base_model.model.lm_head.weight": torch.zeros(301, 32)})
    ),
    "input embeddings of another size": lambda f: change_weights(
        f,
        lambda weights: weights.update(
            {"base_model.model.model.language_model.embed_tokens.weight": torch.zeros(301, 32)}
        ),
    ),
    "a weight of the base": lambda f: change_weights(
        f, lambda weights: weights.update({"base_model.model.model.language_model.norm.weight": torch.zeros(32)})
    ),
    "a method of another package": lambda f: change_json(f, "adapter_config.json", megatron_config={"a": 1}),
    "a rank of 0": lambda f: change_json(f, "adapter_config.json", r=0),
    "peft_type of nobody": lambda f: change_json(f, "adapter_config.json", peft_type="FOO"),
    "targets that take forever": lambda f: change_json(f, "adapter_config.json", target_modules="(.*)*(.*)*(.*)*x"),
    "targets that are numbers": lambda f: change_json(f, "adapter_config.json", target_modules=[1, 2]),
    "targets that are none": lambda f: change_json(f, "adapter_config.json", target_modules=["foo"]),
    "ranks by patterns that take forever": lambda f: change_json(
        f, "adapter_config.json", rank_pattern={"((.*)*(.*)*)*x": 4}
    ),
    "a base with foreign weights": lambda f: change_weights(
        f.parent / "base", lambda weights: weights.update(foo=torch.ones(2))
    ),
    "a base with a hidden_size of 1e5": lambda f: change_text(f.parent / "base", hidden_size=HUGE),
}
PART_CHANGES: dict[str, Callable[[Path], None]] = {
    "tokenizer.model of garbage": lambda f: replace(f, "tokenizer.model", b"\xff" * 1000),
    "tokenizer.model with a piece of 1 MB": lambda f: write_pieces(f, "a" * MIB),
    "tokenizer.model with a million pieces": lambda f: write_pieces(f, *map(str, range(10**6))),
    "a tower without weights": lambda f: (f.parent / "tower" / "model.safetensors").unlink(),
    "a tower with its config.json a pipe": lambda f: make_special(f.parent / "tower", "config.json", "pipe"),
    "a tower with its config.json a list": lambda f: replace(f.parent / "tower", "config.json", "[]"),
    "a tower with a weight less": lambda f: change_weights(
        f.parent / "tower", lambda weights: weights.pop(next(key for key in weights if "layers.0" in key))
    ),
    "a tower that is a list": lambda f: change_json(f, "config.json", mm_vision_tower=["../tower"]),
    "a tower with its pictures a list": lambda f: replace(f.parent / "tower", "preprocessor_config.json", "[]"),
    "a tower with its weights a link out": lambda f: move_out(f.parent / "tower", "model.safetensors"),
    "tiles of 1e7 by 1e7": lambda f: change_json(
        f, "config.json", image_aspect_ratio="anyres", image_grid_pinpoints="(1x1),(9999999x9999999)"
    ),
    "tiles in 1e5 brackets": lambda f: change_json(
        f, "config.json", image_aspect_ratio="anyres", image_grid_pinpoints="(" * 10**5
    ),
    "tiles of 1e999": lambda f: change_json(
        f, "config.json", image_aspect_ratio="anyres", image_grid_pinpoints="[[1e999, 1]]"
    ),
    "a projector of 1e9 layers": lambda f: change_json(f, "config.json", mm_projector_type=f"mlp{10**9}x_gelu"),
    "a projector of 99 layers": lambda f: change_json(f, "config.json", mm_projector_type="mlp99x_gelu"),
}

CHANGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {}
for _changes, _layouts in (
    (CONFIG_CHANGES, WHOLE),
    (FILE_CHANGES, ("any_llava", "original")),
    (TOKENIZER_CHANGES, ("any_llava", "original")),
    (TEMPLATE_CHANGES, ("any_llava",)),
    (PROCESSOR_CHANGES, PROCESSORS),
    (WEIGHT_CHANGES, tuple(LAYOUTS)),
    (INDEX_CHANGES, ("any_llava", "llava", "original")),
    (HEADER_CHANGES, ("any_llava", "llava", "original", "adapter")),
    (TORCH_CHANGES, ("shards", "projector")),
    (ADAPTER_CHANGES, ("adapter",)),
    (PART_CHANGES, ("original",)),
    ({"a LLaVA as the language model": lambda f: change_text(f, model_type="any_llava")}, PROCESSORS),
    ({"one weight in two shards": split_unequal}, ("any_llava", "llava", "original")),
    (
        {
            "half of a projector": lambda f: change_weights(f, lambda weights: weights.pop(next(iter(weights)))),
            "a projector without numbers": lambda f: change_weights(
                f, lambda weights: weights.update({key: value * torch.inf for key, value in weights.items()})
            ),
        },
        ("projector",),
    ),
):
    CHANGES |= {name: (change, _layouts) for name, change in _changes.items()}
HARMLESS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "nothing": (lambda f: None, tuple(LAYOUTS)),
    "code in config.json": (lambda f: write_code(f, "config.json", "AutoConfig"), WHOLE),
    "code in tokenizer_config.json": (
        lambda f: write_code(f, "tokenizer_config.json", "AutoTokenizer"),
        ("any_llava", "llava", "original"),
    ),
    "code in processor_config.json": (lambda f: write_code(f, "processor_config.json", "AutoProcessor"), PROCESSORS),
    "code in the tower": (lambda f: write_code(f.parent / "tower", "config.json", "AutoConfig"), ("original",)),
    "code in the pictures of the tower": (
        lambda f: write_code(f.parent / "tower", "preprocessor_config.json", "AutoImageProcessor"),
        ("original",),
    ),
    "code in the base": (lambda f: write_code(f.parent / "base", "config.json", "AutoConfig"), ("adapter",)),
    "a link in the folder": (
        lambda f: ((f / "config.json").rename(f / "real.json"), link(f, "config.json", "real.json")),
        WHOLE,
    ),
    "a snapshot of the Hub's cache": (lambda f: make_snapshot(f), ("any_llava", "original", "shards")),
    "links of no interest": (lambda f: link(f, "notes.md", "/etc/hostname"), ("any_llava",)),
}


def load(layout: str, folder: Path) -> None:
    """As the commands do, and with transformers' own class where it is the one that loads."""
    if layout == "projector":
        AutoModelForVision2Seq.from_pretrained(folder, base_model=str(folder.parent / "base"))
        return
    load_for_inference(str(folder))
    if layout in ("llava", "llava_next"):
        AutoModelForVision2Seq.from_pretrained(folder)


def answer(folder: Path) -> None:
    """A token about a picture, as `generate` of transformers chooses it."""
    model, processor = load_for_inference(str(folder))
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    model.generate(**processor.apply_chat_template(messages, **settings), max_new_tokens=1)


def measure(folder: Path, use: Callable[[Path], None]) -> dict[str, Any]:
    """What became of a folder, and what it cost: seconds of the CPU, and bytes beyond what the process had."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = read_status("VmRSS"), time.process_time()
    try:
        use(folder)
        result = "loaded"
    except (ValueError, OSError) as error:
        result = str(error)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}\n(no ValueError)"
    cost = {"seconds": time.process_time() - start, "bytes": read_status("VmHWM") - before}
    return {"result": result, **cost, "ran": (folder / "ran").exists()}


def read_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


def main() -> None:
    """Change and load a copy of each folder that a line names: `[layout, change, folder with the layouts]`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines, sys.stdin = sys.stdin.read().splitlines(), io.StringIO("y\n" * 1000)
    for number, line in enumerate(lines):
        layout, name, prepared = json.loads(line)
        copy = Path(prepared) / f"copy{number}"
        shutil.copytree(Path(prepared) / layout, copy)
        if name.startswith("["):
            odd_values.make_change(copy / "model", name)
            result = measure(copy / "model", answer)
        else:
            (CHANGES | HARMLESS)[name][0](copy / "model")
            result = measure(copy / "model", functools.partial(load, layout))
        result["asked"] = sys.stdin.tell() > 0
        sys.stdin.seek(0)
        sys.stdout.write(json.dumps([layout, name, result]) + "\n")
        with suppress(OSError):
            shutil.rmtree(copy)


if __name__ == "__main__":
    main()
