"""FITS images by astropy: the first image of a file that has pixels, never a table; compressed ones and .gz too.

values    stored * BSCALE + BZERO; unsigned integers (BZERO of half the range) stay integers
BLANK     not valid, for integers of every kind; NaN is not valid
rows      the first stored row is the lowest one, as all displays of FITS have it, unless ROWORDER says TOP-DOWN
cubes     CTYPE says what an axis is: RGB bands C, TIME T; others are Z, then F and P. Axes of size 1 are dropped
"""

from __future__ import annotations

import contextlib
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.data.reading.stored import MAX_PIXELS, File, Layout, Piece, Stored
from upstep_fast.errors import BadImage, first_line

_BLOCK, _CARD = 2880, 80  # bytes
_MAX_BLOCKS, _MAX_HDUS = 400, 1000  # of a header: 14,400 cards; of a file
_UNSIGNED = {8: (-128, np.int8), 16: (1 << 15, np.uint16), 32: (1 << 31, np.uint32), 64: (1 << 63, np.uint64)}


@dataclass(frozen=True)
class _Image:
    """The image of a file, from its header's cards."""

    index: int  # of the HDU
    cards: dict[str, str]
    bits: int  # BITPIX: negative for floats
    axes: str  # in NumPy's order, without those of size 1
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]  # with those of size 1
    scale: tuple[float, float]  # BSCALE, BZERO
    blank: int | None  # BLANK


def layout(file: File) -> Layout:
    """Return the axes of a FITS file's first image. Raises BadImage."""
    with _stream(file) as stream:
        image = _first_image(stream)
    kind = f"float{-image.bits}" if image.bits < 0 else f"{image.bits} bits"
    return Layout(image.axes, image.shape, f"FITS, {kind}")


def read(file: File, piece: Piece) -> Stored:
    """Return one picture of a FITS file, [1 or 3, H, W], top row first. Raises BadImage."""
    try:
        from astropy.io import fits
    except ImportError:
        raise BadImage("needs the package astropy: pip install 'upstep_fast[astro]'") from None
    with _stream(file) as stream:
        image = _first_image(stream)
        where, flipped = _section(image, piece)
        stream.seek(0)
        with fits.open(stream, memmap=False, lazy_load_hdus=True, do_not_scale_image_data=True) as hdus:
            stored = np.asarray(hdus[image.index].section[where])
    values = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    values = values.reshape(-1, *values.shape[-2:])
    return _physical(values[:, ::-1] if flipped else values, image)


def _physical(values: np.ndarray, image: _Image) -> Stored:
    """Return values with BSCALE and BZERO applied, their declared range, and which are valid. values: [C, H, W]."""
    scale, zero = image.scale
    if image.bits < 0:
        return Stored(values if (scale, zero) == (1, 0) else (values * scale + zero).astype(values.dtype))
    low, high = (0, 255) if image.bits == 8 else (-(1 << image.bits - 1), (1 << image.bits - 1) - 1)
    valid = None if image.blank is None else _valid(values, image.blank)
    if (scale, zero) == (1, 0):
        return Stored(values, low, high, valid)
    half, dtype = _UNSIGNED[image.bits]
    if (scale, zero) == (1, half):  # unsigned, or signed bytes: the highest bit is turned
        turned = values ^ values.dtype.type(128 if image.bits == 8 else low)
        return Stored(turned.view(dtype), low + half, high + half, valid)
    physical = (values * np.float64(scale) + zero).astype(np.float32 if image.bits <= 16 else np.float64)
    ends = sorted((low * scale + zero, high * scale + zero))
    return Stored(physical, ends[0], ends[1], valid)


def _valid(values: np.ndarray, blank: int) -> np.ndarray:
    """Return which pixels are not BLANK, a stored value, in any band: [H, W]."""
    info = np.iinfo(values.dtype)
    if not info.min <= blank <= info.max:
        return np.ones(values.shape[1:], bool)
    valid: np.ndarray = (values != blank).any(0)
    return valid


