"""PGM and PPM files of more than 8 bits, whose declared maximum is that of their values."""

from __future__ import annotations

import re

import numpy as np

from upstep_fast.data.reading.stored import Stored, Values
from upstep_fast.errors import BadImage

KINDS = {b"P2": 1, b"P3": 3, b"P5": 1, b"P6": 3}  # bands
_NUMBER = rb"(?:\s|#[^\r\n]*[\r\n])+([0-9]{1,10})"  # comments may lie between the numbers of a header
_HEADER = re.compile(rb"P[2356]" + 3 * _NUMBER + rb"(?:\s|#[^\r\n]*[\r\n])")
_MAX_HEADER = 1 << 16
_BYTES_PER_WORD = 20  # of text, as Python's objects, per byte of the file


def plan_pnm(data: bytes | memoryview, max_pixels: int) -> Values | None:
    """Return how a file with a maximum above 255 is read, None for others. Raises BadImage."""
    header = _HEADER.match(bytes(data[:_MAX_HEADER]))
    if header is None:
        return None  # Pillow says what is wrong
    width, height, largest = map(int, header.groups())
    if not 255 < largest < 65536:
        return None
    if width * height > max_pixels or width < 1 or height < 1:
        raise BadImage(f"{width} x {height} pixels, above the limit of {max_pixels}")
    bands, start = KINDS[bytes(data[:2])], header.end()
    count = width * height * bands
    read = _text if data[:2] in (b"P2", b"P3") else _binary

    def values() -> Stored:
        return Stored(np.moveaxis(read(data, start, count).reshape(height, width, bands), -1, 0), 0, largest)

    return Values(3 * count if read is _binary else len(data) * _BYTES_PER_WORD, values)


def _binary(data: bytes | memoryview, start: int, count: int) -> np.ndarray:
    if len(data) < start + 2 * count:
        raise BadImage(f"truncated: {len(data) - start} bytes of {count} values")
    return np.frombuffer(data, ">u2", count, start).astype(np.uint16)


def _text(data: bytes | memoryview, start: int, count: int) -> np.ndarray:
    words = re.sub(rb"#[^\r\n]*", b" ", bytes(data[start:])).split(maxsplit=count)[:count]
    if len(words) < count:
        raise BadImage(f"truncated: {len(words)} of {count} values")
    values = np.array(words, dtype="S6").astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("a PNM with a value outside 0 to 65535")
    return values.astype(np.uint16)
