"""Image files of any size made of a few bytes: what no encoder writes and every decoder reads.

Pixels are whatever a decoder makes of zeros; what counts is what they cost it.
"""

import io
import struct
import zlib

from PIL import Image

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int,
    height: int,
    *,
    before: bytes = b"",
    pixels: bytes | None = None,
    depth: int = 8,
    colour: int = 0,
    filter: int = 0,
    interlace: int = 0,
) -> bytes:
    """Black, with chunks in front of the pixels; `colour` is 0 for grey, 2 RGB, 3 palette, 4 and 6 with alpha."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    if pixels is None:
        # Passes of an interlaced image have more rows; what is too much is not read.
        row = bytes([filter]) + bytes((width * depth * PNG_CHANNELS[colour] + 7) // 8)
        pixels = zlib.compress(row * height * (1 + interlace), 9 if len(row) * height < 10**6 else 1)
    end = png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + end


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg_scan(names: range, *, first: int = 0, last: int = 63, high: int = 0, data: bytes = b"") -> bytes:
    """A pass over coefficients of components; it refines what the bits above `high` told."""
    header = bytes([len(names)]) + b"".join(bytes([name, 0]) for name in names) + bytes([first, last, high << 4])
    return jpeg_segment(0xDA, header) + data


JPEG_QUANTA = jpeg_segment(0xDB, bytes(1) + bytes([1]) * 64)
# Bits of zeros mean a difference of zero, and that the next 16,384 blocks hold nothing.
_JPEG_CODES = jpeg_segment(0xC4, bytes([0x00, 1, *[0] * 15, 0x00])) + jpeg_segment(
    0xC4, bytes([0x10, 1, *[0] * 15, 0xE0])
)


def jpeg_frame(
    marker: int, width: int, height: int, scans: bytes, *, factors: tuple[int, ...] = (0x11,) * 3, tables: bytes = b""
) -> bytes:
    """A JPEG whose components are called 1, 2, ... and have these sampling factors."""
    components = b"".join(bytes([name, factor, 0]) for name, factor in enumerate(factors, start=1))
    frame = jpeg_segment(marker, struct.pack(">BHHB", 8, height, width, len(factors)) + components)
    return b"\xff\xd8" + JPEG_QUANTA + tables + frame + scans + b"\xff\xd9"


def progressive_jpeg(
    width: int, height: int, *, scans: int, components: int = 3, refines: bool = False, averages: bool = False
) -> bytes:
    """Nothing at all, said again and again; of averages, with a bit for each block."""
    num_blocks = -(-width // 8) * -(-height // 8)
    names = range(1, components + 1)
    passes = [jpeg_scan(names, last=0, data=bytes(num_blocks * components // 8 + 8))]
    passes *= scans if averages else 1
    for number in range(scans - len(passes)):
        passes.append(
            jpeg_scan(
                range(number % components + 1, number % components + 2),
                first=1,
                high=int(refines),
                data=bytes(num_blocks * 15 // 16384 // 8 + 8),
            )
        )
    return jpeg_frame(0xC2, width, height, b"".join(passes), factors=(0x11,) * components, tables=_JPEG_CODES)


def arithmetic_jpeg(width: int, height: int, *, scans: int = 1, components: int = 3) -> bytes:
    """No data at all, for which such a decoder takes zeros."""
    factors, names = (0x11,) * components, range(1, components + 1)
    if scans == 1:
        return jpeg_frame(0xC9, width, height, jpeg_scan(names), factors=factors)
    passes = [jpeg_scan(names, last=0)]
    passes += [jpeg_scan(range(1 + n % components, 2 + n % components), first=1) for n in range(scans - 1)]
    return jpeg_frame(0xCA, width, height, b"".join(passes), factors=factors)


def sequential_jpeg(width: int, height: int, *, restarts: bool = False) -> bytes:
    """One scan for each component, so that all coefficients are kept."""
    data = bytes(-(-width // 8) * -(-height // 8) * 2 // 8 + 8)
    tables = jpeg_segment(0xC4, bytes([0x00, 1, *[0] * 15, 0])) + jpeg_segment(0xC4, bytes([0x10, 1, *[0] * 15, 0]))
    scans = b"".join(jpeg_scan(range(name, name + 1), data=data) for name in (1, 2, 3))
    return jpeg_frame(0xC0, width, height, scans, tables=tables)


def gif_canvas(width: int, height: int) -> bytes:
    """One pixel of it."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"


