"""Line and bar charts as inline SVG, in the page's own colors in light mode, dark mode and print.

Written here because matplotlib's SVG has fixed colors, which dark mode and print would not change.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# size and margins of a chart in SVG units, each about one CSS pixel where the chart has the width of a phone
WIDTH, HEIGHT = 380, 224
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 42
POINTS = 150  # of a line: more steps are drawn as the mean of neighbors, over a band from their minimum to maximum
COLORS = 6  # classes c0 .. c5 of the page's style sheet; further lines are dashed
LARGEST = 1e300  # beyond it, differences overflow
RUG = 6  # height of the strip that shows marked steps


@dataclass(frozen=True)
class Line:
    """One curve; values that are None are not drawn."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Point:
    """The mean and range of neighboring values of a line."""

    x: float
    mean: float
    low: float
    high: float


def line_chart(
    unit: str, lines: Sequence[Line], *, from_zero: bool = False, marked: Sequence[tuple[float, bool]] = ()
) -> str:
    """Return an <svg> of `lines` over steps, with labeled axes; a sentence if there is nothing to draw.

    unit: of the y axis. marked: (step, whether the strip under the curves marks it).
    """
    drawn = [reduce(line) for line in lines]
    points = [point for line in drawn for point in line]
    if not points:
        return '<p class="empty">no values</p>'
    x_low, x_high = _span(min(p.x for p in points), max(p.x for p in points))
    y_low, y_high = _span(min(p.low for p in points), max(p.high for p in points), from_zero)
    floor = HEIGHT - BOTTOM

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(floor - (y - y_low) / (y_high - y_low) * (floor - TOP), 1)

    parts = []
    for tick in ticks(y_low, y_high):
        parts.append(f'<path class="grid" d="M{LEFT},{down(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for tick in ticks(x_low, x_high):
        parts.append(f'<text x="{across(tick)}" y="{floor + 23}" text-anchor="middle">{tick:,g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    parts += _rug(marked, floor, across)
    for i, line in enumerate(drawn):
        parts += _curve(line, i, across, down, with_band=len(lines) == 1)
    label = html.escape(f"{unit} over steps: {', '.join(line.label for line in lines)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def reduce(line: Line) -> list[Point]:
    """Return at most POINTS points: the values that are not None, neighboring ones merged."""
    values = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and abs(y) < LARGEST]
    count = min(POINTS, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    points = []
    for start, stop in pairwise(edges):
        xs, ys = zip(*values[start:stop], strict=True)
        # divided before the sum, which would overflow on huge values
        points.append(Point(sum(xs) / len(xs), sum(y / len(ys) for y in ys), min(ys), max(ys)))
    return points


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers within low .. high."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _curve(
    line: Sequence[Point], i: int, across: Callable[[float], float], down: Callable[[float], float], with_band: bool
) -> list[str]:
    color, parts = f"c{i % COLORS}" + " dashed" * (i >= COLORS), []
    if with_band and any(p.low < p.high for p in line):
        edge = [(p.x, p.high) for p in line] + [(p.x, p.low) for p in reversed(line)]
        outline = " ".join(f"{across(x)},{down(y)}" for x, y in edge)
        parts.append(f'<polygon class="band {color}" points="{outline}"/>')
    if len(line) == 1:
        cx, cy = across(line[0].x), down(line[0].mean)
        parts.append(f'<circle class="dot {color}" cx="{cx}" cy="{cy}" r="3"/>')
    elif line:
        path = " ".join(f"{across(p.x)},{down(p.mean)}" for p in line)
        parts.append(f'<polyline class="line {color}" points="{path}"/>')
    return parts


def _span(low: float, high: float, from_zero: bool = False) -> tuple[float, float]:
    # never so narrow that it cannot be divided into ticks
    low, size = min(low, 0.0) if from_zero else low, max(abs(low), abs(high))
    if size < 1 / LARGEST:
        return 0.0, 1.0
    return (low, high) if high - low > 1e-9 * size else (low - size / 2, high + size / 2)


def _rug(marked: Sequence[tuple[float, bool]], floor: float, across: Callable[[float], float]) -> list[str]:
    count = min(POINTS, len(marked))
    parts = []
    for i in range(count):
        merged = marked[i * len(marked) // count : (i + 1) * len(marked) // count]
        width = (WIDTH - LEFT - RIGHT) / count
        x = min(max(LEFT, across((merged[0][0] + merged[-1][0]) / 2) - width / 2), WIDTH - RIGHT - width)
        # the more of the merged steps are marked, the darker
        if share := sum(is_marked for _, is_marked in merged) / len(merged):
            box = f'x="{x:.1f}" y="{floor + 3}" width="{width:.1f}" height="{RUG}"'
            parts.append(f'<rect class="mark" {box} opacity="{share:.2f}"/>')
    return parts


@dataclass(frozen=True)
class Bar:
    """A value in percent with its standard error; None: unknown."""

    group: str
    label: str
    value: float
    error: float | None


def bar_chart(unit: str, bars: Sequence[Bar]) -> str:
    """Return an <svg> of bars from 0 to 100 percent with their errors as whiskers, grouped by `Bar.group`."""
    if not bars:
        return '<p class="empty">no values</p>'
    labels, groups = list(dict.fromkeys(b.label for b in bars)), list(dict.fromkeys(b.group for b in bars))
    floor = HEIGHT - BOTTOM
    width = (WIDTH - LEFT - RIGHT) / (len(bars) + len(groups))

    def down(percent: float) -> float:
        return round(floor - min(100.0, max(0.0, percent)) / 100 * (floor - TOP), 1)

    parts = []
    for tick in (0, 25, 50, 75, 100):
        parts.append(f'<path class="grid" d="M{LEFT},{down(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    left = LEFT + width / 2
    for group in groups:
        members = [b for b in bars if b.group == group]
        middle = left + width * len(members) / 2
        parts.append(f'<text x="{middle:.1f}" y="{floor + 18}" text-anchor="middle">{html.escape(group)}</text>')
        for bar in members:
            parts += _bar(bar, f"c{labels.index(bar.label) % COLORS}", left, 0.8 * width, down)
            left += width
        left += width
    label = html.escape(f"{unit}: {', '.join(groups)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _bar(bar: Bar, color: str, left: float, width: float, down: Callable[[float], float]) -> list[str]:
    top = down(bar.value)
    box = f'x="{left:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT - BOTTOM - top:.1f}"'
    title = f"{bar.label}: {bar.value:.1f}" + (f" ± {bar.error:.1f}" if bar.error is not None else "")
    parts = [f'<rect class="bar {color}" {box}><title>{html.escape(title)}</title></rect>']
    if bar.error is not None:
        x, high, low = left + width / 2, down(bar.value + bar.error), down(bar.value - bar.error)
        parts.append(f'<path class="whisker" d="M{x:.1f},{high}V{low}M{x - 4:.1f},{high}h8M{x - 4:.1f},{low}h8"/>')
    return parts


def share_bar(shares: Sequence[tuple[str, float]]) -> str:
    """Return an <svg> of one bar cut into parts. shares: (label, share between 0 and 1)."""
    parts, left = [], 0.0
    for i, (label, share) in enumerate(shares):
        box = f'x="{left:.1f}" y="0" width="{share * WIDTH:.1f}" height="24"'
        title = html.escape(f"{label}: {100 * share:.1f} %")
        parts.append(f'<rect class="bar c{i % COLORS}" {box}><title>{title}</title></rect>')
        left += share * WIDTH
    return f'<svg viewBox="0 0 {WIDTH} 24" role="img" aria-label="shares">{"".join(parts)}</svg>'
