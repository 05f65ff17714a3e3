"""Folders as strangers might publish them: whole ones in every layout, and what is done to each.

Each entry of `CHANGES` changes a folder in place, and says by its name what is wrong with it. A folder in the list is
refused in one line; those in `HARMLESS` load. `python -m` with lines of JSON on its standard input is the worker of
the tests: one process for many folders, which measures the time and memory of each.
"""

import io
import json
import os
import pickle
import shutil
import socket
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
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from modeling_llava import AnyLlavaForConditionalGeneration, AutoModelForVision2Seq
from modeling_llava.inference.loading import load_for_inference
from tests import original_folders as folders
from tests.tiny import PINPOINTS, save_tiny_checkpoint, tiny_model, tiny_processor

MIB = 2**20


def write_ours(folder: Path) -> None:
    save_tiny_checkpoint(folder / "model")


def write_theirs(folder: Path, **settings) -> None:
    processor = tiny_processor(**{"image_aspect_ratio": "anyres"} | settings if settings else {})
    merge = {"patch_merge_type": "spatial_unpad"} if settings else {}
    model = tiny_model(image_token_id=processor.image_token_id, **settings, **merge)
    model.save_pretrained(folder / "model", layout="transformers")
    if settings:
        processor.patch_merge_type = "spatial_unpad"
    processor.save_pretrained(folder / "model")


def write_tiled(folder: Path) -> None:
    write_theirs(folder, image_grid_pinpoints=PINPOINTS)


def write_original(folder: Path) -> None:
    """With a small tokenizer: that of LLaMA takes most of a second to read."""
    tower = folders.make_tower("clip")
    folders.save_tower(tower, folder / "tower")
    vocab_size = folders.write_fast_tokenizer(make_folder(folder / "model"), "<image>")
    model = folders.make_model(tower, vocab_size=vocab_size)
    folders.write_config(folder / "model", model, vision_tower="../tower", text="llama", image_token_id=vocab_size - 1)
    folders.write_safetensors(folder / "model", folders.original_weights(model))


def write_shards(folder: Path) -> None:
    write_original(folder)
    weights = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    folders.write_torch_shards(folder / "model", weights)


def write_adapter(folder: Path) -> None:
    """An adapter of PEFT in `model`, its base beside it."""
    save_tiny_checkpoint(folder / "base")
    model = AnyLlavaForConditionalGeneration.from_pretrained(folder / "base")
    model.add_adapter(LoraConfig(target_modules=r"model\.language_model\..*\.(q_proj|v_proj)"))
    model.save_pretrained(folder / "model")
    change_json(folder / "model", "adapter_config.json", base_model_name_or_path="../base")


def write_projector(folder: Path) -> None:
    """A projector in `model`, its base as an original folder without one beside it."""
    write_original(folder)
    (folder / "model").rename(folder / "base")
    weights = load_file(folder / "base" / "model.safetensors")
    projector = {key: weights.pop(key) for key in list(weights) if "mm_projector" in key}
    folders.write_safetensors(folder / "base", weights)
    make_folder(folder / "model")
    shutil.copy(folder / "base" / "config.json", folder / "model")
    torch.save(projector, folder / "model" / "mm_projector.bin")
    adapter = {"base_model_name_or_path": "../base"}
    (folder / "model" / "adapter_config.json").unlink(missing_ok=True)
    (folder / "base.json").write_text(json.dumps(adapter))


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "any_llava": write_ours,
    "llava": write_theirs,
    "llava_next": write_tiled,
    "original": write_original,
    "shards": write_shards,
    "adapter": write_adapter,
    "projector": write_projector,
}
WHOLE = ("any_llava", "llava", "llava_next", "original", "shards")
PROCESSORS = ("any_llava", "llava", "llava_next")


def change_json(folder: Path, filename: str, **fields) -> None:
    path = folder / filename
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