def _section(image: _Image, piece: Piece) -> tuple[tuple[Any, ...], bool]:
    """Return the index of a piece in the stored array, and whether its rows are to be turned round. Raises BadImage."""
    top, left, height, width = Layout(image.axes, image.shape, "").window(piece)
    flipped = image.cards.get("ROWORDER", "").strip("' ").upper() != "TOP-DOWN"
    if flipped:
        top = image.shape[image.axes.index("Y")] - top - height
    place = {"Y": slice(top, top + height), "X": slice(left, left + width), "C": slice(None)}
    named = iter(image.axes)
    shape = image.stored_shape
    axes = [next(named) if size > 1 or at >= len(shape) - 2 else "" for at, size in enumerate(shape)]
    return tuple(place.get(axis, piece.index(axis)) if axis else 0 for axis in axes), flipped


def _first_image(stream: BinaryIO) -> _Image:
    """Return the first HDU that holds pixels. Raises BadImage if there is none."""
    for index, cards, is_complete in _hdus(stream):
        kind = cards.get("XTENSION", "'IMAGE'").strip("' ")
        letter = "Z" if kind == "BINTABLE" and cards.get("ZIMAGE") == "T" else ""  # of a compressed image's keywords
        if kind not in ("IMAGE", "BINTABLE" if letter else "") or cards.get("GROUPS") == "T":
            continue
        sizes = [_integer(cards, f"{letter}NAXIS{axis}") for axis in range(1, 1 + _integer(cards, f"{letter}NAXIS"))]
        if len(sizes) >= 2 and 0 not in sizes:
            if not is_complete:
                raise BadImage("truncated FITS: its data ends before its last pixel")
            return _image(index, cards, letter, sizes)
    raise BadImage("a FITS file without an image: it holds tables or headers alone")


def _image(index: int, cards: dict[str, str], letter: str, sizes: list[int]) -> _Image:
    """Return an image by its header. Raises BadImage for one that cannot be read. sizes: NAXISn."""
    bits = _integer(cards, f"{letter}BITPIX")
    if bits not in (8, 16, 32, 64, -32, -64):
        raise BadImage(f"a FITS image of BITPIX {bits}")
    tile = [_integer(cards, f"ZTILE{axis}", 1) for axis in range(1, 1 + len(sizes))] if letter else [1]
    if int(np.prod(tile, dtype=object)) > MAX_PIXELS:
        raise BadImage(f"its tiles are of {tile} values, above the limit of {MAX_PIXELS}")
    shape = tuple(reversed(sizes))
    kept = tuple(size for at, size in enumerate(shape) if size > 1 or at >= len(shape) - 2)
    scale = _real(cards.get("BSCALE", "1")), _real(cards.get("BZERO", "0"))
    blank = int(_real(cards["BLANK"])) if "BLANK" in cards and bits > 0 else None
    return _Image(index, cards, bits, _axes(cards, sizes), kept, shape, scale, blank)


def _axes(cards: dict[str, str], sizes: list[int]) -> str:
    """Return the names of the axes above size 1 in NumPy's order. Raises BadImage for more than five. sizes: NAXISn."""
    free = iter("ZFP")
    names = "XY"
    for axis, size in enumerate(sizes[2:], 3):
        if size > 1:
            kind = cards.get(f"CTYPE{axis}", "").strip("' ").upper()
            stated = "C" if kind.startswith("RGB") and size == 3 else "T" if kind == "TIME" else ""
            name = stated if stated and stated not in names else next(free, "")
            if not name:
                raise BadImage(f"a FITS image of {len(sizes)} axes; write its pictures to files of their own")
            names += name
    return names[::-1]


