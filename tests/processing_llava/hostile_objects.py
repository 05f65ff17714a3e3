"""Objects that are given as pictures, beside files: arrays and tensors of every kind, files that cheat, odd paths."""

import base64
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.processing_llava.image_encoders import encode, png, png_chunk

SMALL = png(8, 8, colour=2)
LARGE = png(8, 8, colour=2, before=png_chunk(b"tEXt", bytes(29_900_000)))
TWO_LINES = "a\nb\r\x1b[31m\u202e" * 50_000


class Cheat:
    """A file object: it gives what it was told to, or raises it."""

    def __init__(self, content: Any, *, seeks: Any = None) -> None:
        self.content, self.seeks = content, seeks

    def read(self, size: int = -1) -> Any:
        return give(self.content)

    def seek(self, *place: int) -> Any:
        return give(self.seeks)


class OddPath(os.PathLike):
    """A path: it gives what it was told to, or raises it."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __fspath__(self) -> Any:
        return give(self.content)


class Mute(Exception):
    """An error that cannot even be shown."""

    def __str__(self) -> str:
        raise Mute


class LazyImage(Image.Image):
    """What others make of PIL's class."""

    def load(self) -> None:
        raise OSError(TWO_LINES)


def lazy_image() -> LazyImage:
    image = LazyImage()
    image._size, image._mode = (8, 8), "L"
    return image


def give(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def image_with(mode: str = "RGB", **info: Any) -> Image.Image:
    image = Image.new(mode, (8, 8))
    image.info |= info
    return image


def closed(file: Any) -> Any:
    file.close()
    return file


def opened(data: bytes, **attributes: Any) -> Image.Image:
    """As PIL opens it, and others change it."""
    image = Image.open(io.BytesIO(data))
    image.__dict__ |= attributes
    return image


def released() -> memoryview:
    view = memoryview(SMALL)
    view.release()
    return view


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        # A prototype, as it says.
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(3, 8)])


def sparse() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.zeros(8, 8).to_sparse_csr()


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(3, 8, 8), 0.1, 0, torch.quint8)


def data_uri(data: bytes, *, breaks: bool = False) -> str:
    text = (base64.encodebytes if breaks else base64.b64encode)(data).decode()
    return f"data:image/png;base64,{text}"


def itself() -> dict:
    holder: dict[str, Any] = {}
    holder["bytes"] = holder
    return holder


