"""Values that mean no value: a number that a TIFF names (GDAL_NODATA), and pictures where bands differ in it."""

from __future__ import annotations

import numpy as np


def nodata_masks(values: np.ndarray, nodata: str) -> np.ndarray | None:
    """Return which values are not the number that GDAL_NODATA names, bool [C, H, W]; None if no value can be it.

    As GDAL: the number is one of the values' type, else it is of no effect. NaN is not valid anyway.
    """
    try:
        number = int(nodata) if nodata.lstrip("+-").isdecimal() else float(nodata)
    except ValueError:
        return None
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            stored = values.dtype.type(number)
        return None if np.isnan(stored) else values != stored
    info = np.iinfo(values.dtype)
    if not np.isfinite(number) or number != int(number) or not info.min <= number <= info.max:
        return None
    different: np.ndarray = values != values.dtype.type(int(number))
    return different


def masked(values: np.ndarray, masks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return values [C, H, W] and the mask [H, W] of pixels that have a value in any band.

    masks: [C, H, W] bool, False: no value. Where bands differ, values become floats, NaN where a band has none.
    """
    if masks is None or masks.all():
        return values, None
    valid = np.asarray(masks.any(0))
    if (masks | ~valid).all():  # all bands alike
        return values, valid
    wide = values.dtype.kind != "f" and values.dtype.itemsize > 2
    return np.where(masks, values, np.nan).astype(np.float64 if wide else np.float32), valid
