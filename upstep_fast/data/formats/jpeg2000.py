"""JPEG 2000 (.jp2, .j2k) by GDAL: the values of the codestream, of 1 to 16 bits, as many components as there are.

The range is the one that the codestream's SIZ marker declares. Colors are not converted: sRGB and gray are taken as
they are, ICC profiles are not applied, alpha is left out unless all bands are asked for. Refused by name: palettes,
sYCC, CMYK and Lab, subsampled components, components of several depths, and signed ones of at most 8 bits, which GDAL
cuts at 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from upstep_fast.data.formats.boxes import boxes
from upstep_fast.data.formats.gdal import opened, planes
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage
from upstep_fast.runtime.terminal import counted

_DRIVER = "JP2OpenJPEG"
_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
_CODESTREAM = b"\xff\x4f\xff\x51"  # SOC, SIZ
_COLORS = {12: "CMYK", 14: "Lab", 18: "sYCC", 24: "e-sYCC"}  # enumerated color spaces that are no RGB and no gray
_MAX_HEADER = 1 << 20  # bytes of boxes ahead of the codestream that are read; profiles and XML may be long


@dataclass(frozen=True)
class _Sizes:
    """The SIZ marker's words on the picture (ISO/IEC 15444-1, A.5.1)."""

    height: int
    width: int
    components: int
    bits: int
    signed: bool
    colors: int = 0  # components ahead of alpha, by the color space; 0: not stated


def layout(file: File) -> Layout:
    """Return the axes of a JPEG 2000 and the sizes of its resolution levels. Raises BadImage."""
    sizes = _sizes(file)
    with opened(file, _DRIVER) as dataset:
        shape = (dataset.height, dataset.width)
        count = len(dataset.overviews(1))
    smaller = []
    for level in range(count):
        with opened(file, _DRIVER, OVERVIEW_LEVEL=level) as dataset:
            smaller.append((dataset.height, dataset.width))
    what = f"JPEG 2000, {counted(sizes.components, 'component')} of {sizes.bits} bits"
    return Layout("CYX", (sizes.components, *shape), what, (shape, *smaller) if smaller else ())


def read(file: File, piece: Piece) -> Stored:
    """Return a picture's components, or a window of one of its resolution levels. Raises BadImage."""
    sizes = _sizes(file)
    options = {"OVERVIEW_LEVEL": piece.level - 1} if piece.level else {}
    window = layout(file).window(piece) if piece.level else _whole(sizes).window(piece)
    with opened(file, _DRIVER, **options) as dataset:
        values = planes(dataset, window)
    if len(values) != sizes.components:
        raise BadImage(f"a JPEG 2000 of {sizes.components} components, of which GDAL reads {len(values)}")
    half = 1 << sizes.bits - 1
    low, high = (-half, half - 1) if sizes.signed else (0, 2 * half - 1)
    return Stored(values, low, high, colors=sizes.colors if len(values) > sizes.colors else 0)


def _whole(sizes: _Sizes) -> Layout:
    return Layout("CYX", (sizes.components, sizes.height, sizes.width), "")


def _sizes(file: File) -> _Sizes:
    """Return what the codestream declares, once boxes and marker are of a kind that is read. Raises BadImage."""
    if isinstance(file, str):
        with open(file, "rb") as opened_file:
            head = opened_file.read(_MAX_HEADER)
    else:
        head = bytes(file[:_MAX_HEADER])
    at, colors = _codestream(head) if head.startswith(_SIGNATURE) else (0, 0)
    if head[at : at + 4] != _CODESTREAM:
        raise BadImage("not a JPEG 2000, or one without a codestream in its first megabyte")
    try:
        return replace(_siz(head, at + 4), colors=colors)
    except struct.error:
        raise BadImage("truncated JPEG 2000: its header ends early") from None


def _siz(head: bytes, at: int) -> _Sizes:
    right, bottom, left, top = struct.unpack_from(">4I", head, at + 4)
    (components,) = struct.unpack_from(">H", head, at + 36)
    if not components:
        raise BadImage("a JPEG 2000 of 0 components")
    kinds = {struct.unpack_from("3B", head, at + 38 + 3 * component) for component in range(components)}
    if len({depth for depth, *_ in kinds}) != 1:
        raise BadImage("a JPEG 2000 whose components have several depths; convert it to TIFF")
    ((depth, *steps), *others) = kinds
    if others or steps != [1, 1]:
        raise BadImage("a JPEG 2000 of subsampled components; convert it to TIFF or PNG")
    bits, signed = (depth & 127) + 1, depth > 127
    if bits > 16:
        raise BadImage(f"a JPEG 2000 of {bits} bits; up to 16 are read")
    if signed and bits <= 8:
        raise BadImage(f"a JPEG 2000 of {bits} bits with a sign, which GDAL cuts at 0; convert it to TIFF")
    return _Sizes(bottom - top, right - left, components, bits, signed)


def _codestream(head: bytes) -> tuple[int, int]:
    """Return the offset of a JP2's codestream and its number of colors. Raises BadImage for those that are not read."""
    colors = 0
    for kind, start, end in boxes(head, 0, len(head)):
        if kind == b"jp2c":
            return start, colors
        if kind == b"jp2h":
            for inner, begin, _ in boxes(head, start, min(end, len(head))):
                if inner == b"pclr":
                    raise BadImage("a JPEG 2000 with a palette; convert it to PNG")
                if inner == b"colr" and head[begin : begin + 1] == b"\x01":
                    space = int.from_bytes(head[begin + 3 : begin + 7], "big")
                    if space in _COLORS:
                        raise BadImage(f"a JPEG 2000 of {_COLORS[space]} pixels; convert it to RGB")
                    colors = {16: 3, 17: 1}.get(space, 0)
    return len(head), 0
