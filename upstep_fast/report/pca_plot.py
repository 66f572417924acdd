"""Scatter plots of the images' first two principal components, before and after adaptation.

    X = U S V^T, centered;   points = X V[:, :2]          the sign of each axis: its largest loading is positive

Thumbnails appear under the pointer, by CSS alone. The color is the image's rank along the first axis before
adaptation, so an image has one color in both plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from torch import Tensor

from upstep_fast.report.rendering import render

SIZE, EDGE = 400, 14  # of a plot, in SVG units
THUMB = 96
COLORS = 6


@dataclass(frozen=True)
class Dot:
    """One image in the plot; coordinates in SVG units."""

    x: float
    y: float
    thumb_x: float
    thumb_y: float
    color: int  # 0 .. COLORS - 1
    name: str


def principal(x: Tensor) -> Tensor:
    """Return the first two principal components of x: [N, D] -> [N, 2], in float64; zeros in place of missing ones."""
    centered = x.double() - x.double().mean(0)
    _, s, v = torch.linalg.svd(centered, full_matrices=False)
    axes = v[:2] * torch.where(s[:2] > 1e-9 * s[:1].clamp_min(1e-300), 1.0, 0.0)[:, None]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    points = centered @ axes.T
    return torch.nn.functional.pad(points, (0, 2 - points.shape[1]))


def thumbnail_definitions(thumbs: Sequence[str]) -> Markup:
    """Return an <svg> that defines the thumbnails (WebP in base64) once, as #t0, #t1, ... for plots and tables."""
    return render("thumbnails.html", thumbs=thumbs, size=THUMB)


def plot(points: Sequence[Sequence[float]], color_points: Sequence[Sequence[float]], names: Sequence[str]) -> Markup:
    """Return an <svg> of one model's points, each (x, y); the first axis of `color_points` gives the colors."""
    xs, ys = (_scaled([point[axis] for point in points]) for axis in range(2))
    dots = [
        Dot(round(x, 1), round(SIZE - y, 1), _thumb_corner(x), _thumb_corner(SIZE - y), color, name)
        for x, y, color, name in zip(xs, ys, _colors(color_points), names, strict=True)
    ]
    return render("pca_plot.html", dots=dots, size=SIZE)


def _colors(points: Sequence[Sequence[float]]) -> list[int]:
    by_rank = sorted(range(len(points)), key=lambda i: points[i][0])
    colors = [0] * len(points)
    for rank, i in enumerate(by_rank):
        colors[i] = rank * COLORS // len(points)
    return colors


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    # halved first: differences of huge values would overflow
    span = high / 2 - low / 2
    if span <= 0:
        return [SIZE / 2] * len(values)
    return [EDGE + (value / 2 - low / 2) / span * (SIZE - 2 * EDGE) for value in values]


def _thumb_corner(at: float) -> float:
    # on the side of the pointer that has room
    return round(at + 10 if at < SIZE - THUMB - 10 else at - THUMB - 10, 1)
