"""Random files, records, texts and folders: `python -m tests.fuzz images|objects|records|messages|texts|folders`.

Whatever comes, an image, be it a file or any object, is loaded or refused with a ValueError of one line, a record is
used or refused, and messages become ids or a ValueError: within 2 seconds and 256 MB. No text of a message becomes a
control token, in every template with every tokenizer; large vocabularies are read anew there, which takes longer. A
folder loads, or is refused in one line, and nobody is asked. The seed of a failure is printed with the smallest input
that fails. Memory is capped by the system, so that asking for more is an error too; what does not end within a minute
is stopped with a traceback.
"""

import argparse
import base64
import faulthandler
import math
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from processing_llava.data.data_check import RecordCheck
from processing_llava.data.row_lengths import read_image_size
from processing_llava.image_limits import ImageLimits
from processing_llava.image_loading import load_image
from processing_llava.templates import load_template
from tests.conftest import GOLDENS
from tests.fuzz_folders import FOLDERS, build_folder_check
from tests.processing_llava.hostile_images import HANDLED, OF_ANY_SIZE, REFUSED
from tests.processing_llava.hostile_objects import ERRORS, Cheat
from tests.processing_llava.hostile_texts import TEMPLATES, TEXTS, TOKENIZERS, check_texts, load_any_tokenizer
from tests.processing_llava.image_encoders import png, png_chunk
from tests.processing_llava.test_image_arrays import NUMPY_TYPES, TORCH_TYPES
from tests.processing_llava.test_image_limits import FILES
from tests.tiny import tiny_processor

MAX_SECONDS = 2.0
MAX_BYTES = 256 * 2**20
MAX_WAIT = 60
# Memory grows with pixels: up to four copies of four bytes each.
LIMITS = ImageLimits(max_pixels=4_000_000)
EXAMPLES = 100

SEEDS = [build() for build in FILES.values()]
SEEDS += [build(60, 40) for build in OF_ANY_SIZE.values()]
SEEDS += [data for data in (build() for build in {**HANDLED, **REFUSED}.values()) if len(data) < 20_000]
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


@st.composite
def image_files(draw: st.DrawFn) -> bytes:
    """A file of the tests with a few changes, or bytes of any kind."""
    data = bytearray(draw(st.sampled_from(SEEDS) | st.binary(max_size=200)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 200)))
        change = draw(st.sampled_from(["number", "bytes", "remove", "repeat", "cut", "join"]))
        if change == "number":
            size, order = draw(st.sampled_from([(1, "big"), (2, "big"), (2, "little"), (4, "big"), (4, "little")]))
            number = draw(st.sampled_from(NUMBERS)) & (256**size - 1)
            data[start : start + size] = number.to_bytes(size, order)
        elif change == "bytes":
            data[start:stop] = draw(st.binary(max_size=20))
        elif change == "remove":
            del data[start:stop]
        elif change == "repeat":
            data[start:stop] = data[start:stop] * draw(st.sampled_from([2, 50, 2000]))
        elif change == "cut":
            del data[start:]
        else:
            data[start:start] = draw(st.sampled_from(SEEDS))
    return repair_png(bytes(data)) if draw(st.booleans()) else bytes(data)


def repair_png(data: bytes) -> bytes:
    """With checksums that are right, so that more than the first chunk is read."""
    if not data.startswith(b"\x89PNG"):
        return data
    pieces, position = [data[:8]], 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        content = data[position + 8 : position + 8 + length]
        pieces.append(png_chunk(data[position + 4 : position + 8], content))
        position += 12 + length
    return b"".join(pieces)


def check_image(data: object) -> None:
    # Nothing is decoded here, so that the usual limits must do.
    with suppress(ValueError):
        read_image_size(data)
    try:
        image = load_image(data, limits=LIMITS)
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, error
        return
    assert image.mode == "RGB" and not image.info
    assert read_image_size(data, limits=LIMITS) == image.size[::-1]


