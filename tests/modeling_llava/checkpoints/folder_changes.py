"""Whole folders in every layout, and what strangers might do to one: the parts of `hostile_folders.py`."""

import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from modeling_llava import AnyLlavaForConditionalGeneration
from tests import original_folders as folders
from tests.conftest import GOLDENS
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
    # transformers' own add_adapter asks for a PEFT that is not published (5.24).
    adapted = get_peft_model(model, LoraConfig(target_modules=r"model\.language_model\..*\.(q_proj|v_proj)"))
    adapted.save_pretrained(folder / "model")
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
    config.get("text_config", config).update(fields)
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


def change_pictures(folder: Path, **fields) -> None:
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"].update(fields)
    (folder / "processor_config.json").write_text(json.dumps(config))


def write_pieces(folder: Path, *pieces: str) -> None:
    """A tokenizer.model with further pieces, which an original folder reads before its tokenizer.json."""
    model = sentencepiece_model.ModelProto()
    model.ParseFromString((GOLDENS / "tokenizer.model").read_bytes())
    for piece in pieces:
        model.pieces.add(piece=piece, score=0.0)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def write_archive(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


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
