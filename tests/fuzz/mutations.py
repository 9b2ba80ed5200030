"""Ways to damage a file, each from a seeded random source: bytes in, bytes out."""

import random
import re
import struct
import zlib
from collections.abc import Callable

Mutation = Callable[[random.Random, bytes, bytes], bytes]
"""Takes a random source, the bytes of a file and those of another one, and returns damaged bytes."""

INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
NUMBERS = (b"0", b"-1", b"1", b"65536", b"2147483647", b"-2147483648", b"4294967296", b"99999999999999999999", b"1e99")
PDF_NUMBER = re.compile(rb"(?<![\w.])-?\d+(?![\w.])")
PDF_NAME = re.compile(rb"/[A-Za-z]{2,}")
PDF_LENGTH = re.compile(rb"/Length\s+\d+")
PDF_STREAM = re.compile(rb"stream\r?\n(.*?)\r?\n?endstream", re.DOTALL)
XREF_ENTRY = re.compile(rb"\d{10} \d{5} [nf]")


def flip_bits(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Flip up to 16 bits anywhere."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 16)):
        place = chance.randrange(len(found))
        found[place] ^= 1 << chance.randrange(8)
    return bytes(found)


def truncate(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Cut the end off."""
    return data[: chance.randrange(1, len(data))]


def remove_range(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Leave out a part, so that all after it moves."""
    start, stop = a_range(chance, data)
    return data[:start] + data[stop:]


def repeat_range(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Put a part in several times."""
    start, stop = a_range(chance, data)
    return data[:stop] + data[start:stop] * chance.randint(1, 20) + data[stop:]


def zero_range(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Overwrite a part with zeros, as a lost block of a disk."""
    start, stop = a_range(chance, data)
    return data[:start] + bytes(stop - start) + data[stop:]


def splice(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Put a part of another file in the place of a part."""
    start, stop = a_range(chance, data)
    first, last = a_range(chance, other)
    return data[:start] + other[first:last] + data[stop:]


def edit_integer(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Set a 16- or 32-bit field near the start or anywhere, in either byte order."""
    layout = chance.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(layout)
    last = max(1, min(len(data), chance.choice((64, 512, len(data)))) - size)
    place = chance.randrange(last)
    value = chance.choice(INTEGERS) & (256**size - 1)
    return data[:place] + struct.pack(layout, value) + data[place + size :]


def edit_number(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Set a number of a PDF's text: a count, a size, an offset, a reference."""
    return replace_one(chance, PDF_NUMBER, data, chance.choice(NUMBERS))


def edit_length(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Let a stream of a PDF announce another length."""
    return replace_one(chance, PDF_LENGTH, data, b"/Length " + chance.choice(NUMBERS))


def edit_xref(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Let an entry of a PDF's cross references point elsewhere."""
    place = chance.choice((0, chance.randrange(len(data)), 9_999_999_999))
    return replace_one(chance, XREF_ENTRY, data, b"%010d 00000 n" % place)


def swap_names(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Put one name of a PDF in the place of another: a filter, a type, a key of a dictionary."""
    names = PDF_NAME.findall(data)
    return replace_one(chance, PDF_NAME, data, chance.choice(names)) if names else flip_bits(chance, data, other)


def corrupt_stream(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Damage what is inside a compressed stream of a PDF, and compress it again."""
    streams = list(PDF_STREAM.finditer(data))
    if not streams:
        return flip_bits(chance, data, other)
    found = chance.choice(streams)
    try:
        inner = zlib.decompress(found[1]) or b" "
    except zlib.error:
        return data[: found.start(1)] + flip_bits(chance, found[1] or b" ", other) + data[found.end(1) :]
    damage = chance.choice((flip_bits, truncate, repeat_range, edit_number, splice))
    inner = damage(chance, inner if len(inner) > 1 else inner * 2, other)
    return data[: found.start(1)] + zlib.compress(inner) + data[found.end(1) :]


def edit_box(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Let a box of an MP4 announce another size or type."""
    places = [place for place, _ in mp4_boxes(data, 0, len(data))]
    if not places:
        return edit_integer(chance, data, other)
    place = chance.choice(places)
    if chance.random() < 0.2:
        kind = chance.choice((b"moov", b"trak", b"stsz", b"stco", b"free", b"mdat", b"ctts", b"edts"))
        return data[: place + 4] + kind + data[place + 8 :]
    size = int.from_bytes(data[place : place + 4])
    value = chance.choice((*INTEGERS, size - 1, size + 1, size * 2, size // 2)) & 0xFFFFFFFF
    return data[:place] + struct.pack(">I", value) + data[place + 4 :]


def edit_table(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Set an entry of a table of an MP4: sample sizes, offsets, times."""
    boxes = [(place, size) for place, size in mp4_boxes(data, 0, len(data)) if data[place + 4 : place + 6] in TABLES]
    if not boxes:
        return edit_integer(chance, data, other)
    place, size = chance.choice(boxes)
    field = place + 8 + 4 * chance.randrange(max(1, (size - 8) // 4))
    return data[:field] + struct.pack(">I", chance.choice(INTEGERS)) + data[field + 4 :]


TABLES = (b"st", b"mv", b"tk", b"md", b"el")
"""How the names of boxes with tables and times begin: stsz, stco, stts, mvhd, tkhd, mdhd, elst."""
PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta")


def mp4_boxes(data: bytes, start: int, stop: int) -> list[tuple[int, int]]:
    """Return place and size of each box between two places, children after their parents."""
    found = []
    while start + 8 <= stop:
        size, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        if size < 8 or start + size > stop:
            break
        found.append((start, size))
        if kind in PARENTS:
            found += mp4_boxes(data, start + 8, start + size)
        start += size
    return found


def edit_png_chunk(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Damage a chunk of a PNG, and make its checksum right again."""
    chunks = []
    place = 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4])
        chunks.append((place, size))
        place += 12 + size
    if not chunks:
        return edit_integer(chance, data, other)
    place, size = chance.choice(chunks)
    kind, body = data[place + 4 : place + 8], bytearray(data[place + 8 : place + 8 + size])
    if body:
        body[chance.randrange(len(body))] = chance.randrange(256)
    if chance.random() < 0.3:
        kind = chance.choice((b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"fdAT"))
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return data[:place] + struct.pack(">I", len(body)) + kind + body + checksum + data[place + 12 + size :]


def edit_jpeg_segment(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Set length, type or a byte of a segment of a JPEG."""
    places = [place for place in range(2, len(data) - 4) if data[place] == 0xFF and 0xC0 <= data[place + 1] <= 0xFE]
    if not places:
        return flip_bits(chance, data, other)
    place = chance.choice(places[:40])
    offset = chance.choice((1, 2, 3, chance.randint(4, 20)))
    return data[: place + offset] + bytes([chance.randrange(256)]) + data[place + offset + 1 :]


def edit_tiff_entry(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Set a field of an entry of a TIFF's first directory."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0] if len(data) > 8 else 0
    if not 8 <= start < len(data) - 14:
        return edit_integer(chance, data, other)
    count = struct.unpack_from(order + "H", data, start)[0]
    entry = start + 2 + 12 * chance.randrange(max(1, min(count, (len(data) - start - 2) // 12)))
    offset, layout = chance.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I")))
    value = chance.choice(INTEGERS) & (0xFFFF if layout == "H" else 0xFFFFFFFF)
    field = struct.pack(order + layout, value)
    return data[: entry + offset] + field + data[entry + offset + len(field) :]


def a_range(chance: random.Random, data: bytes) -> tuple[int, int]:
    """Return a part of `data`, small more often than large."""
    start = chance.randrange(len(data))
    length = chance.choice((1, 4, 16, 64, 256, 4096, len(data) // 3 + 1))
    return start, min(len(data), start + chance.randint(1, length))


def replace_one(chance: random.Random, pattern: re.Pattern[bytes], data: bytes, new: bytes) -> bytes:
    """Return `data` with one match of `pattern` replaced; with flipped bits where there is none."""
    matches = list(pattern.finditer(data))
    if not matches:
        return flip_bits(chance, data, data)
    found = chance.choice(matches)
    return data[: found.start()] + new + data[found.end() :]


ANY: tuple[Mutation, ...] = (
    flip_bits, truncate, remove_range, repeat_range, zero_range, splice, edit_integer,
)  # fmt: skip
OF_SUFFIX: dict[str, tuple[Mutation, ...]] = {
    ".pdf": (edit_number, edit_length, edit_xref, swap_names, corrupt_stream, corrupt_stream),
    ".mp4": (edit_box, edit_table, edit_table),
    ".png": (edit_png_chunk, edit_png_chunk),
    ".jpg": (edit_jpeg_segment, edit_jpeg_segment),
    ".tif": (edit_tiff_entry, edit_tiff_entry),
}
"""What a format is damaged by besides; RIFF files, GIF and BMP have their sizes where `edit_integer` finds them."""


def mutated(chance: random.Random, data: bytes, suffix: str, other: bytes) -> bytes:
    """Return `data` damaged once or several times."""
    choices = (*ANY, *OF_SUFFIX.get(suffix, ()), *OF_SUFFIX.get(suffix, ()))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(choices)(chance, data, other)
        if len(data) < 2:
            return data + b"%P"
    return data