def change_text(folder: Path, **fields) -> None:
    """Fields of the language model, wherever the layout has them."""
    config = json.loads((folder / "config.json").read_text())
    (config["text_config"] if "text_config" in config else config).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def change_tower(folder: Path, **fields) -> None:
    """Fields of the tower, whose config.json is its own in the original layout."""
    if (folder.parent / "tower").is_dir():
        change_json(folder.parent / "tower", "config.json", **fields)
        return
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def replace(folder: Path, filename: str, content: bytes | str) -> None:
    (folder / filename).unlink(missing_ok=True)
    (folder / filename).write_bytes(content.encode() if isinstance(content, str) else content)


def link(folder: Path, filename: str, target: str | Path) -> None:
    (folder / filename).unlink(missing_ok=True)
    (folder / filename).symlink_to(target)


def move_out(folder: Path, filename: str) -> None:
    """The file lies somewhere else, and a link leads there."""
    shutil.move(folder / filename, folder.parent / filename)
    link(folder, filename, folder.parent / filename)


def make_special(folder: Path, filename: str, kind: str) -> None:
    (folder / filename).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / filename)
    elif kind == "folder":
        (folder / filename).mkdir()
    else:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(filename)
        os.chdir(here)


def weight_file(folder: Path) -> Path:
    names = ("model.safetensors", "pytorch_model-00001-of-00002.bin", "adapter_model.safetensors", "mm_projector.bin")
    return next(folder / name for name in names if (folder / name).is_file())


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = weight_file(folder)
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    change(weights)
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(weights, path, **{"metadata": {"format": "pt"}} if path.suffix == ".safetensors" else {})


def resize(weights: dict[str, torch.Tensor]) -> None:
    key = next(key for key, value in weights.items() if value.ndim == 2)
    weights[key] = torch.ones(3, 5)


def add_index(folder: Path, weight_map: Any, *, of: str = "model.safetensors") -> None:
    """An index instead of the only file."""
    for path in (*folder.glob("*.bin*"), *folder.glob("model.safetensors*")):
        path.unlink()
    (folder / f"{of}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def rewrite_zip(path: Path, change: Callable[[str, bytes], bytes], *, method: int = zipfile.ZIP_STORED) -> None:
    """A file of torch.save, its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for filename, content in entries:
            archive.writestr(filename, change(filename, content))


def save_raw(folder: Path, pickled: bytes, *, method: int = zipfile.ZIP_STORED) -> None:
    rewrite_zip(weight_file(folder), lambda name, data: pickled if name.endswith(".pkl") else data, method=method)


def save_expanded(folder: Path) -> None:
    """A weight of one number that says it is a matrix of a terabyte."""
    change_weights(folder, lambda weights: weights.update({next(iter(weights)): torch.ones(1).expand(10**6, 10**6)}))


def save_shared(folder: Path) -> None:
    big = torch.ones(1000, 1000)
    change_weights(folder, lambda weights: weights.update({f"model.layers.{n}.foo.weight": big for n in range(1000)}))


def call_pickle(module: str, name: str, argument: int) -> bytes:
    """A dict with the result of one call."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + f"c{module}\n{name}\n".encode() + pickle_int(argument) + b"\x85Rs."


def pickle_int(number: int) -> bytes:
    return pickle.dumps(number, protocol=2)[2:-1]


def lie_in_header(folder: Path, header: dict[str, Any] | None = None, *, length: int | None = None) -> None:
    path = weight_file(folder)
    data = path.read_bytes()
    num_bytes = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(header).encode() if header is not None else data[8 : 8 + num_bytes]
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + num_bytes :])


def write_code(folder: Path, filename: str, auto: str) -> None:
    """Code that leaves a file behind when it is imported, and a JSON file that names it."""
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    reference = ["evil.Evil", "evil.Evil"] if auto == "AutoTokenizer" else "evil.Evil"
    change_json(folder, filename, auto_map={auto: reference})


