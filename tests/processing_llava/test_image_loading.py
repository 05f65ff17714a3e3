"""Every mode becomes the right RGB, and every image that is damaged, foreign or too large is refused quickly."""

import base64
import io
import os
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from processing_llava.data.clean_images import clean_image
from processing_llava.data.row_lengths import read_image_size
from processing_llava.image_limits import ImageLimits, check_image_size
from processing_llava.image_loading import load_image
from tests.conftest import ROOT
from tests.processing_llava.hostile_images import encode, png, png_chunk

RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture
def corner():
    """6 wide, 4 high, black, with a red pixel at the top left."""
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), RED)
    return image


def test_bytes_path_data_uri_and_file_object_give_the_same_image(corner, tmp_path):
    data = encode(corner)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    with path.open("rb") as file:
        sources = (data, bytearray(data), path, uri, io.BytesIO(data), file)
        images = [load_image(source) for source in sources]
    for image in images:
        assert (image.mode, image.size, image.tobytes()) == ("RGB", (6, 4), corner.tobytes())


def test_line_breaks_in_a_data_uri_are_allowed(corner):
    uri = "DATA:image/png;base64," + base64.encodebytes(encode(corner)).decode()
    assert load_image(uri).tobytes() == corner.tobytes()


def test_line_breaks_in_a_data_uri_cost_no_memory(corner):
    uri = "data:image/png;base64," + "\n".join(base64.b64encode(encode(corner) + bytes(300_000)).decode())
    load_image(uri)
    tracemalloc.start()
    load_image(uri)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(uri)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats_are_told_by_content(format, tmp_path):
    path = tmp_path / "no_extension"
    path.write_bytes(encode(Image.new("RGB", (8, 8), (200, 200, 200)), format=format))
    image = load_image(path)
    assert image.mode == "RGB"
    assert all(abs(level - 200) <= 3 for level in image.getpixel((4, 4)))


def test_upright_rgb_image_is_returned_itself(corner):
    assert load_image(corner) is corner
    assert load_image(load_image(encode(corner))).tobytes() == corner.tobytes()


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("L", 128, (128, 128, 128)),
        ("LA", (0, 0), WHITE),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), RED),
        ("1", 1, WHITE),
        ("1", 0, (0, 0, 0)),
        ("I;16", 0, (0, 0, 0)),
        ("I;16", 65535, WHITE),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_modes_become_rgb(mode, pixel, expected):
    image = Image.new(mode, (3, 2), pixel)
    assert load_image(image).getpixel((1, 1)) == expected
    if mode != "CMYK":
        assert load_image(encode(image)).getpixel((1, 1)) == expected


def test_palettes_become_rgb_and_their_transparent_entries_white():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert load_image(encode(image)).getpixel((0, 0)) == RED
    assert load_image(encode(image, transparency=1)).getpixel((0, 0)) == WHITE
    assert load_image(encode(image, transparency=bytes([255, 0]))).getpixel((0, 0)) == WHITE


def test_transparent_colour_of_an_image_without_alpha_becomes_white():
    image = Image.new("RGB", (3, 2), RED)
    assert load_image(encode(image, transparency=RED)).getpixel((0, 0)) == WHITE
    assert load_image(encode(Image.new("L", (3, 2), 7), transparency=7)).getpixel((0, 0)) == WHITE


def test_transparent_level_of_16_bit_grey_becomes_white():
    image = Image.new("I;16", (3, 2), 7)
    image.putpixel((0, 0), 257 * 100)
    data = encode(image)
    end = data.index(b"IDAT") - 4
    loaded = load_image(data[:end] + png_chunk(b"tRNS", (7).to_bytes(2, "big")) + data[end:])
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 1))) == ((100, 100, 100), WHITE)


def test_premultiplied_modes_become_rgb():
    for mode in ("La", "RGBa"):
        image = Image.new(mode[:-1] + "A", (3, 2), (0,) * len(mode)).convert(mode)
        assert load_image(image).getpixel((0, 0)) == WHITE


def test_colours_of_a_cmyk_jpeg():
    red, green, blue = load_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert red > 250 and max(green, blue) < 5


@pytest.mark.parametrize("format", ["TIFF", "PPM", "TGA"])
def test_an_image_that_is_not_read_yet_has_one_of_the_formats(format, corner):
    opened = Image.open(io.BytesIO(encode(corner, format)))
    with pytest.raises(ValueError, match=f"read from a {format} file; expected one of JPEG"):
        load_image(opened)
    assert load_image(opened.copy()).tobytes() == corner.tobytes()
    assert load_image(Image.open(io.BytesIO(encode(corner, "PNG")))).tobytes() == corner.tobytes()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_of_values_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode}, whose range of values is unknown"):
        load_image(Image.new(mode, (3, 2)))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255))]
    for format in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], format=format, save_all=True, append_images=frames[1:])
        red, green, blue = load_image(data).getpixel((2, 2))
        assert red > 250 and max(green, blue) < 5


