"""What a WebP holds: its first picture alone, and what its codes cost.

A lossless picture, or transparency compressed as one, has groups of prefix codes, up to one for every 16 pixels, of
kilobytes and microseconds each. Their number stands behind small pictures, which are read here (RFC 9649, sections 3.7
and 4), but for copied pixels, which name no new group.
"""

import struct
from collections.abc import Iterator

Piece = tuple[bytes, int, int]
Code = tuple[int, list[int]]
"""A mask of the next bits, and for each value of them, symbol << 4 | number of bits."""

MAX_BLOCKS = 17_000
"""Pixels of a small picture; libwebp 1.6 writes 16,384 (src/enc/vp8l_enc.c)."""
SECONDS_OF_BLOCK, SECONDS_OF_GROUP = 1.5e-6, 2e-5
BYTES_OF_GROUP = 12_400
"""Without what the cache of colours adds (libwebp 1.6, src/dec/vp8l_dec.c)."""
_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
_REPEATS = {16: (2, 3), 17: (3, 3), 18: (7, 11)}
"""Bits that tell how many more, and the fewest."""


def walk_webp(data: bytes, position: int = 12) -> Iterator[Piece]:
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sL", data, position)
        yield kind, position, position + 8 + length
        position += 8 + length + length % 2


def keep_first_picture(pieces: list[Piece]) -> list[Piece]:
    """Its chunks, and those that describe the canvas."""
    kept: dict[bytes, Piece] = {}
    for kind, start, stop in pieces:
        if kind in (b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF"):
            kept.setdefault(kind, (kind, start, stop + (stop - start) % 2))
        if kind in (b"VP8 ", b"VP8L", b"ANMF"):
            break
    return list(kept.values())


def read_webp_costs(data: bytes) -> tuple[int, float]:
    """Bytes and seconds that the codes of the first picture take.

    Raises:
        ValueError: broken, or of more blocks than encoders write.
    """
    num_bytes, seconds = 0, 0.0
    try:
        chunks = keep_first_picture(list(walk_webp(data)))
        if chunks and chunks[-1][0] == b"ANMF":
            chunks = list(walk_webp(data[: chunks[-1][2]], chunks[-1][1] + 24))
        ((kind, start, _),) = [chunk for chunk in chunks if chunk[0] in (b"VP8 ", b"VP8L")]
        is_lossless = kind == b"VP8L"
        (sides,) = struct.unpack_from("<L", data, start + (9 if is_lossless else 14))
        width = (sides & 0x3FFF) + is_lossless
        height = (sides >> (14 if is_lossless else 16) & 0x3FFF) + is_lossless
        for kind, start, stop in chunks:
            if kind == b"VP8L" or (kind == b"ALPH" and data[start + 8] & 3):
                codes = _Codes(data[start + (9 if kind == b"ALPH" else 13) : stop])
                num_bytes += codes.count_bytes(width, height)
                seconds += codes.seconds
    except (LookupError, ValueError, struct.error) as error:
        raise ValueError(
            f"got a WebP that cannot be decoded ({error}); expected a whole image; save it again"
        ) from error
    return num_bytes, seconds


class _Codes:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.seconds = 0.0

    def count_bytes(self, width: int, height: int) -> int:
        left = {0, 1, 2, 3}
        while self.read(1):
            kind = self.read(2)
            left.remove(kind)
            if kind == 3:
                num_colours = self.read(8) + 1
                self.read_image(num_colours)
                width = -(-width >> sum(num_colours <= most for most in (2, 4, 16)))
            elif kind != 2:
                self.read_blocks(width, height)
        cache_size = self.read_cache_size()
        num_groups = 1 + (self.read_blocks(width, height) if self.read(1) else 0)
        self.seconds += SECONDS_OF_GROUP * num_groups
        return num_groups * (BYTES_OF_GROUP + 4 * cache_size)

    def read_blocks(self, width: int, height: int) -> int:
        num_bits = self.read(3) + 2
        return self.read_image(-(-width >> num_bits) * -(-height >> num_bits))

    def read_image(self, num_pixels: int) -> int:
        """The largest number of a group, of red and green."""
        if num_pixels > MAX_BLOCKS:
            raise ValueError(f"{num_pixels} blocks, which no encoder writes")
        self.seconds += SECONDS_OF_BLOCK * num_pixels
        num_greens = 280 + self.read_cache_size()
        greens, reds, blues, alphas, distances = map(self.read_code, (num_greens, 256, 256, 256, 40))
        largest = done = 0
        while done < num_pixels:
            green = self.read_symbol(greens)
            done += 1
            if green < 256:
                largest = max(largest, self.read_symbol(reds) << 8 | green)
                self.read_symbol(blues)
                self.read_symbol(alphas)
            elif green < 280:
                # A copy of so many pixels.
                num_bits = max(0, green - 258 >> 1)
                done += self.read(num_bits) + ((2 + green % 2 << num_bits) if num_bits else green - 256)
                self.read(max(0, self.read_symbol(distances) - 2 >> 1))
        if self.position > 8 * len(self.data):
            raise ValueError("it breaks off")
        return largest

    def peek(self) -> int:
        start = self.position >> 3
        return int.from_bytes(self.data[start : start + 4], "little") >> (self.position & 7)

    def read(self, num_bits: int) -> int:
        value = self.peek() & (1 << num_bits) - 1
        self.position += num_bits
        return value

    def read_symbol(self, code: Code) -> int:
        mask, entries = code
        entry = entries[self.peek() & mask] if mask else entries[0]
        self.position += entry & 15
        return entry >> 4

    def read_cache_size(self) -> int:
        return 1 << self.read(4) if self.read(1) else 0

    def read_code(self, num_symbols: int) -> Code:
        lengths = [0] * max(num_symbols, 256)
        if self.read(1):
            has_two, num_bits = self.read(1), 1 + 7 * self.read(1)
            for bits in (num_bits, 8)[: 1 + has_two]:
                lengths[self.read(bits)] = 1
            return _build_code(lengths[:num_symbols])
        inner = [0] * 19
        for symbol in _ORDER[: 4 + self.read(4)]:
            inner[symbol] = self.read(3)
        code = _build_code(inner)
        most = 2 + self.read(2 + 2 * self.read(3)) if self.read(1) else num_symbols
        done, previous = 0, 8
        while done < num_symbols and most:
            most -= 1
            length, count = self.read_symbol(code), 1
            if length in _REPEATS:
                num_bits, fewest = _REPEATS[length]
                length, count = previous if length == 16 else 0, fewest + self.read(num_bits)
            previous = length or previous
            lengths[done : done + count] = [length] * count
            done += count
        return _build_code(lengths[:num_symbols])


def _build_code(lengths: list[int]) -> Code:
    used = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    if len(used) == 1:
        # It takes no bit.
        return 0, [used[0][1] << 4]
    if sum(1 << 15 - length for length, _ in used) != 1 << 15:
        raise ValueError("a code that is not complete")
    longest = used[-1][0]
    entries, code, previous = [0] * (1 << longest), 0, 0
    for length, symbol in used:
        code <<= length - previous
        entries[int(f"{code:0{length}b}"[::-1], 2) :: 1 << length] = [symbol << 4 | length] * (1 << longest - length)
        code, previous = code + 1, length
    return (1 << longest) - 1, entries
