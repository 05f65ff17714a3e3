"""What an error about a picture advises is run, and gives the picture; the file is named where there is one."""

import io
import logging
import pathlib
import re
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from PIL import Image
from transformers.utils.logging import warning_once

from modeling_llava.cli import main
from modeling_llava.commands.answering import read_image_limits
from processing_llava.data.clean_images import clean_image
from processing_llava.data.row_lengths import read_image_size
from processing_llava.image_limits import DEFAULT_LIMITS, ImageLimits
from processing_llava.image_loading import OTHER_FORMATS, load_image

LEVELS = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
EXPECTED = np.rint(LEVELS / 257)
COLOURS = Image.fromarray(np.stack([EXPECTED.astype(np.uint8)] * 3, axis=-1))


def encode(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def follow(error: Exception | str, **names):
    """What the code behind "pass" in a message gives."""
    code = re.search(r"pass (.*?)(, with|; the file|$)", str(error))[1]
    return eval(code, {"numpy": np, "PIL": PIL, "pathlib": pathlib, **names})


def check(loaded: Image.Image, expected: np.ndarray = EXPECTED, *, within: float = 1) -> None:
    assert np.abs(np.asarray(loaded).astype(float)[..., 0] - expected).max() <= within


@pytest.mark.parametrize("mode", ["I;16", "RGB", "L", "CMYK", "LAB", "I;16B"])
def test_advice_for_a_tiff_that_is_open(tmp_path, mode):
    grey = Image.fromarray(LEVELS)
    if mode == "LAB":
        profiles = (PIL.ImageCms.createProfile("sRGB"), PIL.ImageCms.createProfile("LAB"))
        image = PIL.ImageCms.profileToProfile(COLOURS, *profiles, outputMode="LAB")
    else:
        image = grey if mode.startswith("I;16") else COLOURS.convert(mode)
    image.save(tmp_path / "a.tif")
    opened = Image.open(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="read from a TIFF file.* the file is 'a.tif'") as caught:
        load_image(opened)
    advised = follow(caught.value, image=opened)
    if mode == "LAB":
        with pytest.raises(ValueError, match="mode LAB") as caught:
            load_image(advised)
        advised = follow(caught.value, image=advised)
    check(load_image(advised), within=3)


@pytest.mark.parametrize("format", ["TIFF", "AVIF", "JPEG2000"])
def test_advice_for_files_that_pillow_opens(tmp_path, format):
    path = tmp_path / f"a.{format.lower()}"
    COLOURS.resize((32, 32)).save(path, format)
    for read in (load_image, read_image_size, clean_image):
        with pytest.raises(ValueError, match="expected one of JPEG.*save it as PNG") as caught:
            read(path)
    advised = follow(caught.value, path=path)
    check(load_image(advised), np.asarray(COLOURS.resize((32, 32)))[..., 0].astype(float), within=12)
    advised.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (32, 32)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1", "HEIC"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<svg onload=alert(1)>", "SVG"),
        (b'<?xml version="1.0"?>\n<!-- a -->\n<svg>', "SVG"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"\xff\x0a", "JPEG XL"),
        (b"8BPS", "PSD"),
    ],
)
def test_other_formats_have_their_names(tmp_path, start, name):
    (tmp_path / "a.bin").write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match=f"got a file of {name}; .*save it") as caught:
        load_image(tmp_path / "a.bin")
    assert OTHER_FORMATS[name][1] in str(caught.value)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_advice_for_modes_without_a_range(mode):
    image = Image.fromarray(LEVELS.astype({"I": np.int32, "F": np.float32}[mode]))
    with pytest.raises(ValueError, match=f"mode {mode}") as caught:
        load_image(image)
    check(load_image(follow(caught.value, image=image, white=65535)))


@pytest.mark.parametrize(
    "array", [LEVELS, LEVELS.astype(np.float32), torch.from_numpy(LEVELS.astype(np.int32))], ids=str
)
def test_advice_for_arrays(array):
    with pytest.raises(ValueError, match="got an image array") as caught:
        load_image(array)
    check(load_image(follow(caught.value, image=array, white=65535)))


def test_advice_for_a_text(tmp_path):
    COLOURS.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="pathlib.Path") as caught:
        load_image(str(tmp_path / "a.png"))
    assert "pass pathlib.Path(...)" in str(caught.value)
    check(load_image(pathlib.Path(tmp_path / "a.png")))


@pytest.mark.parametrize("num_bits", [8, 10, 12, 14])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_fewer_bits_than_the_file_has_are_a_line(caplog, num_bits, format):
    white = 2**num_bits - 1
    image = Image.open(io.BytesIO(encode(Image.fromarray((LEVELS // (65535 // white)).clip(max=white)), format)))
    image = image.copy() if format == "TIFF" else image
    text = warn(lambda: load_image(image))
    assert f"levels need {num_bits} bits" in text
    check(load_image(follow(text.strip(), image=image)), within=2)


def warn(action) -> str:
    """What is logged, though it was before."""
    logger = logging.getLogger("processing_llava.image_decoding")
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        action()
    finally:
        logger.removeHandler(handler)
    return "\n".join(records)


def test_sixteen_bits_that_are_used_and_black_are_silent():
    for image in (Image.fromarray(LEVELS), Image.fromarray(LEVELS * 0), COLOURS, COLOURS.convert("L")):
        assert warn(lambda image=image: load_image(encode(image, "PNG"))) == ""


def test_dark_colours_of_16_bits_are_a_line():
    rows = np.full((30, 40, 3), 4095, ">u2")
    assert "levels need 12 bits" in warn(lambda: load_image(write_png_of_16_bits(rows)))
    assert warn(lambda: load_image(write_png_of_16_bits(rows * 15))) == ""


def write_png_of_16_bits(rows: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["damaged.png", "large.png", "empty.png", "drawing.svg", "thin.png"])
def test_errors_name_the_file_but_not_its_folder(tmp_path, name):
    data = {
        "damaged.png": encode(COLOURS, "PNG")[:-30],
        "large.png": encode(Image.new("L", (21_000, 1100)), "PNG"),
        "thin.png": encode(Image.new("L", (300, 1)), "PNG"),
        "empty.png": b"",
        "drawing.svg": b"<svg>",
    }[name]
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, {"bytes": data or None, "path": tmp_path / name}):
        with pytest.raises(ValueError, match=f"; the file is '{name}'") as caught:
            load_image(source)
        assert str(caught.value).count(name) == 1 and str(tmp_path) not in str(caught.value)


def test_limits_name_the_option_and_it_works(tmp_path, capsys):
    Image.new("RGB", (300, 10)).save(tmp_path / "thin.png")
    assert main(["ask", str(tmp_path / "thin.png"), "What?"]) == 2
    option = re.search(r"(--image-limit) (max_aspect_ratio)=", capsys.readouterr().err)
    assert load_image(tmp_path / "thin.png", limits=read_image_limits([f"{option[2]}=40"])).size == (300, 10)
    assert ImageLimits(max_aspect_ratio=40) != DEFAULT_LIMITS