@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (6, 4), (0, 0)),
        (2, (6, 4), (5, 0)),
        (3, (6, 4), (5, 3)),
        (4, (6, 4), (0, 3)),
        (5, (4, 6), (0, 0)),
        (6, (4, 6), (3, 0)),
        (7, (4, 6), (3, 5)),
        (8, (4, 6), (0, 5)),
        (99, (6, 4), (0, 0)),
    ],
)
def test_exif_orientation_is_applied_once(corner, orientation, size, red_at):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = load_image(encode(corner, exif=exif))
    assert (image.size, image.getpixel(red_at)) == (size, RED)
    assert load_image(image).tobytes() == image.tobytes()


def test_damaged_exif_leaves_the_pixels_as_stored(corner):
    corner.info["exif"] = b"Exif\x00\x00no header of a TIFF"
    assert load_image(corner).tobytes() == corner.tobytes()


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        ({"max_side": 50}, (51, 50)),
        ({"max_pixels": 100}, (11, 10)),
        ({"max_aspect_ratio": 4}, (9, 2)),
        ({"max_aspect_ratio": 4}, (2, 9)),
    ],
)
def test_limits_name_the_size_and_how_to_raise_them(limit, size):
    (name,) = limit
    image = Image.new("RGB", size)
    for source in (image, encode(image)):
        with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels; .* ImageLimits\({name}=\.\.\.\)"):
            load_image(source, limits=ImageLimits(**limit))
        assert load_image(source).size == size


def test_thin_images_are_refused_by_default_and_allowed_by_an_argument():
    check_image_size(100, 2000)
    for height, width in ((6000, 1), (100, 8000), (2001, 100)):
        with pytest.raises(ValueError, match="max_aspect_ratio of at most 20, not"):
            check_image_size(height, width)
    # What the original does with this one is known.
    check_image_size(100, 8000, limits=ImageLimits(max_aspect_ratio=80))


def test_limits_below_one_are_refused():
    with pytest.raises(ValueError, match="max_side=0"):
        ImageLimits(max_side=0)


@pytest.mark.parametrize("size", [(30_000, 30_000), (9_000, 9_000), (2_000_000_000, 2_000_000_000), (6_000, 1)])
def test_a_header_that_announces_too_much_is_refused_before_decoding(size):
    data = png(*size, pixels=b"")
    assert len(data) < 100
    start = time.perf_counter()
    with pytest.raises(ValueError, match="ImageLimits"):
        load_image(data)
    assert time.perf_counter() - start < 0.5


def test_too_many_bytes_are_refused_without_reading_them_all(corner, tmp_path):
    limits = ImageLimits(max_bytes=1000)
    data = encode(corner) + bytes(1_000_000)
    path = tmp_path / "large.png"
    path.write_bytes(data)
    file = io.BytesIO(data)
    for source in (data, path, file, "data:image/png;base64," + base64.b64encode(data).decode()):
        with pytest.raises(ValueError, match=r"expected at most 1000; .* ImageLimits\(max_bytes=\.\.\.\)"):
            load_image(source, limits=limits)
    assert file.tell() == 1001


