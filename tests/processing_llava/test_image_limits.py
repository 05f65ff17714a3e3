"""Stripping a file changes no pixel, and every piece that Pillow would read at length is counted."""

import io
import struct

import pytest
from PIL import ExifTags, Image

from processing_llava.image_limits import MAX_JPEG_SCANS, read_orientation, strip_metadata
from processing_llava.image_loading import load_image
from tests.processing_llava.hostile_images import encode, exif_that_points_at_itself, gif, jpeg, png_chunk


def strip(data, *, max_pieces=20_000, max_frames=1000):
    return strip_metadata(data, max_pieces=max_pieces, max_frames=max_frames)


def decode(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGBA").tobytes()


def colours(mode="RGB"):
    image = Image.radial_gradient("L").resize((60, 40))
    image = Image.merge("RGB", [image, image.rotate(90), image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    return image.convert(mode)


def shown_colour():
    """The number of a colour that the picture with a palette has."""
    return colours("P").getpixel((0, 0))


def exif_block(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


FILES = {
    "JPEG": lambda: encode(colours(), "JPEG", exif=exif_block(6), comment=b"comment", icc_profile=bytes(9)),
    "progressive JPEG": lambda: encode(colours(), "JPEG", progressive=True, exif=exif_block(6)),
    "grey JPEG": lambda: encode(colours("L"), "JPEG", exif=exif_block(6)),
    "CMYK JPEG": lambda: encode(colours("CMYK"), "JPEG", exif=exif_block(6)),
    "JPEG with restarts": lambda: encode(colours(), "JPEG", restart_marker_blocks=1, exif=exif_block(6)),
    "PNG": lambda: encode(colours(), exif=exif_block(6), icc_profile=bytes(9)),
    "16-bit PNG": lambda: encode(colours("L").convert("I;16"), exif=exif_block(6)),
    "PNG with palette": lambda: encode(colours("P"), transparency=shown_colour(), exif=exif_block(6)),
    "PNG with alpha": lambda: encode(colours("RGBA"), exif=exif_block(6)),
    "WebP": lambda: encode(colours(), "WEBP", lossless=True, exif=exif_block(6)),
    "animated PNG": lambda: encode(
        colours(), save_all=True, append_images=[colours("L").convert("RGB")], exif=exif_block(6)
    ),
    "animated WebP": lambda: encode(
        colours(), "WEBP", save_all=True, append_images=[colours("L").convert("RGB")], exif=exif_block(6)
    ),
    "BMP": lambda: encode(colours(), "BMP"),
    "GIF": lambda: encode(colours("P"), "GIF", comment=b"comment", interlace=True),
    "transparent GIF": lambda: encode(colours("P"), "GIF", transparency=shown_colour(), comment=b"comment"),
    "animated GIF": lambda: encode(
        colours("P"), "GIF", save_all=True, append_images=[colours("L")], transparency=shown_colour()
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_stay_and_the_orientation_is_found(name):
    data = FILES[name]()
    stripped, orientation = strip(data)
    assert decode(stripped) == decode(data)
    assert orientation == (1 if "GIF" in name or name == "BMP" else 6)
    if "WebP" not in name:
        assert b"Camera" not in stripped and b"comment" not in stripped
    # What is stripped already stays as it is.
    assert strip(stripped)[0] == stripped


def test_an_exif_block_behind_the_pixels_of_a_png_counts():
    data = encode(colours())
    end = data.index(b"IEND") - 4
    late = data[:end] + png_chunk(b"eXIf", exif_block(6)[6:]) + data[end:]
    assert strip(late)[1] == 6
    assert load_image(late).size == (40, 60)


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_both_byte_orders(order):
    def block(*entry):
        return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LHHHLHH", 8, 1, *entry)

    assert read_orientation(block(0x0112, 3, 1, 6, 0)) == 6
    assert read_orientation(b"Exif\0\0" + block(0x0112, 3, 1, 8, 0)) == 8
    for other in ((0x0112, 3, 1, 9, 0), (0x0112, 3, 2, 6, 0), (0x0112, 4, 1, 6, 0), (0x0113, 3, 1, 6, 0)):
        assert read_orientation(block(*other)) == 1


@pytest.mark.parametrize("size", [0, 1, 5, 9, 11, 20])
def test_broken_exif_blocks_mean_as_stored(size):
    assert read_orientation(exif_block(6)[6:][:size]) == 1
    assert read_orientation(exif_that_points_at_itself(10_000)) == 1


def test_frames_are_counted():
    for data in (gif(num_frames=5), FILES["animated PNG"](), FILES["animated WebP"]()):
        assert load_image(data).mode == "RGB"
        with pytest.raises(ValueError, match=r"got an animation of \d pictures; .* ImageLimits\(max_frames=...\)"):
            strip(data, max_frames=1)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WebP", "GIF"])
def test_pieces_are_counted(name):
    data = FILES[name]()
    strip(data, max_pieces=20)
    with pytest.raises(ValueError, match=r"more than 2 pieces; .* ImageLimits\(max_pieces=...\)"):
        strip(data, max_pieces=2)


def test_pieces_behind_an_impossible_length_are_not_hidden():
    """libjpeg stops at a segment shorter than its own length; Pillow would go on inside of it."""
    hidden = b"\xff\xc4\x00\x00" + b"\xff\xc4\xff\xff" + b"a" * 65_533
    with pytest.raises(ValueError, match="no image of a known format"):
        load_image(jpeg(segments=hidden))


def test_a_block_that_pillow_misreads_is_left_out():
    """After an empty control block, Pillow would read the picture as further blocks."""
    data = gif(blocks=b"!\xf9\x00")
    assert load_image(data).tobytes() == load_image(gif()).tobytes()
    assert b"!\xf9\x00" not in strip(data)[0]


def test_scans_are_counted_up_to_the_end_of_the_image():
    many = b"\xff\xda\x00\x00" * (MAX_JPEG_SCANS + 1)
    film = FILES["JPEG"]() + bytes(2) + many
    assert load_image(film).size == (40, 60)
    # The end of an image inside of a comment, or behind a marker without length, ends nothing.
    disguises = (b"\xff\xfe\x00\x04\xff\xd9", b"\xff\x01\xff\xff")
    for disguise in disguises:
        data = jpeg(scans=MAX_JPEG_SCANS)
        last = data.rindex(b"\xff\xc4")
        with pytest.raises(ValueError, match=r"JPEG of \d\d scans; expected at most 50"):
            strip(data[:last] + disguise + data[last:])
    assert load_image(jpeg(scans=30)).size == (1000, 1000)
