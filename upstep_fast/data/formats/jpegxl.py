"""JPEG XL by imagecodecs: the values of the codestream, of up to 16 bits or floating point, 1 to 4 bands.

The range is that of the bits that the header declares, 0 to 1 of floats (their nominal range). Alpha is left out
unless all bands are asked for. Of an animation the first frame is read. Pictures are upright: libjxl turns them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upstep_fast.data.formats.boxes import boxes
from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage, first_line
from upstep_fast.runtime.terminal import counted

_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_MAX_HEADER = 1 << 16  # bytes of a file in which the codestream's header lies; boxes of metadata may come first
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width : height
_MAX_EXTRA = 16
_ALPHA, _SPOT, _FILTER = 0, 2, 5  # kinds of extra channels that have fields of their own

# U32 of the specification: four choices of (offset, number of bits)
_SIZE = ((1, 9), (1, 13), (1, 18), (1, 30))
_PREVIEW, _PREVIEW_8 = ((1, 6), (65, 8), (321, 10), (1345, 12)), ((16, 0), (32, 0), (1, 5), (33, 9))
_ENUM = ((0, 0), (1, 0), (2, 4), (18, 6))


@dataclass(frozen=True)
class _Header:
    """Start of a codestream (ISO/IEC 18181-1, annex D)."""

    height: int
    width: int
    bits: int
    is_float: bool
    bands: int
    extra: int  # of these, alpha and the like


def layout(file: File) -> Layout:
    """Return the axes of a JPEG XL. Raises BadImage."""
    return _layout(_header(_content(file, _MAX_HEADER)))


def read(file: File, piece: Piece) -> Stored:
    """Return a picture's bands, or a window of them. Raises BadImage."""
    try:
        import imagecodecs
    except ImportError:
        raise BadImage("needs the package imagecodecs: pip install 'upstep_fast[microscopy]'") from None
    data = _content(file)
    header = _header(data)
    _layout(header).window(Piece())  # all of it is decoded
    top, left, height, width = _layout(header).window(piece)
    try:
        array = imagecodecs.jpegxl_decode(data, index=0, numthreads=1)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BadImage(f"cannot be decoded by libjxl: {first_line(error)[:160]}") from error
    values = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    if values.shape != (header.bands, header.height, header.width):
        raise BadImage(f"a JPEG XL of {header.bands} bands, of which {len(values)} can be read; convert it to TIFF")
    values = np.ascontiguousarray(values[:, top : top + height, left : left + width])
    high = 1 if header.is_float else (1 << header.bits) - 1
    return Stored(values, 0, high, colors=header.bands - header.extra if header.extra else 0)


def _layout(header: _Header) -> Layout:
    what = f"JPEG XL, {counted(header.bands, 'band')} of {header.bits} bits"
    return Layout("CYX", (header.bands, header.height, header.width), what)


def _content(file: File, size: int = -1) -> bytes:
    if not isinstance(file, str):
        return bytes(file if size < 0 else file[:size])
    with open(file, "rb") as stream:
        return stream.read(size)


def _header(data: bytes) -> _Header:
    """Return the header of a file's codestream. Raises BadImage."""
    at = 0
    if data.startswith(_CONTAINER):
        parts = [(kind, start) for kind, start, _ in boxes(data, 0, len(data)) if kind in (b"jxlc", b"jxlp")]
        at = parts[0][1] + 4 * (parts[0][0] == b"jxlp") if parts else len(data)
    if data[at : at + 2] != _CODESTREAM:
        raise BadImage("not a JPEG XL, or one without a codestream at its start")
    bits = _Bits(data[at + 2 : at + 2 + 4096])
    height, width = _size(bits)
    depth, is_float, bands, extra, orientation = _metadata(bits)
    if orientation > 4:
        height, width = width, height
    if bits.at > 8 * bits.size:
        raise BadImage("truncated JPEG XL: its header ends early")
    if not is_float and depth > 16:
        raise BadImage(f"a JPEG XL of {depth} bits; up to 16 are read")
    return _Header(height, width, depth, is_float, bands, extra)


class _Bits:
    """Bits of a codestream, the least significant one of each byte first; zeros behind its end."""

    def __init__(self, data: bytes) -> None:
        self.value, self.size, self.at = int.from_bytes(data, "little"), len(data), 0

    def take(self, count: int) -> int:
        value = self.value >> self.at & ((1 << count) - 1)
        self.at += count
        return value

    def choose(self, *choices: tuple[int, int]) -> int:
        """Return a U32: two bits choose an offset and a number of bits."""
        offset, count = choices[self.take(2)]
        return offset + self.take(count)


def _size(bits: _Bits, small: bool = False) -> tuple[int, int]:
    """Return (height, width) of a SizeHeader, or of a PreviewHeader if `small`."""
    in_eights = bits.take(1)

    def side() -> int:
        if small:
            return bits.choose(*_PREVIEW_8) * 8 if in_eights else bits.choose(*_PREVIEW)
        return 8 * (1 + bits.take(5)) if in_eights else bits.choose(*_SIZE)

    height, ratio = side(), bits.take(3)
    if not ratio:
        return height, side()
    numerator, denominator = _RATIOS[ratio - 1]
    return height, height * numerator // denominator


def _metadata(bits: _Bits) -> tuple[int, bool, int, int, int]:
    """Return (bits, is float, bands, extra ones of these, orientation) of the image's metadata. Raises BadImage."""
    if bits.take(1):  # all default
        return 8, False, 3, 0, 1
    orientation = 1
    if bits.take(1):
        orientation = 1 + bits.take(3)
        if bits.take(1):
            _size(bits)  # as it is to be shown
        if bits.take(1):
            _size(bits, small=True)
        if bits.take(1):  # animation: ticks per second, loops, time codes
            bits.choose((100, 0), (1000, 0), (1, 10), (1, 30))
            bits.choose((1, 0), (1001, 0), (1, 8), (1, 10))
            bits.choose((0, 0), (0, 3), (0, 16), (0, 32))
            bits.take(1)
    depth, is_float = _depth(bits)
    bits.take(1)  # buffers of 16 bits suffice
    extra = bits.choose((0, 0), (1, 0), (2, 4), (1, 12))
    if extra > _MAX_EXTRA:
        raise BadImage(f"a JPEG XL of {extra} extra channels; convert it to TIFF")
    for _ in range(extra):
        _skip_extra_channel(bits)
    bits.take(1)  # XYB
    is_gray = not bits.take(1) and not bits.take(1) and bits.choose(*_ENUM) == 1  # all default; ICC; color space
    return depth, is_float, (1 if is_gray else 3) + extra, extra, orientation


def _depth(bits: _Bits) -> tuple[int, bool]:
    if not bits.take(1):
        return bits.choose((8, 0), (10, 0), (12, 0), (1, 6)), False
    depth = bits.choose((32, 0), (16, 0), (24, 0), (1, 6))
    bits.take(4)  # bits of the exponent
    return depth, True


def _skip_extra_channel(bits: _Bits) -> None:
    if bits.take(1):  # all default: alpha of 8 bits
        return
    kind = bits.choose(*_ENUM)
    _depth(bits)
    bits.choose((0, 0), (3, 0), (4, 0), (1, 3))  # subsampling
    bits.take(8 * bits.choose((0, 0), (0, 4), (16, 5), (48, 10)))  # name
    if kind == _ALPHA:
        bits.take(1)
    elif kind == _SPOT:
        bits.take(64)
    elif kind == _FILTER:
        bits.choose((1, 0), (0, 2), (3, 4), (19, 8))