def test_truncated_files_are_refused():
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    for format in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        data = encode(noise, format=format)
        with pytest.raises(ValueError, match="cannot be decoded|no image of a known format"):
            load_image(data[: len(data) // 2])


def test_damaged_chunks_are_refused():
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_image(png(4, 4, pixels=b"no stream"))


def test_chunks_that_pixels_do_not_need_may_be_damaged():
    assert load_image(png(4, 4, before=png_chunk(b"gAMA", b"a"))).size == (4, 4)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_no_metadata_is_left(format, corner):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    exif[ExifTags.Base.Orientation] = 3
    comment = {} if format in ("PNG", "WEBP") else {"comment": b"at home"}
    data = encode(corner, format, **({"exif": exif} if format != "GIF" else {}), **comment)
    assert b"somebody" in data or b"at home" in data
    for source in (data, Image.open(io.BytesIO(data)), load_image(data).rotate(90)):
        image = load_image(source)
        assert (type(image), image.info, dict(image.getexif())) == (Image.Image, {}, {})


def test_the_image_that_was_given_keeps_its_metadata(corner):
    given = Image.open(io.BytesIO(encode(corner, dpi=(72, 72))))
    load_image(given)
    assert "dpi" in given.info


HIDDEN = b"somebody at home"


def exif_of_somebody(orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = HIDDEN.decode()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_what_leaves_the_machine_is_pixels_and_nothing_else(format, orientation):
    picture = Image.radial_gradient("L").convert("RGB").crop((0, 0, 60, 40))
    exif = {"exif": exif_of_somebody(orientation)} if format in ("JPEG", "PNG", "WEBP") else {}
    data = encode(picture, format, **exif) + HIDDEN
    cleaned = clean_image(data)
    assert HIDDEN not in cleaned
    assert load_image(cleaned).tobytes() == load_image(data).tobytes()
    stays = format in ("JPEG", "PNG") and orientation == 1
    assert cleaned.startswith(data[:4] if stays else b"\x89PNG")
    assert clean_image(cleaned) == cleaned


def test_a_jpeg_with_something_between_its_scans_is_encoded_again():
    data = encode(Image.new("RGB", (60, 40), RED), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    comment = b"\xff\xfe" + (2 + len(HIDDEN)).to_bytes(2, "big") + HIDDEN
    preview = b"\xff\xe0" + (7 + len(HIDDEN)).to_bytes(2, "big") + b"JFXX\0" + HIDDEN
    for hiding in (data[:last] + comment + data[last:], data[:2] + preview + data[2:]):
        cleaned = clean_image(hiding)
        assert HIDDEN in hiding and HIDDEN not in cleaned
        assert load_image(cleaned).tobytes() == load_image(data).tobytes()


def test_arrays_become_images():
    levels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for array in (levels, torch.from_numpy(levels).permute(2, 0, 1), levels.astype(np.float64), levels / 255):
        # Floats of 0..1 are truncated, as in transformers.
        assert np.abs(np.asarray(load_image(array)).astype(int) - levels).max() <= (array.max() <= 1)
    assert load_image(levels[..., 0]).getpixel((3, 1)) == (21, 21, 21)
    assert load_image(np.zeros((5, 5, 4), dtype=np.uint8)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 3, 3)), "expected .height, width. or three dimensions"),
        (np.zeros((8, 8, 5)), "expected 1, 3 or 4 channels"),
        (np.zeros((0, 8, 3)), "expected at least 1 x 1"),
        (np.zeros((1, 300), dtype=np.uint8), "max_aspect_ratio"),
        (np.full((8, 8, 3), np.nan), "expected levels of 0..255"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_read_as_images_are_loaded(format, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.effect_noise((40, 20), 80).convert("RGB"), format, exif=exif)
    assert read_image_size(data) == load_image(data).size[::-1]
    if format != "WEBP":
        # Pixels are not looked at.
        assert read_image_size(data[:-20]) == load_image(data).size[::-1]


@pytest.mark.parametrize("load", [load_image])
def test_no_text_opens_a_file(load, corner, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encode(corner))
    assert load(path)
    for text in (str(path), "missing.png", "~", "/etc/hostname", "\0", ""):
        with pytest.raises(ValueError, match="no text opens a file here; if it is your own path, pass pathlib.Path"):
            load(text)


@pytest.mark.parametrize(
    "data",
    [b"", b"just some text", b'<svg xmlns="http://www.w3.org/2000/svg"/>', b"%PDF-1.7", b"II*\x00\x08\x00\x00\x00"],
    ids=["empty", "text", "svg", "pdf", "tiff"],
)
def test_foreign_formats_are_refused_whatever_their_name(data, tmp_path):
    path = tmp_path / "renamed.png"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ValueError, match="expected one of JPEG, PNG, WEBP, GIF, BMP"):
            load_image(source)


@pytest.mark.parametrize("url", ["http://localhost/a.png", "https://a.b/c.jpg", "file:///image.png", "s3://a/b"])
def test_urls_are_refused(url):
    with pytest.raises(ValueError, match="URLs are not fetched here; download the image"):
        load_image(url)


def test_missing_file_is_named_on_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png; expected an image file") as caught:
        load_image(tmp_path / "missing.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["\0", "x" * 100_000, ""])
def test_impossible_paths_are_refused_shortly(path):
    with pytest.raises((ValueError, FileNotFoundError), match="correct") as caught:
        load_image(Path(path))
    assert len(str(caught.value)) < 300


def test_folders_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(ValueError, match="no regular file"):
            load_image(path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that opens and cannot be read")
def test_files_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="which cannot be read"):
        load_image(Path("/proc/self/mem"))


@pytest.mark.parametrize("uri", ["data:,hello", "data:image/png,abc", "data:;base64", "data:image/png;base64,$$$"])
def test_broken_data_uris_are_refused(uri):
    with pytest.raises(ValueError, match="got the data URI"):
        load_image(uri)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], io.StringIO("text")])
def test_other_types_are_refused(source):
    with pytest.raises(ValueError, match=f"got an image of type {type(source).__name__}"):
        load_image(source)


def test_nothing_else_opens_images():
    """The builders of the embedded model, which read what they made themselves, are no part of the product's door."""
    opening = {
        path.relative_to(ROOT).as_posix()
        for package in ("hub_cards", "modeling_llava", "processing_llava", "spaces_demo")
        for path in (ROOT / package).rglob("*.py")
        if "Image.open(" in path.read_text() and "tiny_llava" not in path.parts
    }
    assert opening == {"processing_llava/image_loading.py"}