ERRORS = (OSError(TWO_LINES), TimeoutError(), RuntimeError("x"), MemoryError(), EOFError(), KeyError(3), Mute())
TENSOR = torch.zeros(3, 8, 8)
HANDLED_OBJECTS: dict[str, Callable[[], Any]] = {
    "array of 12 megapixels": lambda: np.full((3000, 4000, 3), 7, np.uint8),
    "array of 12 megapixels, channels first": lambda: np.full((3, 3000, 4000), 7, np.uint8),
    "floats of 12 megapixels": lambda: np.full((3000, 4000, 3), 0.5, np.float32),
    "tensor of 12 megapixels": lambda: torch.full((3, 3000, 4000), 0.5),
    "PIL image of 24 megapixels": lambda: Image.new("RGB", (6000, 4000)),
    "view of one value as 4 megapixels": lambda: np.broadcast_to(np.float64(0.5), (2000, 2000, 3)),
    "array that is turned": lambda: np.zeros((8, 9, 3), np.uint8)[::-1, ::-1].transpose(1, 0, 2),
    "matrix": lambda: np.asmatrix(np.zeros((8, 8))),
    "tensor that requires grad": lambda: TENSOR.clone().requires_grad_(),
    "parameter": lambda: torch.nn.Parameter(TENSOR),
    "bfloat16": lambda: TENSOR.bfloat16(),
    "float8": lambda: TENSOR.to(torch.float8_e4m3fn),
    "longdouble": lambda: np.zeros((8, 8, 3), np.longdouble),
    "EXIF that is a text": lambda: image_with(exif="Exif"),
    "EXIF that is an object": lambda: image_with(exif=Image.Exif()),
    "transparency that is no level": lambda: image_with("L", transparency=999),
    "data URI of 30 MB": lambda: data_uri(LARGE),
    "data URI of 30 MB with line breaks": lambda: data_uri(LARGE, breaks=True),
    "file of 30 MB": lambda: io.BytesIO(LARGE),
    "bytearray of 30 MB": lambda: bytearray(LARGE),
    "stream without a beginning": lambda: Cheat(SMALL, seeks=OSError("a pipe")),
    "dict of datasets": lambda: {"bytes": SMALL, "path": TWO_LINES},
}
REFUSED_OBJECTS: dict[str, Callable[[], Any]] = {
    "view of one value as 64 megapixels": lambda: np.broadcast_to(np.float64(0.5), (8000, 8000, 3)),
    "view of one byte as 49 megapixels": lambda: np.broadcast_to(np.uint8(5), (7000, 7000, 3)),
    "tensor of one value as 64 megapixels": lambda: torch.tensor(0.5).expand(3, 8000, 8000),
    "view of one byte as 64 GB": lambda: memoryview(np.broadcast_to(np.uint8(5), (8000, 8000, 1000))),
    "array without dimensions": lambda: np.zeros(()),
    "array without pixels": lambda: np.zeros((8, 0, 3), np.uint8),
    "array of 30 dimensions": lambda: np.zeros((1,) * 30),
    "array of 20,000 fields": lambda: np.zeros((8, 8), [(f"field{number}", "u1") for number in range(20_000)]),
    "array with a mask": lambda: np.ma.masked_all((8, 8, 3)),
    **{
        f"array of {dtype}": lambda dtype=dtype: np.zeros((8, 8, 3), dtype)
        for dtype in ("O", "c8", "c16", "U3", "S3", "M8[s]", "m8[s]", "V4", "?")
    },
    "array of None": lambda: np.full((8, 8, 3), None),
    "array of no numbers": lambda: np.full((8, 8, 3), np.nan),
    "array of infinity": lambda: np.full((8, 8, 3), -np.inf),
    "array of huge numbers": lambda: np.full((8, 8, 3), 2**63, np.uint64),
    "one that is no number among others": lambda: np.where(np.arange(192).reshape(8, 8, 3) == 99, np.nan, 0.5),
    "sparse tensor": lambda: TENSOR.to_sparse(),
    "sparse rows": sparse,
    "tensor without memory": lambda: TENSOR.to("meta"),
    "complex tensor": lambda: TENSOR.to(torch.complex64),
    "conjugated tensor": lambda: TENSOR.to(torch.complex64).conj(),
    "negated tensor": lambda: torch._neg_view(TENSOR),
    "quantized tensor": quantized,
    "nested tensor": nested,
    "tensor of bits": lambda: TENSOR.to(torch.uint8).view(torch.bits8),
    "tensor of MKL-DNN": lambda: torch.zeros(8, 8).to_mkldnn(),
    **{f"a {type(value).__name__}": lambda value=value: value for value in (None, 3, 0.5, object, [SMALL], (), set())},
    "list of lists": lambda: [[[0, 0, 0]] * 8] * 8,
    "dict of nothing": lambda: {},
    "dict that holds itself": itself,
    "dict of other things": lambda: {"bytes": 5, "path": 7},
    "class with a long name": lambda: type(TWO_LINES.replace("\0", ""), (), {})(),
    **{f"file that raises {type(error).__name__}": lambda error=error: Cheat(error) for error in ERRORS},
    "file that raises as it is sought": lambda: Cheat(SMALL, seeks=RuntimeError("x")),
    "file of text": lambda: io.StringIO("text"),
    "file of nothing": lambda: Cheat(None),
    "file of too much": lambda: Cheat(bytes(30_000_001)),
    "file of too little": lambda: Cheat(SMALL[:20]),
    "file without an end": lambda: io.FileIO("/dev/zero"),
    "file that was closed": lambda: closed(io.BytesIO(SMALL)),
    "path that raises": lambda: OddPath(Mute()),
    "path that is a number": lambda: OddPath(5),
    "path of bytes": lambda: OddPath(b"\xff\xfe\n"),
    "path of zero": lambda: Path("a\0b"),
    "path of half a character": lambda: Path("a\ud800"),
    "path of 100,000 characters": lambda: Path(TWO_LINES),
    "path of a folder": lambda: Path("/"),
    "path of a device": lambda: Path("/dev/zero"),
    "closed image": lambda: closed(Image.new("RGB", (8, 8))),
    "image that cannot be loaded": lazy_image,
    "image whose file is gone": lambda: opened(encode(Image.new("RGB", (8, 8))), fp=None),
    "image whose file raises": lambda: opened(encode(Image.new("RGB", (8, 8))), fp=Cheat(OSError(TWO_LINES))),
    "image whose transparency is a text": lambda: image_with(transparency=TWO_LINES),
    "image with too many pixels": lambda: Image.new("1", (8000, 8000)),
    "text of 50 MB": lambda: "a" * 50_000_000,
    "text of 100,000 characters": lambda: TWO_LINES,
    "half a character": lambda: "\ud800",
    "URL of 60 MB": lambda: "http://" + "a/" * 30_000_000,
    "URL of many lines": lambda: f"http://{TWO_LINES}",
    "data URI of blanks": lambda: "data:;base64," + " " * 59_000_000,
    "data URI of 300 MB": lambda: "data:;base64," + "A" * 300_000_000,
    "data URI of other characters": lambda: "data:;base64," + "!" * 30_000_000,
    "data URI that goes on behind its end": lambda: data_uri(SMALL + b"a") + "AAAA" * 20,
    "data URI of half a character": lambda: "data:;base64,\ud800",
    "view that was released": released,
}
