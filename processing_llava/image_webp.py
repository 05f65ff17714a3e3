"""What a WebP holds: its first picture alone, and what its codes cost.

A lossless picture, or transparency that is compressed as such, has groups of prefix codes, up to one for every 16
pixels: kilobytes and microseconds each, which no header tells. The number stands behind small pictures of what was
done to the pixels, so these are read here as libwebp reads them (RFC 9649, sections 3.7 and 4): without their pixels,
as those that are copied name no new group.
"""

import struct
from collections.abc import Iterator

MAX_BLOCKS = 20_000
"""Pixels of each small picture; libwebp 1.6 writes 16,384 (src/enc/vp8l_enc.c)."""
SECONDS_OF_BLOCK, SECONDS_OF_GROUP = 1e-6, 2e-5
BYTES_OF_GROUP = 12_400
"""Largest tables of five codes, without those of the cache of colours (libwebp 1.6, src/dec/vp8l_dec.c)."""

_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
_REPEATS = {16: (2, 3), 17: (3, 3), 18: (7, 11)}
"""Symbol -> bits that tell how many more, and the fewest."""

Code = tuple[int, list[int]]
"""A mask of the next bits, and for each value of them, symbol << 4 | number of bits."""


def walk_webp(data: bytes, position: int = 12, stop: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Kind and range of each chunk."""
    stop = len(data) if stop is None else min(stop, len(data))
    while position + 8 <= stop:
        kind, length = struct.unpack_from("<4sL", data, position)
        yield kind, position, min(position + 8 + length, stop)
        position += 8 + length + length % 2


def keep_first_picture(pieces: list[tuple[bytes, int, int]]) -> list[tuple[bytes, int, int]]:
    """Its chunks, and those that describe the canvas."""
    kept: dict[bytes, tuple[bytes, int, int]] = {}
    for kind, start, stop in pieces:
        if kind in (b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF"):
            kept.setdefault(kind, (kind, start, stop + (stop - start) % 2))
        if kind in (b"VP8 ", b"VP8L", b"ANMF"):
            break
    return list(kept.values())


def read_webp_costs(data: bytes) -> tuple[float, float]:
    """Bytes and seconds that the codes take, of a file with one picture.

    Raises:
        ValueError: broken, or of more blocks than encoders write.
    """
    chunks = list(walk_webp(data))
    for kind, start, stop in chunks[:]:
        if kind == b"ANMF":
            chunks += walk_webp(data, start + 24, stop)
    try:
        # Without transparency, a lossy picture has none of them.
        sizes = [struct.unpack_from("<HH", data, start + 14) for kind, start, stop in chunks if kind == b"VP8 "]
        width, height = (max((size[axis] & 0x3FFF for size in sizes), default=0) for axis in (0, 1))
        costs = [(0.0, 0.0)]
        for kind, start, stop in chunks:
            if kind == b"VP8L":
                (bits,) = struct.unpack_from("<L", data, start + 9)
                sides = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
                costs.append(_Stream(data[start + 13 : stop]).read_costs(*sides))
            elif kind == b"ALPH" and data[start + 8] & 3:
                costs.append(_Stream(data[start + 9 : stop]).read_costs(width, height))
    except (IndexError, ValueError, struct.error) as error:
        raise ValueError(
            f"got a WebP whose codes cannot be read ({error}); expected a whole image; save it again"
        ) from error
    return max(num_bytes for num_bytes, _ in costs), sum(seconds for _, seconds in costs)


class _Stream:
    """The bits of a lossless picture, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = self.num_blocks = 0

    def read_costs(self, width: int, height: int) -> tuple[float, float]:
        kinds = set()
        while self.read(1):
            kind = self.read(2)
            if kind in kinds:
                raise ValueError("one transform twice")
            kinds.add(kind)
            if kind == 3:
                num_colours = self.read(8) + 1
                self.read_image(num_colours)
                width = -(-width >> sum(num_colours <= most for most in (2, 4, 16)))
            elif kind != 2:
                self.read_blocks(width, height)
        cache_size = self.read_cache_size()
        num_groups = 1 + (self.read_blocks(width, height) if self.read(1) else 0)
        seconds = SECONDS_OF_BLOCK * self.num_blocks + SECONDS_OF_GROUP * num_groups
        return num_groups * (BYTES_OF_GROUP + 4 * cache_size), seconds

    def read_blocks(self, width: int, height: int) -> int:
        bits = self.read(3) + 2
        return self.read_image(-(-width >> bits) * -(-height >> bits))

    def read_image(self, num_pixels: int) -> int:
        """The largest number of a group, if this tells the groups."""
        self.num_blocks += num_pixels
        if num_pixels > MAX_BLOCKS:
            raise ValueError(f"{num_pixels} blocks, more than {MAX_BLOCKS}")
        num_greens = 280 + self.read_cache_size()
        (green_mask, greens), *others = [self.read_code(size) for size in (num_greens, 256, 256, 256, 40)]
        *channels, (distance_mask, distances) = others
        largest, done = 0, 0
        while done < num_pixels:
            # Four symbols of 15 bits at most, or two and what else tells a length and a distance.
            start = self.position >> 3
            window = int.from_bytes(self.data[start : start + 12], "little") >> (self.position & 7)
            entry = greens[window & green_mask]
            green, used = entry >> 4, entry & 15
            if green < 256:
                # Red, which with green is the number of a group, blue and alpha.
                for number, (mask, entries) in enumerate(channels):
                    entry = entries[window >> used & mask]
                    used += entry & 15
                    if not number:
                        largest = max(largest, (entry >> 4) << 8 | green)
                done += 1
            elif green < 280:
                num_bits = max(0, green - 258 >> 1)
                length = (2 + green % 2 << num_bits) + 1 if num_bits else green - 255
                done += length + (window >> used & (1 << num_bits) - 1)
                used += num_bits
                entry = distances[window >> used & distance_mask]
                used += (entry & 15) + max(0, (entry >> 4) - 2 >> 1)
            else:
                done += 1
            self.position += used
        if self.position > 8 * len(self.data):
            raise ValueError("it breaks off")
        return largest

    def read(self, num_bits: int) -> int:
        start = self.position >> 3
        value = int.from_bytes(self.data[start : start + 4], "little") >> (self.position & 7)
        self.position += num_bits
        return value & (1 << num_bits) - 1

    def read_cache_size(self) -> int:
        if not self.read(1):
            return 0
        num_bits = self.read(4)
        if not 1 <= num_bits <= 11:
            raise ValueError(f"a cache of {num_bits} bits")
        return 1 << num_bits

    def read_code(self, num_symbols: int) -> Code:
        lengths = [0] * num_symbols
        if self.read(1):
            lengths = [0] * max(num_symbols, 256)
            has_two, num_bits = self.read(1), 1 + 7 * self.read(1)
            lengths[self.read(num_bits)] = 1
            if has_two:
                lengths[self.read(8)] = 1
            return _build_code(lengths[:num_symbols])
        inner = [0] * 19
        for symbol in _ORDER[: 4 + self.read(4)]:
            inner[symbol] = self.read(3)
        mask, entries = _build_code(inner)
        most = 2 + self.read(2 + 2 * self.read(3)) if self.read(1) else num_symbols
        done, previous = 0, 8
        while done < num_symbols and most:
            most -= 1
            entry = entries[self.read(7) & mask]
            self.position += (entry & 15) - 7
            length, count = entry >> 4, 1
            if length in _REPEATS:
                num_bits, fewest = _REPEATS[length]
                length, count = previous if length == 16 else 0, fewest + self.read(num_bits)
            elif length:
                previous = length
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
