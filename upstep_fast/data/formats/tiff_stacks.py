"""Stacks in TIFFs, a plane at a time: OME-TIFF, ImageJ hyperstacks, and the axes that tifffile's description states.

    axes      those that the description states, by tifffile; S, the samples of a page, and C are the bands. Axes
              without a name here (wavelengths, phases, pages of a file that states none) are F, a second one is P
    series    those that equal the first one in axes, sizes and type are positions P; others are left out
    values    as of any TIFF (tiff_windows.py). Display ranges of ImageJ and OME are not used, nor is SignificantBits
    levels    SubIFDs of OME-TIFF

ImageJ writes stacks above 4 GB with the header of one page, behind which all planes lie. One file of an OME-TIFF of
several files is refused, so no other file is ever opened.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from upstep_fast.data.formats.reasons import bad_image
from upstep_fast.data.formats.tiff_pyramid import Level, Pyramid, check_segments, level_of, pyramid_of, segments_of
from upstep_fast.data.formats.tiff_windows import pyramid_layout, read_window
from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.regular import kept_header
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage

_MAX_PLANES = 1_000_000
_KINDS = {"ome": "OME-TIFF", "imagej": "ImageJ TIFF"}
_COUNT = r'\b(?:IFD|PlaneCount|NumPlanes|First[ZCT]|Size[ZCT]|SamplesPerPixel)="(\d+)"'
_files = Recent(256 << 20)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Planes of a file's series that are alike."""

    form: Layout
    picture: Pyramid  # what all planes have in common, with the levels of the first
    levels: tuple[tuple[Level, ...], ...]  # of each level its planes, series by series
    outer: tuple[tuple[str, int], ...]  # (axis of `form`, size) that number the planes of a series
    inner: tuple[tuple[str, int], ...]  # that number the samples of a plane; (): they are its colors or bands


def layout(file: File) -> Layout:
    """Return axes, levels and resolution of a stack, from its headers. Raises BadImage, OSError."""
    return _opened(file).form


def read(file: File, piece: Piece) -> Stored:
    """Return one picture of a stack, or a window of a level of it. Raises BadImage, OSError."""
    stack = _opened(file)
    stack.form.window(piece)  # refuses places outside the file
    start = piece.index("P") * math.prod(size for _, size in stack.outer) if stack.form.axes.startswith("P") else 0
    samples = _places(stack.inner, piece)
    bands = []
    for place in _places(stack.outer, piece):
        levels = tuple(planes[start + place] for planes in stack.levels)
        band = read_window(file, replace(stack.picture, levels=levels), replace(piece, at=()))
        bands.append(replace(band, values=band.values[samples], colors=0) if stack.inner else band)
    if len(bands) == 1:
        return bands[0]
    masks = [band.valid for band in bands if band.valid is not None]
    valid = np.logical_and.reduce(masks) if masks else None
    values = np.empty((sum(len(band.values) for band in bands), *bands[0].values.shape[1:]), bands[0].values.dtype)
    start = 0
    for band in bands:
        values[start : start + len(band.values)] = band.values
        start += len(band.values)
    return replace(bands[0], values=values, valid=valid, colors=0)


def _places(axes: tuple[tuple[str, int], ...], piece: Piece) -> list[int]:
    """Return the numbers of a picture's planes, or samples: one for each index along C."""
    numbers = np.arange(math.prod(size for _, size in axes)).reshape([size for _, size in axes])
    return numbers[tuple(slice(None) if axis == "C" else piece.index(axis) for axis, _ in axes)].ravel().tolist()


def _opened(file: File) -> _Stack:
    return kept_header(
        _files, file, _parsed, lambda opened: sum(16 * len(x.offsets) + 1_000 for level in opened.levels for x in level)
    )


def _parsed(file: str | io.BytesIO, size: int) -> _Stack:
    try:
        import tifffile
    except ImportError:
        raise BadImage("stacks in TIFFs need tifffile: pip install 'upstep_fast[microscopy]'") from None
    # readers of sets of files would open others
    with bad_image("a TIFF"), tifffile.TiffFile(file, _multifile=False, is_mmstack=False, is_ndtiff=False) as tiff:
        text = str(tiff.pages[0].aspage().description or "")
        _check_counts(text)
        series = list(tiff.series)
        _check_kind(text, series)
        return _stack_of(tiff, series, size)


def _check_counts(text: str) -> None:
    """Raise BadImage for numbers of planes that would fill the memory."""
    counts = [int(count) for count in re.findall(_COUNT, text)]
    if max([*counts, 0]) > _MAX_PLANES or any(
        math.prod(map(int, re.findall(r'\bSize[ZCT]="(\d+)"', pixels))) > _MAX_PLANES
        for pixels in re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", text)
    ):
        raise BadImage(f"an OME-TIFF that states more than {_MAX_PLANES:,} planes")


