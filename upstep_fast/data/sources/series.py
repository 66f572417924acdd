"""Files that are parts of one series, as DICOM slices are: numbers that are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from upstep_fast.data.reading.stored import Layout


def gaps(layouts: Sequence[Layout]) -> str:
    """Return a note on series whose files leave out numbers; empty if there are none."""
    numbers: dict[str, set[int]] = {}
    for layout in layouts:
        if layout.series and layout.number is not None:
            numbers.setdefault(layout.series, set()).add(layout.number)
    missing = {}
    for series, of_series in numbers.items():
        there = sorted(of_series)
        step = math.gcd(*(b - a for a, b in pairwise(there)))  # numbers may go up by 2
        is_dense = (there[-1] - there[0]) // (step or 1) < 2 * len(there)  # else the files are a choice of slices
        if is_dense and (absent := set(range(there[0], there[-1], step or 1)) - of_series):
            missing[series] = sorted(absent)
    if not missing:
        return ""
    series, places = next(iter(missing.items()))
    shown = ", ".join(map(str, places[:3])) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
    return f"{len(missing):,} of {len(numbers):,} series have gaps: {series} lacks number {shown}"
