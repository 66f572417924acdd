"""Where the images lie in the features, before and after: their first two principal components, side by side.

    X = U S V^T, centred;   points = X V[:, :2]          the sign of each axis: its largest loading is positive

Thumbnails appear where the pointer is, by CSS alone. A colour is an image's place along the first axis before, so
the same image has the same colour on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIZE, EDGE = 400, 14  # of a plot, in SVG units
THUMB = 96
COLOURS = 6


def principal(x: Tensor) -> Tensor:
    """[N, D] -> [N, 2], in float64. Fewer than two directions: zeros."""
    centred = x.double() - x.double().mean(0)
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    axes = v[:2] * torch.where(s[:2] > 1e-9 * s[:1].clamp_min(1e-300), 1.0, 0.0)[:, None]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    points = centred @ axes.T
    return torch.nn.functional.pad(points, (0, 2 - points.shape[1]))


def definitions(thumbs: Sequence[str]) -> str:
    """The thumbnails, once for the whole page: plots and sheets refer to them by number."""
    images = "".join(
        f'<image id="t{i}" width="{THUMB}" height="{THUMB}" href="data:image/webp;base64,{thumb}"/>'
        for i, thumb in enumerate(thumbs)
    )
    return f'<svg class="hidden" aria-hidden="true"><defs>{images}</defs></svg>'


def plot(points: Sequence[Sequence[float]], order: Sequence[Sequence[float]], names: Sequence[str],
         text: Callable[[str], str]) -> str:  # fmt: skip
    """An <svg> of one model's points; order: the points whose first axis gives the colours. text: escapes a name."""
    colours = _colours(order)
    places = [(_place(points, i, 0), SIZE - _place(points, i, 1)) for i in range(len(points))]
    dots = "".join(
        f'<circle class="dot c{c}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        for (x, y), c in zip(places, colours, strict=True)
    )
    # a second layer over all dots, which shows only what is under the pointer
    hovers = "".join(
        f'<g class="hover"><circle cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{text(name)}</title></circle>'
        f'<use href="#t{i}" x="{_beside(x):.1f}" y="{_beside(y):.1f}"/></g>'
        for i, ((x, y), name) in enumerate(zip(places, names, strict=True))
    )
    return f'<svg class="cloud" viewBox="0 0 {SIZE} {SIZE}" role="img">{dots}{hovers}</svg>'


def _colours(order: Sequence[Sequence[float]]) -> list[int]:
    ranks = sorted(range(len(order)), key=lambda i: order[i][0])
    found = [0] * len(order)
    for rank, i in enumerate(ranks):
        found[i] = rank * COLOURS // len(order)
    return found


def _place(points: Sequence[Sequence[float]], i: int, axis: int) -> float:
    values = [p[axis] for p in points]
    low, high = min(values), max(values)
    # divided first: differences of huge values would overflow
    span = high / 2 - low / 2
    return SIZE / 2 if span <= 0 else EDGE + (points[i][axis] / 2 - low / 2) / span * (SIZE - 2 * EDGE)


def _beside(at: float) -> float:
    # the side of the pointer where there is room
    return at + 10 if at < SIZE - THUMB - 10 else at - THUMB - 10
