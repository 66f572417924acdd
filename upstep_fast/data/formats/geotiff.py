"""GeoTIFFs that need GDAL: sparse ones, compressed by ZSTD, LERC and the like, signed, floating point, scaled.

    values    as stored; where the file has SCALE and OFFSET: value = stored * scale + offset, band by band
    nodata    GDAL_NODATA, NaN and internal masks: not valid; a pixel without a value in some bands alone is NaN there
    alpha     a band as any other: GDAL tags the fourth 8-bit band of R, G, B, NIR as alpha
    palette   its colors
    levels    internal overviews; full size is read from the full-size pixels alone

Other TIFFs are read by decode/tiff.py, which honors GDAL_NODATA too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from upstep_fast.data.formats import tiff_windows
from upstep_fast.data.formats.gdal import num_bits, opened, planes
from upstep_fast.data.reading.nodata import masked
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.data.reading.tiff_header import TiffPage, first_page
from upstep_fast.errors import BadImage
from upstep_fast.runtime.terminal import counted

_RGB, _YCBCR, _JPEG = 2, 6, 7
_NAMES = {4: "mask", 5: "CMYK", _YCBCR: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab"}  # photometric interpretations


def layout(file: File) -> Layout:
    """Return the axes of a GeoTIFF and the sizes of its overviews. Raises BadImage."""
    with opened(file, "GTiff") as dataset:
        shape = (dataset.height, dataset.width)
        count = len(dataset.overviews(1))
        bands = 3 if _palette(dataset) else dataset.count
        what = f"GeoTIFF, {counted(bands, 'band')} of {dataset.dtypes[0]}"
        _checked(dataset, file)
    overviews = [_overview_shape(file, level) for level in range(count)]
    return Layout("CYX", (bands, *shape), what, (shape, *overviews) if overviews else ())


def read(file: File, piece: Piece) -> Stored:
    """Return a GeoTIFF's bands, or a window of one of its overviews. Raises BadImage."""
    if piece.level:
        layout(file).window(piece)  # refuses a level that is not there
    with opened(file, "GTiff", OVERVIEW_LEVEL=piece.level - 1 if piece.level else "NONE") as dataset:
        page = _checked(dataset, file)
        window = Layout("YX", dataset.shape, "").window(Piece(window=piece.window))
        values, masks = planes(dataset, window), _masks(dataset, window)
        colors = _palette(dataset)
        bits, scales, offsets, inverted = num_bits(dataset), dataset.scales, dataset.offsets, _is_inverted(dataset)
    if colors:
        table = np.array([colors.get(i, (0, 0, 0, 255))[:3] for i in range(1 << bits)], dtype=np.uint8)
        return Stored(np.moveaxis(table[values[0]], -1, 0), 0, 255, None if masks is None else masks[0])
    low, high = _range(values.dtype, bits)
    values, low, high = scaled(values, low, high, scales, offsets)
    values, valid = masked(values, masks)
    return Stored(values, low, high, valid, inverted, colors=3 if page.photometric == _RGB and len(values) > 3 else 0)


def scaled(
    values: np.ndarray, low: float | None, high: float | None, scales: Any, offsets: Any
) -> tuple[np.ndarray, float | None, float | None]:
    """Return stored * scale + offset [C, H, W] and its range over all bands; values as they are without a scale."""
    if all(scale == 1 for scale in scales) and not any(offsets):
        return values, low, high
    if not (np.isfinite(scales).all() and np.isfinite(offsets).all() and np.all(scales)):
        raise BadImage(f"scales {scales} and offsets {offsets} give no values; write the file again without them")
    a, b = (np.array(each, dtype=np.float64)[:, None, None] for each in (scales, offsets))
    physical = (values * a + b).astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    if low is None or high is None:
        return physical, None, None
    ends = np.concatenate([low * a + b, high * a + b])
    return physical, float(ends.min()), float(ends.max())


def _checked(dataset: Any, file: File) -> TiffPage:
    """Return the header of the first page. Raises BadImage for what is not one upright picture of known colors."""
    page = first_page(file)
    if page.photometric > 3 and (page.photometric, page.compression) != (_YCBCR, _JPEG):  # which GDAL makes RGB
        raise BadImage(f"a GeoTIFF of {_NAMES.get(page.photometric, 'unknown')} pixels; convert it to RGB")
    if any("complex" in kind for kind in dataset.dtypes):
        raise BadImage(
            f"a GeoTIFF of complex values ({dataset.dtypes[0]}); write amplitude or phase to a file of its own"
        )
    if page.orientation > 1:
        raise BadImage(f"a GeoTIFF of orientation {page.orientation}, which GDAL does not apply; write it upright")
    if len(dataset.subdatasets) > 1:
        raise BadImage(f"a GeoTIFF of {len(dataset.subdatasets)} pages; write each to a file of its own")
    return page


def _masks(dataset: Any, window: tuple[int, int, int, int]) -> np.ndarray | None:
    """Return where bands have values by nodata or an internal mask, [C, H, W] bool; None if nothing says so."""
    flags = {flag.name for band in dataset.mask_flag_enums for flag in band}
    if not flags & {"nodata", "per_dataset"} or ("alpha" in flags and "nodata" not in flags):
        return None
    top, left, height, width = window
    masks: np.ndarray = dataset.read_masks(window=((top, top + height), (left, left + width)))
    return masks > 0


def _palette(dataset: Any) -> dict[int, tuple[int, ...]] | None:
    """Return the colors of a palette by index; None without one."""
    if _is_inverted(dataset):  # whose levels of gray GDAL gives as colors
        return None
    try:
        return dict(dataset.colormap(1)) if dataset.count == 1 and dataset.dtypes[0] in ("uint8", "uint16") else None
    except ValueError:  # no color table
        return None


def _is_inverted(dataset: Any) -> bool:
    return bool(dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES")


def _range(dtype: np.dtype, bits: int) -> tuple[float | None, float | None]:
    """Return the range of integers of so many bits; None, None for floats."""
    if dtype.kind == "f":
        return None, None
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype.kind == "i" else (0, (1 << bits) - 1)


def _overview_shape(file: File, level: int) -> tuple[int, int]:
    with opened(file, "GTiff", OVERVIEW_LEVEL=level) as dataset:
        return dataset.height, dataset.width


def has_data(file: File, piece: Piece) -> bool:
    """Return whether bytes may be stored for any part of a window, without opening the file by GDAL each time."""
    try:
        return piece.level > 0 or tiff_windows.has_data(file, piece)
    except BadImage:  # no tifffile, or a kind that it does not read
        return True
