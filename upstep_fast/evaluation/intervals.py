"""95 % intervals of an accuracy and of a gain, in percent, in closed form.

    accuracy, n images, m right:  Wilson (1927):  (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    gain, b images lost and c won:  d = (c - b)/(n + 2),  d -+ z sqrt(((b + c + 1) - (n + 2) d^2)) / (n + 2)

The second counts the same images twice, so only those on which the two models differ matter: McNemar's pairing, as an
interval. It is Wald's with half an image more in each of the four cells (Agresti and Min 2005), which holds its level
for few images too, and for b = c = 0.
"""

from __future__ import annotations

import math

from torch import Tensor

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def accuracy_interval(right: Tensor) -> list[float]:
    """Return Wilson's interval [low, high] in percent. right: [N] bool, per image."""
    n, m = len(right), int(right.sum())
    p = m / n
    center, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((center + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
    return [100 * (0.0 if m == 0 else low), 100 * (1.0 if m == n else high)]


def gain_interval(before: Tensor, after: Tensor) -> list[float]:
    """Return the interval [low, high] in points of the gain `after` - `before`; [N] bool, right on the same images."""
    n, lost, won = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    d = (won - lost) / (n + 2)
    half = Z * math.sqrt((won + lost + 1) - (n + 2) * d**2) / (n + 2)
    return [100 * max(-1.0, d - half), 100 * min(1.0, d + half)]
