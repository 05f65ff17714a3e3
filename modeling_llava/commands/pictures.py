"""Pictures that somebody names on the command line: opened, or refused with the option or the command that helps."""

import os
import re
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

from PIL import Image

from processing_llava.data.conversations import ADDRESS
from processing_llava.image_limits import DEFAULT_LIMITS, ImageLimits
from processing_llava.image_loading import FORMATS, OTHER_FORMATS, load_image, naming_picture

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
_PYTHON_HINT = re.compile(r"ImageLimits\((\w+)=\.\.\.\)")


def read_image_limits(settings: list[str], default: ImageLimits = DEFAULT_LIMITS) -> ImageLimits:
    """The limits that `--image-limit` sets by texts such as "max_pixels=200000000", and the others as they are by
    default; Pillow's own, which no option sets, gives way.

    Raises:
        ValueError: naming the text that sets none.
    """
    kinds, chosen = {field.name: field.type for field in fields(ImageLimits)}, {}
    for setting in settings:
        name, _, number = setting.partition("=")
        try:
            chosen[name] = kinds[name](number)
        except (KeyError, ValueError) as error:
            raise ValueError(f"got {setting!r}; expected NAME=NUMBER with one of {', '.join(kinds)}") from error
    limits = replace(default, **chosen)
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