def _check_kind(text: str, series: list[Any]) -> None:
    """Raise BadImage if tifffile did not find the planes that the description states."""
    kind = series[0].kind if series else ""
    if "<OME" in text[:2000] and kind != "ome":
        raise BadImage(
            "one file of an OME-TIFF in several files, or with other planes than its description states; "
            "join them, e.g. by bioformats2raw or Fiji"
        )
    if text.startswith("ImageJ=") and kind != "imagej":
        raise BadImage("truncated: an ImageJ stack with fewer planes than its description states")


def _stack_of(tiff: Any, series: list[Any], size: int) -> _Stack:
    """Return the planes of the series that are like the first. Raises BadImage."""
    first = series[0]
    alike = [one for one in series if (one.axes, one.shape, one.dtype) == (first.axes, first.shape, first.dtype)]
    page = first.keyframe
    others = [
        (axis, n) for axis, n in zip(first.axes, map(int, first.shape), strict=True) if axis not in "YX" and n > 1
    ]
    samples = int(page.samplesperpixel)
    count = math.prod(n for _, n in others) // samples
    across = next((k for k in range(len(others) + 1) if math.prod(n for _, n in others[:k]) == count), -1)
    inside = others[across:]
    if across < 0 or math.prod(n for _, n in inside) != samples:
        raise BadImage(f"axes {first.axes} of {first.shape} in planes of {page.shape}; write one plane per page")
    names = _names([axis for axis, _ in others])
    sizes = [(name, n) for name, (_, n) in zip(names, others, strict=True)]
    levels = [one for one in first.levels if one.axes == first.axes and _around(one) == _around(first)]
    planes = [[plane for one in alike for plane in _planes(one.levels[k], count, size)] for k in range(len(levels))]
    kind = _KINDS.get(first.kind, "TIFF stack")
    left_out = len(series) - len(alike)
    what = f"{kind}, {left_out} series of other sizes left out," if left_out else kind
    picture = pyramid_of(tiff, page, tuple(level[0] for level in planes), what)
    inner = sizes[across:] if any(axis != "S" for axis, _ in inside) else []
    form = _layout(picture, sizes[:across], inner, len(alike))
    return _Stack(form, picture, tuple(map(tuple, planes)), tuple(sizes[:across]), tuple(inner))


def _around(series: Any) -> list[int]:
    return [n for axis, n in zip(series.axes, series.shape, strict=True) if axis not in "YX"]


def _names(axes: list[str]) -> list[str]:
    """Return the names that axes of tifffile have here."""
    free = [axis for axis in "FP" if axis not in axes]
    known = {"S": "C", "C": "C", "Z": "Z", "T": "T"}
    if sum(axis not in known for axis in axes) > len(free):
        raise BadImage(f"axes {''.join(axes)}; those of at most two other names than Z, C, T and S are read")
    return [known[axis] if axis in known else free.pop(0) for axis in axes]


def _layout(picture: Pyramid, outer: list[tuple[str, int]], inner: list[tuple[str, int]], positions: int) -> Layout:
    plane = pyramid_layout(picture)
    sizes: dict[str, int] = {"P": positions} if positions > 1 else {}
    if positions > 1 and any(name == "P" for name, _ in outer + inner):
        raise BadImage("several series of more than three axes besides Y, X and C; write each to a file of its own")
    for name, n in outer + inner:
        sizes[name] = sizes.get(name, 1) * n
    bands = 1 if inner else plane.size("C")
    if "C" in sizes or (bands > 1 and picture.levels[0].planar):
        sizes["C"] = sizes.get("C", 1) * bands
    sizes |= {"Y": plane.size("Y"), "X": plane.size("X")}
    if "C" not in sizes and bands > 1:
        sizes["C"] = bands
    return Layout("".join(sizes), tuple(sizes.values()), picture.what, plane.levels, picture.mpp)


def _planes(series: Any, count: int, size: int) -> list[Level]:
    """Return where the planes of a series lie. size: of the file. Raises BadImage if one is missing."""
    first = level_of(series.keyframe, size)
    start = series.dataoffset
    if start is not None and first.is_plain:  # one behind the other, also where the header is that of one page
        samples = first.samples if first.planar else 1
        length = first.height * first.width * first.samples // samples * first.dtype.itemsize
        whole = replace(first, segment=(first.height, first.width), is_sparse=False)
        counts = np.full(samples, length)
        places = [start + length * (samples * plane + np.arange(samples)) for plane in range(count)]
        planes = [replace(whole, offsets=offsets, counts=counts) for offsets in places]
    else:
        pages = [series[index] for index in range(len(series))]
        if len(pages) != count or any(page is None for page in pages):
            there = sum(page is not None for page in pages)
            raise BadImage(f"truncated TIFF: {there} of {count} planes are there")
        planes = [replace(first, **segments_of(page)) for page in pages]
    for plane in planes:
        check_segments(plane, size)
    return planes


def forget() -> None:
    """Forget all headers."""
    _files.clear()