def nest(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


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
    "quantization_config of nobody": lambda f: change_json(
        f, "config.json", quantization_config={"quant_method": "x"}
    ),
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
    "an audio tokenizer": lambda f: change_json(
        f,
        "processor_config.json",
        audio_tokenizer={"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "/etc"},
    ),
}


def change_pictures(folder: Path, **fields) -> None:
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"].update(fields)
    (folder / "processor_config.json").write_text(json.dumps(config))


WEIGHT_CHANGES: dict[str, Callable[[Path], None]] = {
    "a weight less": lambda f: change_weights(f, lambda weights: weights.pop(next(iter(weights)))),
    "a foreign weight": lambda f: change_weights(f, lambda weights: weights.update(foo=torch.ones(2))),
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
    "a .bin that inflates": lambda f: save_raw(f, b"\x80\x02" + b"N0" * (200 * MIB), method=zipfile.ZIP_DEFLATED),
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


def write_archive(path: Path) -> None:
    import tarfile

    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


ADAPTER_CHANGES: dict[str, Callable[[Path], None]] = {
    "adapter_config.json a list": lambda f: replace(f, "adapter_config.json", "[]"),
    "adapter_config.json a pipe": lambda f: make_special(f, "adapter_config.json", "pipe"),
    "adapter_config.json deep": lambda f: change_json(f, "adapter_config.json", pad=json.loads(nest(500))),
    "a base that is a list": lambda f: change_json(f, "adapter_config.json", base_model_name_or_path=["../base"]),
    "a base that is the adapter": lambda f: change_json(f, "adapter_config.json", base_model_name_or_path="."),
    "a base that is nowhere": lambda f: change_json(f, "adapter_config.json", base_model_name_or_path="../nowhere"),
    "a rank of 1e9": lambda f: change_json(f, "adapter_config.json", r=10**9),
    "a rank of words": lambda f: change_json(f, "adapter_config.json", r="a"),
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
    (PROCESSOR_CHANGES, PROCESSORS),
    (WEIGHT_CHANGES, tuple(LAYOUTS)),
    (INDEX_CHANGES, ("any_llava", "llava", "original")),
    (HEADER_CHANGES, ("any_llava", "llava", "original", "adapter")),
    (TORCH_CHANGES, ("shards", "projector")),
    (ADAPTER_CHANGES, ("adapter",)),
    (PART_CHANGES, ("original",)),
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


def make_snapshot(folder: Path) -> None:
    """The folder becomes a link to what huggingface_hub makes of a repository."""
    cache = folder.parent / "models--me--llava"
    snapshot, blobs = cache / "snapshots" / ("0" * 40), make_folder(cache / "blobs")
    shutil.copytree(folder, snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    shutil.rmtree(folder)
    folder.symlink_to(snapshot)
    if (folder.parent / "tower").is_dir():  # which the folder names by its place
        shutil.copytree(folder.parent / "tower", cache / "snapshots" / "tower")


def load(layout: str, folder: Path) -> None:
    """As the commands do, and with transformers' own class where it is the one that loads."""
    if layout == "projector":
        AutoModelForVision2Seq.from_pretrained(folder, base_model=str(folder.parent / "base"))
        return
    load_for_inference(str(folder))
    if layout in ("llava", "llava_next"):
        AutoModelForVision2Seq.from_pretrained(folder)


def measure(layout: str, folder: Path) -> dict[str, Any]:
    """What became of a folder, and what it cost: seconds of the CPU, and bytes beyond what the process had."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = read_status("VmRSS"), time.process_time()
    try:
        load(layout, folder)
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
        change, _ = (CHANGES | HARMLESS)[name]
        copy = Path(prepared) / f"copy{number}"
        shutil.copytree(Path(prepared) / layout, copy)
        change(copy / "model")
        result = measure(layout, copy / "model")
        result["asked"] = sys.stdin.tell() > 0
        sys.stdin.seek(0)
        print(json.dumps([layout, name, result]), flush=True)
        with suppress(OSError):
            shutil.rmtree(copy)


if __name__ == "__main__":
    main()