@st.composite
def objects(draw: st.DrawFn) -> object:
    """Arrays and tensors of any type, shape and values, files that give anything, and texts."""
    kind = draw(st.sampled_from(["array", "tensor", "file", "text", "dict"]))
    content = draw(st.sampled_from(SEEDS) | st.binary(max_size=200) | st.text(max_size=20) | st.none() | st.integers())
    if kind == "file":
        return Cheat(draw(st.sampled_from([content, *ERRORS])), seeks=draw(st.sampled_from([None, *ERRORS])))
    if kind == "text":
        data = content if isinstance(content, bytes) else b""
        return draw(st.text(max_size=30)) + "," + base64.b64encode(data).decode() + draw(st.text("=A\n", max_size=9))
    if kind == "dict":
        return {"bytes": content, "path": draw(st.text() | st.text().map(Path) | st.none())}
    shape = draw(st.lists(st.sampled_from([0, 1, 3, 4, 5, 20, 3000]), max_size=4))
    value = draw(st.integers(-1, 256) | st.floats())
    if kind == "tensor":
        array, dtype = torch.tensor(value).expand(shape), draw(st.sampled_from(TORCH_TYPES))
    else:
        array, dtype = np.broadcast_to(value, shape), draw(st.sampled_from(NUMPY_TYPES))
    # Larger ones stay views of one value; some numbers have no place in some types.
    with suppress(NotImplementedError, OverflowError, RuntimeError, TypeError, ValueError):
        if math.prod(shape) < 10**5:
            return array.to(dtype) if kind == "tensor" else array.astype(dtype)
    return array


PATHS = ["a.png", "inside.png", "outside.png", "loop.png", str(GOLDENS / "tokenizer.model")]
KEYS = [
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "path",
]
WORDS = [
    "human",
    "gpt",
    "user",
    "assistant",
    "system",
    "image",
    "text",
    "<image>",
    "</s>",
    "USER:",
    "\ud800",
    "/etc",
    "..",
    "file:///etc/hostname",
    "https://localhost/a.png",
    "data:;base64,AA",
    "<|im_start|>",
    *PATHS,
]
WORDS_AND_TEXTS = st.sampled_from(WORDS + KEYS) | st.text(max_size=8) | st.lists(st.sampled_from(WORDS)).map("\n".join)
VALUES = st.recursive(
    WORDS_AND_TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.sampled_from(KEYS), values, max_size=4),
    max_leaves=12,
)
IMAGES = st.sampled_from([path.read_bytes() for path in (GOLDENS / "images").glob("[ct]*.png")]) | VALUES
ITEMS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}, optional={"text": WORDS_AND_TEXTS}) | VALUES
)
TURNS = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(WORDS), "value": WORDS_AND_TEXTS})
    | st.fixed_dictionaries({"role": st.sampled_from(WORDS), "content": WORDS_AND_TEXTS | ITEMS})
    | VALUES,
    max_size=5,
)
RECORDS = VALUES | st.fixed_dictionaries(
    {}, optional={"id": VALUES, "conversations": TURNS, "messages": TURNS, "image": IMAGES, "images": st.lists(IMAGES)}
)


