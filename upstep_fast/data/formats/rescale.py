"""Stored integers and floats through slope and intercept, with the range that they declare."""

from __future__ import annotations

import numpy as np

from upstep_fast.errors import BadImage

Range = tuple[float, float]  # declared, inclusive


def stored_range(bits: int, is_signed: bool) -> Range:
    """Return the range of stored integers of this many bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)


def rescaled(
    values: np.ndarray, declared: Range | None, slope: float, intercept: float
) -> tuple[np.ndarray, Range | None]:
    """Return slope * value + intercept, of any shape, and its declared range; None for floats.

    Integers stay integers where slope and intercept are; else the result is float64. Raises BadImage for a slope of 0
    and for numbers that are not finite.
    """
    if (slope, intercept) == (1, 0):
        return values, declared
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise BadImage(f"slope {slope:g} and intercept {intercept:g} define no values")
    if declared is None:
        return values * np.float64(slope) + intercept, None
    low, high = sorted(value * slope + intercept for value in declared)
    if float(slope).is_integer() and float(intercept).is_integer() and max(-low, high) < 2**31:
        low, high = int(low), int(high)
        dtype = np.result_type(np.int16, np.min_scalar_type(min(low, -high - 1)))
        return (values.astype(np.int64) * int(slope) + int(intercept)).astype(dtype), (low, high)
    return values * np.float64(slope) + intercept, (low, high)
