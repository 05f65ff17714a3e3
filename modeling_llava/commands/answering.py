"""`llava ask` and `llava chat`, and the pictures that somebody names on the command line.

A picture is opened, or refused with the option or the command that helps.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
from contextlib import closing, suppress
from pathlib import Path

from PIL import Image

from processing_llava.data.conversations import ADDRESS
from processing_llava.image_limits import DEFAULT_LIMITS, ImageLimits
from processing_llava.image_loading import FORMATS, OTHER_FORMATS, load_image, naming_picture

from .errors import one_line

CHAT_HELP = (
    "/image PATH adds a picture, /reset forgets, /save FILE writes the conversation, /quit leaves; Ctrl-C stops an "
    "answer"
)
CHAT_ENDS = ("/quit", "/exit", "quit", "exit")
STOPPED = "\n(stopped: question and answer are forgotten, their pictures wait for the next question)"


def run_ask(options: argparse.Namespace) -> None:
    if len(options.inputs) < 2:
        raise ValueError('got only one argument; expected pictures and a question: llava ask cat.jpg "What is this?"')
    *sources, question = options.inputs
    limits = read_image_limits(options.image_limit)
    # Pictures are opened before the model, so that a wrong path is answered at once.
    images = open_pictures(sources, limits=limits, standard_input=True)
    session = _start_session(options, limits)
    if not options.json:
        _print_answer(options, session, question, images=images)
        return
    settings = _settings(options)
    answer = "".join(session.ask(question, images=images, **settings))
    record = {"question": question, "images": sources, "answer": answer, "model": options.model or "embedded"}
    took = dataclasses.asdict(session.statistics)
    print(json.dumps(record | settings | took, ensure_ascii=False))


def run_chat(options: argparse.Namespace) -> None:
    limits = read_image_limits(options.image_limit)
    waiting = open_pictures(options.images, limits=limits)
    session = _start_session(options, limits)
    if sys.stdin.isatty():
        # With readline, input() edits lines and recalls earlier ones, from memory only. Windows has its own.
        with suppress(ImportError):
            import readline  # noqa: F401
    print(CHAT_HELP)
    while (line := _read_line()) is not None:
        command, _, names = line.partition(" ")
        try:
            if command == "/image":
                waiting += open_pictures(_split_names(names), limits=limits)
            elif command == "/reset":
                session.reset()
                waiting = []
            elif command == "/save":
                _save_conversation(session, _split_names(names))
            elif command.startswith("/"):
                print(CHAT_HELP)
            elif line:
                _print_answer(options, session, line, images=waiting)
                waiting = []
        except (ValueError, OSError) as error:
            print(one_line(error))
        except KeyboardInterrupt:
            print(STOPPED)


def _start_session(options: argparse.Namespace, limits):
    from modeling_llava.inference.chat_session import ChatSession

    model, processor = load_model(options, limits)
    return ChatSession(model, processor, system=options.system, compile=options.compile)


def load_model(options: argparse.Namespace, limits: ImageLimits):
    """The model and processor that the options of answering name, with these limits of pictures."""
    from modeling_llava.inference.loading import EMBEDDED_MODEL, load_for_inference

    model, processor = load_for_inference(
        options.model or EMBEDDED_MODEL,
        template=options.template,
        base_model=options.base_model,
        vision_tower=options.vision_tower,
        dtype=options.dtype,
        quantization=options.quantization,
        memory=options.memory,
        visual_tokens=options.visual_tokens,
    )
    processor.image_processor.limits = limits
    return model, processor


def _settings(options: argparse.Namespace) -> dict:
    return {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}


def _print_answer(options: argparse.Namespace, session, question: str, *, images: list) -> None:
    """Print an answer while it is generated."""
    # Closed at once where somebody stops it; otherwise the model goes on until the generator is collected.
    with closing(session.ask(question, images=images, **_settings(options))) as answer:
        for piece in answer:
            print(piece, end="", flush=True)
    print()


def _read_line() -> str | None:
    """What is typed next; None at the end. Ctrl-C begins the line anew."""
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None
        else:
            return None if line.lower() in CHAT_ENDS else line


def _split_names(text: str) -> list[str]:
    """Names of files as in a shell; one that exists may have spaces without quotes.

    Raises:
        ValueError: if there is none, or a quote is not closed.
    """
    text = text.strip()
    if ADDRESS.match(text) or os.path.exists(os.path.expanduser(text)):
        return [text]
    try:
        names = shlex.split(text)
    except ValueError:
        names = []
    if not names:
        raise ValueError(f"got {text!r}; expected the name of a file, in quotes if there are spaces in it")
    return names


def _save_conversation(session, names: list[str]) -> None:
    if len(names) != 1:
        raise ValueError(f"got {len(names)} names; expected one file to write, in quotes if there are spaces in it")
    turns = []
    for message in session.messages:
        content = message["content"]
        items = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = "".join(item["text"] for item in items if item["type"] == "text")
        num_images = sum(item["type"] == "image" for item in items)
        turns.append({"role": message["role"], "text": text, "images": num_images})
    Path(os.path.expanduser(names[0])).write_text(json.dumps(turns, ensure_ascii=False, indent=1) + "\n")


# Pictures that somebody names.

_CONVERTERS = {
    "HEIC": ("pillow-heif", "import pillow_heif; pillow_heif.open_heif(argv[1]).to_pillow().save(argv[2])"),
    "PDF": ("pypdfium2", "import pypdfium2; pypdfium2.PdfDocument(argv[1])[0].render(scale=2).to_pil().save(argv[2])"),
    "SVG": ("resvg_py", "import resvg_py; open(argv[2], 'wb').write(bytes(resvg_py.svg_to_bytes(svg_path=argv[1])))"),
}
"""Package that pip has to install first, and the Python that makes a PNG, by format."""
_READ_BY_PILLOW = ("AVIF", "ICO", "JPEG 2000", "PSD", "TIFF")
# PNG holds 16-bit grey and transparency as they are; what it does not hold, such as CMYK, has colours of its own.
_BY_PILLOW = (
    None,
    "from PIL.Image import open; image = open(argv[1]); "
    "modes = ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I', 'I;16'); "
    "(image if image.mode in modes else image.convert('RGB')).save(argv[2])",
)
_PYTHON_HINT = re.compile(r"ImageLimits\((\w+)=\.\.\.\)(?: or --image-limit \1=\.\.\.)?")


def read_image_limits(settings: list[str], default: ImageLimits = DEFAULT_LIMITS) -> ImageLimits:
    """The limits that `--image-limit` sets by texts such as "max_pixels=200000000", and the others as they are by
    default; Pillow's own, which no option sets, gives way.

    Raises:
        ValueError: naming the text that sets none.
    """
    kinds, chosen = {field.name: field.type for field in dataclasses.fields(ImageLimits)}, {}
    for setting in settings:
        name, _, number = setting.partition("=")
        try:
            chosen[name] = kinds[name](number)
        except (KeyError, ValueError) as error:
            raise ValueError(f"got {setting!r}; expected NAME=NUMBER with one of {', '.join(kinds)}") from error
    limits = dataclasses.replace(default, **chosen)
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limits.max_pixels)
    return limits


def name_option(text: str) -> str:
    """A message whose hint for Python is one for the command line."""
    return _PYTHON_HINT.sub(r"--image-limit \1=NUMBER", text)


def open_pictures(
    sources: list[str], *, limits: ImageLimits, standard_input: bool = False
) -> list[Path | str | bytes]:
    """Pictures of paths and data URIs, and of "-" if that means the standard input, which a model can be given.

    Raises:
        FileNotFoundError: there is no file at a path.
        ValueError: a picture is refused; the message names it.
    """
    # What the user of a terminal types may name any file of theirs.
    opened = [source if ADDRESS.match(source) else Path(os.path.expanduser(source)) for source in sources]
    if standard_input:
        opened = [sys.stdin.buffer.read(limits.max_bytes + 1) if path == Path("-") else path for path in opened]
    for path in opened:
        if isinstance(path, Path) and (kind := find_kind(path)):
            command = write_conversion(path, kind)
            raise ValueError(
                f"{path}: got a file of {kind}; expected one of {', '.join(FORMATS)}; convert it: {command}"
            )
    try:
        for number, source in enumerate(opened, start=1):
            with naming_picture(number, len(opened)):
                load_image(source, limits=limits, shortest_edge=1)
    except ValueError as error:
        raise ValueError(name_option(str(error))) from error
    return opened


def find_kind(path: Path) -> str | None:
    """The format of a file that this package does not open and a command here converts; None for any other path."""
    try:
        # Opening a pipe would wait for somebody who writes.
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            beginning = file.read(1000)
    except OSError:
        return None
    kinds = (*_CONVERTERS, *_READ_BY_PILLOW)
    return next((kind for kind in kinds if re.match(OTHER_FORMATS[kind][0], beginning, flags=re.DOTALL)), None)


def write_conversion(path: Path, kind: str) -> str:
    """The command that writes a PNG beside a file."""
    package, code = _CONVERTERS.get(kind, _BY_PILLOW)
    python = [sys.executable, "-c", f"from sys import argv; {code}", str(path), f"{path}.png"]
    install = [[sys.executable, "-m", "pip", "install", package]] if package else []
    return " && ".join(shlex.join(command) for command in [*install, python])