def riff(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<L", len(chunks) + 4) + b"WEBP" + chunks


def riff_chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<L", len(content)) + content + bytes(len(content) % 2)


def vp8l(width: int, height: int) -> bytes:
    """The content of a lossless WebP of one colour, in which a pixel takes no bit."""
    bits = 0x2F | (width - 1) << 8 | (height - 1) << 22
    # No transform, no cache of colours, one group of codes, and five codes of one symbol each.
    for number in range(5):
        bits |= 0b0001 << (40 + 3 + 4 * number)
    return bits.to_bytes(10, "little")


def lossless_webp(width: int, height: int) -> bytes:
    return riff(riff_chunk(b"VP8L", vp8l(width, height)))


class BitWriter:
    """The lowest bit of each byte first."""

    def __init__(self) -> None:
        self.bits: list[str] = []

    def write(self, value: int, num_bits: int) -> None:
        self.bits.append(f"{value:0{num_bits}b}"[::-1] if num_bits else "")

    def write_symbol(self, symbol: int) -> None:
        """A code of one symbol, which then takes no bit."""
        self.write(0b101 if symbol > 1 else 0b001, 3)
        self.write(symbol, 8 if symbol > 1 else 1)

    def write_bytes_code(self, num_symbols: int) -> None:
        """A code of 8 bits for each of 256 symbols, whose bits are those of the symbol, the highest first."""
        self.write(0, 1)
        self.write(8, 4)
        for length in (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8):
            self.write(int(length in (0, 8)), 3)
        self.write(0, 1)
        for symbol in range(num_symbols):
            self.write(int(symbol < 256), 1)

    def write_longest_code(self, num_symbols: int) -> None:
        """A code of 256 symbols whose tables are large: 31 beginnings of 8 bits, with codes of 9 to 15 bits."""
        lengths = [*(9, 10, 11, 12, 13, 14, 15, 15) * 31, 1, 2, 3, 8, *[0] * (num_symbols - 252)]
        self.write(0, 1)
        self.write(15, 4)
        for length in (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15):
            self.write(4 if length < 16 else 0, 3)
        self.write(0, 1)
        for length in lengths:
            self.write(int(f"{length:04b}"[::-1], 2), 4)

    def close(self) -> bytes:
        bits = "".join(self.bits)
        return int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")


def vp8l_of_groups(
    width: int, height: int, *, groups: int, has_header: bool = True, block_bits: int = 2, longest: bool = False
) -> bytes:
    """A lossless picture whose blocks take one group of codes after the other."""
    out = BitWriter()
    if has_header:
        out.write(0x2F | (width - 1) << 8 | (height - 1) << 22, 40)
    # No transform, no cache of colours, groups, and the picture that tells them, which has no cache either.
    out.write(0b100, 3)
    out.write(block_bits - 2, 3)
    out.write(0, 1)
    out.write_bytes_code(280)
    out.write_bytes_code(256)
    for _ in range(3):
        out.write_symbol(0)
    for number in range(-(-width >> block_bits) * -(-height >> block_bits)):
        for byte in ((number % groups) & 0xFF, (number % groups) >> 8):
            out.write(int(f"{byte:08b}"[::-1], 2), 8)
    for _ in range(groups):
        for num_symbols in (280, 256, 256, 256):
            if longest:
                out.write_longest_code(num_symbols)
            else:
                out.write_symbol(0)
        out.write_symbol(0)
    if longest:
        out.write(0, 64)
    return out.close() + bytes(width * height if longest else 0)


def webp_of_groups(width: int, height: int, *, groups: int, **options) -> bytes:
    return riff(riff_chunk(b"VP8L", vp8l_of_groups(width, height, groups=groups, **options)))


def webp_of_transparent_groups(width: int, height: int, *, groups: int) -> bytes:
    """A lossy picture, and its transparency compressed as a lossless one."""
    lossy = encode(Image.new("RGB", (width, height)), "WEBP", quality=1)
    alpha = b"\1" + vp8l_of_groups(width, height, groups=groups, has_header=False)
    canvas = struct.pack("<L", 0x10) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return riff(riff_chunk(b"VP8X", canvas) + riff_chunk(b"ALPH", alpha) + lossy[12:])


def animated_webp(width: int, height: int, frame: bytes, size: tuple[int, int], *, frames: int = 2) -> bytes:
    """A small picture, the content of a file, on a large canvas."""
    canvas = struct.pack("<L", 0x02 | 0x10) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
    content = bytes(6) + sides + (100).to_bytes(3, "little") + b"\0" + frame
    chunks = riff_chunk(b"VP8X", canvas) + riff_chunk(b"ANIM", bytes(6)) + riff_chunk(b"ANMF", content) * frames
    return riff(chunks)


def bmp(width: int, height: int, *, bits: int = 24, rows: bytes | None = None) -> bytes:
    """Without rows, or with those that are given."""
    palette = bytes(4) * (1 << bits if bits <= 8 else 0)
    rows = bytes((width * bits + 31) // 32 * 4) * height if rows is None else rows
    start = 54 + len(palette)
    header = struct.pack("<LLLHHLLLLLL", 40, width, height, 1, bits, 0, len(rows), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<LLL", start + len(rows), 0, start) + header + palette + rows