def fill_folder() -> tempfile.TemporaryDirectory:
    """A picture, and links that lead to it, elsewhere, and nowhere."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    (root / "a.png").write_bytes(png(8, 8))
    for name, target in (("inside", "a.png"), ("outside", GOLDENS / "tokenizer.model"), ("loop", "loop.png")):
        (root / f"{name}.png").symlink_to(target)
    return folder


def build_record_check() -> Callable[[object], None]:
    check = RecordCheck(tiny_processor(), max_length=150, too_long="split")
    # It is there as long as the object is.
    folder = fill_folder()

    def check_record(record: object) -> None:
        root = Path(folder.name)
        rows, refused = check(record, 0, image_folder=root)
        assert rows or refused
        assert all(row.num_tokens <= 150 for row in rows)
        paths = {image for row in rows for image in row.row["images"] if isinstance(image, Path)}
        assert paths <= {root.resolve() / "a.png"}, paths

    return check_record


PICTURES = dict.fromkeys(("image", "path", "url", "base64"), IMAGES) | {
    "image_url": st.fixed_dictionaries({"url": IMAGES})
}
CONTENT = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "image_url"])}, optional={"text": WORDS_AND_TEXTS} | PICTURES
    )
    | VALUES,
    max_size=4,
)
MESSAGES = VALUES | st.lists(
    st.fixed_dictionaries(
        {"role": WORDS_AND_TEXTS, "content": WORDS_AND_TEXTS | CONTENT}, optional={"tool_calls": VALUES}
    )
    | VALUES,
    max_size=4,
)


def build_message_check() -> Callable[[object], None]:
    processor = tiny_processor()
    templates = [load_template(name) for name in ("vicuna_v1", "llava_v0", "plain")]

    def check_messages(messages: object) -> None:
        for template in templates:
            with suppress(ValueError):
                processor.apply_chat_template(messages, template, tokenize=True, return_dict=True)

    return check_messages


HOSTILE = st.tuples(
    st.sampled_from(list(TEMPLATES)), st.sampled_from(TOKENIZERS), st.lists(st.tuples(*[TEXTS] * 4), max_size=50)
)


def build_text_check() -> Callable[[object], None]:
    for name in TOKENIZERS:
        load_any_tokenizer(name)

    def check_many(value: object) -> None:
        template, tokenizer, rows = value or (next(iter(TEMPLATES)), TOKENIZERS[0], [])
        for texts in rows:
            check_texts(template, tokenizer, list(texts), Counter())

    return check_many


@dataclass(frozen=True)
class Target:
    """What is tried, and what one input may cost."""

    inputs: st.SearchStrategy
    build: Callable[[], Callable[[object], None]]
    max_seconds: float = MAX_SECONDS
    max_bytes: int = MAX_BYTES


TARGETS = {
    "images": Target(image_files(), lambda: check_image),
    "objects": Target(objects(), lambda: check_image),
    "records": Target(RECORDS, build_record_check),
    "messages": Target(MESSAGES | st.lists(MESSAGES, max_size=3), build_message_check),
    # Encoders of Gemma 3 take a gigabyte while they are made, and seconds.
    "texts": Target(HOSTILE, build_text_check, max_seconds=30.0, max_bytes=6 * 2**30),
    # Mapped files and threads of torch take addresses, if no memory.
    "folders": Target(FOLDERS, build_folder_check, max_bytes=2**30),
}


def limit_memory(max_bytes: int) -> None:
    """Bounds what this process takes from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + max_bytes, used + max_bytes))


def run(target: str, *, seconds: float, seed: int) -> int:
    """The number of inputs that were tried."""
    chosen = TARGETS[target]
    check = chosen.build()
    num_inputs = 0

    def check_cost(value: object) -> None:
        nonlocal num_inputs
        num_inputs += 1
        start = time.thread_time()
        faulthandler.dump_traceback_later(MAX_WAIT, exit=True)
        check(value)
        faulthandler.cancel_dump_traceback_later()
        cost = time.thread_time() - start
        assert cost < chosen.max_seconds, f"it took {cost:.1f} seconds"

    check_cost(b"")
    limit_memory(chosen.max_bytes)
    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sys.stderr.write(f"\r{target}: seed {seed}, {num_inputs} inputs")
        hypothesis.seed(seed)(settings(given(chosen.inputs)(check_cost)))()
        seed += 1
    sys.stderr.write("\n")
    return num_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="another one each time by default")
    arguments = parser.parse_args()
    # Pillow warns of much that it then refuses.
    warnings.simplefilter("ignore")
    run(arguments.target, seconds=arguments.seconds, seed=arguments.seed)


if __name__ == "__main__":
    main()
