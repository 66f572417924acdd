"""Gain against forgetting as an SVG, with the corner that the study aims at."""

from __future__ import annotations

import html
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from upstep_fast.report.charts import ticks

Row = dict[str, Any]
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
MEAN = "mean over the sets"
KINDS = {  # of features that a row measures, and how the plot's names say so
    "adapted": "",
    "ensemble": ", ens.",
    "adapted_whitened": ", w.",
    "ensemble_whitened": ", ens. w.",
}
# the study's targets: change on the source and gain, at least these
TARGETS = {"target: ensemble": (-0.5, 9.0), "gentle: adapted": (-0.5, 5.0)}
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 760, 500, 56, 14, 80, 34


@dataclass(frozen=True)
class Dot:
    """A configuration at one strength on one set, or its mean over the sets."""

    x: float  # change of k-NN on the source, points
    y: float  # gain of k-NN on the target, points
    group: str  # data set, or MEAN
    kind: str  # of KINDS
    name: str


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of all seeds by data set, configuration and strength; probes (no ensemble) are left out."""
    groups = defaultdict(list)
    for row in rows:
        for strength, at in row["at"].items():
            if "ensemble" in at:
                groups[row["data"], row["name"], strength].append(row)
    return dict(sorted(groups.items(), key=lambda item: item[0][0]))


def at_strength(name: str, strength: str) -> str:
    """How a configuration at a strength is called."""
    return name if strength == "1.0" else f"{name} x {float(strength):g}"


def changes(rows: Iterable[Row], strength: str, kind: str, measure: str) -> list[float]:
    """Of the rows that have them, in points, against the base model's features as they are.

    kind: of KINDS; measure: knn, linear, or source, k-NN on the source.
    """
    ats = [(row, row["at"][strength]) for row in rows]
    of_kind = [
        (row, at.get("source", {}).get(kind) if measure == "source" else at.get(kind, {}).get(measure))
        for row, at in ats
    ]
    return [value - row["base"][measure] for row, value in of_kind if value is not None]


def dots(rows: Sequence[Row]) -> list[Dot]:
    """One a data set, configuration, strength and kind; and the mean over the sets of what was measured on all."""
    found = []
    for (data, name, strength), group in grouped(rows).items():
        for kind in KINDS:
            with_source = [row for row in group if kind in row["at"][strength].get("source", {})]
            if with_source:
                x, y = (statistics.mean(changes(with_source, strength, kind, m)) for m in ("source", "knn"))
                found.append(Dot(x, y, data, kind, at_strength(name, strength)))
    sets = {dot.group for dot in found}
    if len(sets) < 2:
        return found
    same = defaultdict(list)
    for dot in found:
        same[dot.name, dot.kind].append(dot)
    means = [
        Dot(statistics.mean(d.x for d in of_all), statistics.mean(d.y for d in of_all), MEAN, kind, name)
        for (name, kind), of_all in same.items()
        if len(of_all) == len(sets)
    ]
    return found + means


def frontier(found: Sequence[Dot]) -> list[Dot]:
    """Those that no other beats in gain without forgetting more (Pareto's), from left to right."""
    return [
        dot
        for dot in sorted(found, key=lambda dot: (dot.x, -dot.y))
        if not any(o.x >= dot.x and o.y >= dot.y and (o.x, o.y) != (dot.x, dot.y) for o in found)
    ]


def plot(rows: Sequence[Row]) -> str:
    """Draw a standalone SVG: change on the source on x, gain on y; filled: adapted, hollow: ensemble; squares: whitened
    features beside the others; a color a set.

    Means over the sets are large and black; the frontier among them (of the one set, if there is one) bears names.
    """
    found = dots(rows)
    means = [dot for dot in found if dot.group == MEAN] or found
    across, upward = "change of 20-NN on the source, points", "gain of k-NN on the target, points"
    spans = []
    lowest, highest = TARGETS["target: ensemble"]
    for values in ([0.0, lowest, *(d.x for d in found)], [0.0, highest, *(d.y for d in found)]):
        pad = 0.08 * (max(values) - min(values)) or 1.0
        spans.append((min(values) - pad, max(values) + pad))

    def at(x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = spans
        px = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(px, 1), round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP), 1)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for name, corner in TARGETS.items():
        x, y = at(*corner)
        parts.append(f'<path d="M{x},{TOP}V{y}H{WIDTH - RIGHT}V{TOP}Z" fill="#2ca02c" fill-opacity=".1"/>')
        label = f"{name} {corner[1]:+g}"
        parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{y - 5}" text-anchor="end" fill="#3a7d3a">{label}</text>')
    for tick in ticks(*spans[0]):
        x = at(tick, 0)[0]
        parts.append(f'<path d="M{x},{TOP}V{HEIGHT - BOTTOM}" stroke="{"#888" if tick == 0 else "#e4e4e4"}"/>')
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(*spans[1]):
        y = at(0, tick)[1]
        parts.append(f'<path d="M{LEFT},{y}H{WIDTH - RIGHT}" stroke="{"#888" if tick == 0 else "#e4e4e4"}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    groups = sorted({dot.group for dot in found} - {MEAN}) + [MEAN] * any(dot.group == MEAN for dot in found)
    colors = {g: "#222" if g == MEAN else COLORS[i % len(COLORS)] for i, g in enumerate(groups)}
    for dot in found:
        color, (px, py) = colors[dot.group], at(dot.x, dot.y)
        fill, r = color if dot.kind.startswith("adapted") else "white", 5 if dot in means else 3
        if dot.kind.endswith("whitened"):
            mark = f'rect x="{px - r:.1f}" y="{py - r:.1f}" width="{2 * r}" height="{2 * r}"'
        else:
            mark = f'circle cx="{px}" cy="{py}" r="{r}"'
        tip = html.escape(f"{dot.name}, {dot.kind}, {dot.group}: {dot.x:+.1f}, {dot.y:+.1f}")
        closing = mark.split()[0]
        parts.append(f'<{mark} fill="{fill}" stroke="{color}" stroke-width="1.5"><title>{tip}</title></{closing}>')
    best = [dot for kind in KINDS for dot in frontier([d for d in means if d.kind == kind])]
    parts += names([(*at(dot.x, dot.y), dot.name + KINDS[dot.kind]) for dot in best])
    for i, group in enumerate(groups):
        x = LEFT + min(150, (WIDTH - LEFT - RIGHT) // len(groups)) * i
        parts.append(f'<circle cx="{x + 6}" cy="16" r="5" fill="{colors[group]}"/>')
        parts.append(f'<text x="{x + 16}" y="20">{html.escape(group)}</text>')
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 14}" text-anchor="end">filled: adapted, hollow: ensemble, squares: '
        "whitened</text>"
    )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 36}" text-anchor="middle">{across}</text>')
    turn = f'transform="translate(14 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)"'
    parts.append(f'<text {turn} text-anchor="middle">{upward}</text>')
    style = 'font-family="sans-serif" font-size="12" role="img"'
    # lizard forgives: one drawing, from the axes to the legend
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style} aria-label="{upward} over '
        f'{across}">{"".join(parts)}</svg>\n'
    )


def names(places: Sequence[tuple[float, float, str]]) -> list[str]:
    """Texts beside dots, each moved up until it covers no other; places: (x, y, text)."""
    taken: list[tuple[float, float, float]] = []  # left, right, y
    parts = []
    for x, y, text in sorted(places, key=lambda place: place[1]):
        size = 6.0 * len(text)
        left, y = (x - 8 - size if x > WIDTH * 0.75 else x + 8), y - 6
        while any(left < right and left + size > start and abs(y - other) < 12 for start, right, other in taken):
            y -= 12
        taken.append((left, left + size, y))
        parts.append(f'<text x="{left:.1f}" y="{y:.1f}" font-size="11">{html.escape(text)}</text>')
    return parts