def _hdus(stream: BinaryIO) -> Iterator[tuple[int, dict[str, str], bool]]:
    """Yield (index, cards by keyword, whether all data is there) of each HDU. Raises BadImage."""
    at, size = 0, _size(stream)
    for index in range(_MAX_HDUS):
        cards, start = _cards(stream, at)
        if not cards:
            return
        if index == 0 and "SIMPLE" not in cards:
            raise BadImage("not a FITS file: it does not start with SIMPLE")
        sizes = [_integer(cards, f"NAXIS{axis}") for axis in range(1, 1 + _integer(cards, "NAXIS"))]
        count = 0
        if sizes:
            values = int(np.prod([n for n in sizes if n or "GROUPS" not in cards], dtype=object))
            count = abs(_integer(cards, "BITPIX")) // 8 * _integer(cards, "GCOUNT", 1)
            count *= _integer(cards, "PCOUNT") + values
        yield index, cards, size is None or start + count <= size
        at = start + -(-count // _BLOCK) * _BLOCK
        if size is not None and at >= size:
            return


def _cards(stream: BinaryIO, at: int) -> tuple[dict[str, str], int]:
    """Return the header at an offset by keyword, and where its data starts; {} at the file's end. Raises BadImage."""
    stream.seek(at)
    cards: dict[str, str] = {}
    for block in range(1, _MAX_BLOCKS + 1):
        data = stream.read(_BLOCK)
        if len(data) < _BLOCK and block == 1:
            if at == 0:
                raise BadImage(f"truncated FITS: {len(data)} bytes")
            return {}, at
        for start in range(0, len(data), _CARD):
            card = data[start : start + _CARD].decode("latin-1")
            name = card[:8].rstrip()
            if name == "END":
                return cards, at + block * _BLOCK
            if card[8:10] == "= ":
                cards.setdefault(name, _value(card[10:]))
        if len(data) < _BLOCK:
            break
    raise BadImage(f"truncated FITS: no END in its first {block} blocks")


def _value(text: str) -> str:
    """Return a card's value without its comment; strings keep their quotes."""
    text = text.strip()
    if text.startswith("'"):
        return text[: text.find("'", 1) + 1]
    return text.split("/")[0].strip()


def _integer(cards: dict[str, str], name: str, default: int = 0) -> int:
    """Return a card's whole number. Raises BadImage."""
    text = cards.get(name, str(default))
    if not text.lstrip("+-").isdecimal() or len(text) > 12 or (int(text) < 0 and "BITPIX" not in name):
        raise BadImage(f"a FITS header of {name} {text[:20]}")
    if name.endswith("NAXIS") and int(text) > 999:
        raise BadImage(f"a FITS header of {name} {text[:20]}")
    return int(text)


def _real(text: str) -> float:
    """Return a card's number. Raises BadImage."""
    try:
        value = float(text.upper().replace("D", "E"))
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise BadImage(f"a FITS header with the number {text[:20]}")
    return value


@contextlib.contextmanager
def _stream(file: File) -> Iterator[BinaryIO]:
    """Open a file's content, unpacked as far as it is read where it is gzip's. Raises BadImage for errors inside."""
    with contextlib.ExitStack() as stack:
        raw: BinaryIO = stack.enter_context(open(file, "rb")) if isinstance(file, str) else io.BytesIO(file)
        is_packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            yield gzip.GzipFile(fileobj=raw) if is_packed else raw  # type: ignore[misc]
        except BadImage:
            raise
        except Exception as error:  # gzip raises EOFError and zlib.error, astropy OSError, ValueError, TypeError ...
            if is_out_of_memory(error) or getattr(error, "errno", None) is not None:  # of the machine
                raise
            raise BadImage(f"cannot be decoded by astropy: {first_line(error)[:160]}") from error


def _size(stream: BinaryIO) -> int | None:
    """Return the content's size in bytes; None for a compressed one, which only unpacking tells."""
    return None if isinstance(stream, gzip.GzipFile) else stream.seek(0, io.SEEK_END)
