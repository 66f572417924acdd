"""Levels of a pyramid in a TIFF, and how large its pixels are, by the rules of each writer."""

from __future__ import annotations

import re
from typing import Any

from upstep_fast.errors import BadImage

_MAX_PAGES = 64  # looked at for levels
_SAME_SHAPE = 0.02  # relative difference of the levels' aspect ratios; sizes are rounded
_REDUCED = 1  # bit of NewSubfileType
_INCH, _CENTIMETER = 2, 3
_MICROMETERS = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "micron": 1.0, "\\u00B5m": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}


def levels_of(tiff: Any) -> list[Any]:
    """Return the pages that are the levels of the first picture, full size first. Raises BadImage.

    tiff: an open tifffile.TiffFile.
    """
    pages = [tiff.pages[index] for index in range(min(len(tiff.pages), _MAX_PAGES))]
    base = pages[0].aspage()
    below = base.pages or ()  # SubIFDs
    others = [page.aspage() for page in (*list(below)[:_MAX_PAGES], *pages[1:])]
    if int(base.subfiletype) & _REDUCED:
        raise BadImage("a TIFF whose first page is a thumbnail; write the picture itself as the first page")
    levels = [base]
    for page in sorted(others, key=lambda page: -page.imagewidth):
        is_marked = bool(int(page.subfiletype) & _REDUCED) or (tiff.is_svs and page.is_tiled)
        if is_marked and page.imagewidth < levels[-1].imagewidth and _is_same_picture(page, base):
            levels.append(page)
    return levels


def _is_same_picture(page: Any, base: Any) -> bool:
    kinds = [
        (one.samplesperpixel, one.dtype, one.bitspersample, int(one.photometric), one.is_tiled) for one in (page, base)
    ]
    # a side of the smaller one may be rounded by a pixel either way
    error = abs(page.imagelength * base.imagewidth / (base.imagelength * page.imagewidth) - 1)
    return kinds[0] == kinds[1] and error <= _SAME_SHAPE + 1 / min(page.imagelength, page.imagewidth)


def micrometers_per_pixel(tiff: Any, base: Any) -> float | None:
    """Return the size of a pixel; None if the file does not say.

    Aperio's MPP, OME's PhysicalSizeX with its unit, ImageJ's unit, else the resolution in inches or centimeters.
    """
    text = str(base.description or "")
    if tiff.is_svs:
        match = re.search(r"\bMPP\s*=\s*([0-9.]+)", text)
        return _positive(match and match[1])
    if "<OME" in text[:2000]:
        size = re.search(r'PhysicalSizeX="([0-9.eE+-]+)"', text)
        unit = re.search(r'PhysicalSizeXUnit="([^"]{1,12})"', text)
        return _positive(size and size[1], _MICROMETERS.get(unit[1] if unit else "µm", 0))
    per_unit = base.tags.valueof(282)
    ratio = per_unit[1] / per_unit[0] if isinstance(per_unit, tuple) and per_unit[0] > 0 else None
    if text.startswith("ImageJ="):
        unit = re.search(r"^unit=(\S{1,12})", text, re.MULTILINE)
        return _positive(ratio, _MICROMETERS.get(unit[1] if unit else "", 0))
    return _positive(ratio, {_INCH: 25_400.0, _CENTIMETER: 10_000.0}.get(int(base.tags.valueof(296, _INCH)), 0))


def _positive(value: Any, factor: float = 1.0) -> float | None:
    """Return a number that may be a size; None for what is none."""
    try:
        size = float(value) * factor
    except (TypeError, ValueError):
        return None
    return size if 0 < size < 1e9 else None
