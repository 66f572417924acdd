"""95 % intervals of a score and of a gain, in percent, in closed form.

    accuracy, n images, m right:  Wilson (1927):  (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    mean of n values v in 0..1:   m = (sum v + 2)/(n + 4),  m -+ z sqrt((sum v^2 + 2)/(n + 4) - m^2) / sqrt(n + 4)
    gain, differences d of n images:  m = sum d/(n + 2),  m -+ z sqrt(sum d^2 + 1 - (n + 2) m^2) / (n + 2)
    jackknife, t_i the value without image i:  t -+ z sqrt((n - 1)/n sum (t_i - mean t)^2)
    several seeds:  sqrt(a^2 + b^2) on either side; a: as above, of the means over the seeds,
                    b = t_{S-1} s / sqrt(S), s the deviation of the S seeds' means: both are drawn at random

The gain counts the same images twice, so only those on which the two models differ matter: McNemar's pairing, as an
interval. It is Wald's with half an image more in each of the four cells (Agresti and Min 2005), which holds its level
for few images too, and if no image changed. The mean's is Wald's with two values of 0 and two of 1 more (Agresti and
Coull 1998). The jackknife is for what is no mean over images (Efron and Stein 1981); of a gain it takes t_i of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
SEEDS = 10  # of a score over several seeds
T = 2.2621571627409915  # 97.5 % quantile of Student's t with SEEDS - 1 degrees of freedom


@dataclass(frozen=True)
class Jackknife:
    """A score of images that is no mean over them, at most 1; over several seeds both are means."""

    value: float
    without: Tensor  # [N] fp64, the value without each image
    of_seeds: Tensor | None = None  # [SEEDS] fp64, the value of each seed


# per image: right or not [N] bool, a value in 0..1 [N], or either over SEEDS seeds, [SEEDS, N]
Values = Tensor | Jackknife


def percent(values: Values) -> float:
    """Return the score in percent."""
    return 100.0 * (values.value if isinstance(values, Jackknife) else float(values.double().mean()))


def score_interval(values: Values) -> list[float]:
    """Return the interval [low, high] of a score in percent."""
    if isinstance(values, Jackknife):
        low, high = _jackknife(values.value, values.without, values.of_seeds)
        return [low, min(100.0, high)]
    if values.dtype == torch.bool and values.ndim == 1:
        return accuracy_interval(values)
    if values.ndim == 2:
        return _over_seeds(values, score_interval(values.double().mean(0)), 0.0)
    v, n = values.double(), len(values) + 4
    mean, squares = (float(v.sum()) + 2) / n, float(v.square().sum()) + 2
    half = Z * math.sqrt((squares / n - mean**2) / n)
    return [100 * max(0.0, mean - half), 100 * min(1.0, mean + half)]


def accuracy_interval(right: Tensor) -> list[float]:
    """Return Wilson's interval [low, high] in percent. right: [N] bool, per image."""
    n, m = len(right), int(right.sum())
    p = m / n
    center, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((center + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
    return [100 * (0.0 if m == 0 else low), 100 * (1.0 if m == n else high)]


def gain_interval(before: Values, after: Values) -> list[float]:
    """Return the interval [low, high] in points of the gain `after` - `before`, of the same images."""
    if isinstance(before, Jackknife) and isinstance(after, Jackknife):
        seeds = None if before.of_seeds is None or after.of_seeds is None else after.of_seeds - before.of_seeds
        return _jackknife(after.value - before.value, after.without - before.without, seeds)
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    d = after.double() - before.double()
    if d.ndim == 2:
        return _over_seeds(d, gain_interval(torch.zeros(d.shape[1]), d.mean(0)), -1.0)
    low, high = change_interval(float(d.sum()), float(d.square().sum()), len(d))
    return [max(-100.0, low), min(100.0, high)]


def change_interval(total: float, squares: float, n: int) -> tuple[float, float]:
    """Return the interval of mean(d) in points; total, squares: sum(d) and sum(d^2) over n images."""
    mean = total / (n + 2)
    half = Z * math.sqrt(squares + 1 - (n + 2) * mean**2) / (n + 2)
    return 100 * (mean - half), 100 * (mean + half)


def _over_seeds(values: Tensor, of_images: list[float], least: float) -> list[float]:
    """Return the interval of the images widened by the seeds'. values: [SEEDS, N]."""
    means = values.double().mean(1)
    point, half = 100 * float(means.mean()), _seeds(means)
    low, high = (point + sign * math.hypot(point - end, half) for sign, end in zip((-1, 1), of_images, strict=True))
    return [max(100 * least, low), min(100.0, high)]


def _jackknife(value: float, without: Tensor, of_seeds: Tensor | None) -> list[float]:
    n = len(without)
    half = 100 * Z * math.sqrt((n - 1) / n * float((without - without.mean()).square().sum()))
    half = half if of_seeds is None else math.hypot(half, _seeds(of_seeds))
    return [100 * value - half, 100 * value + half]


def _seeds(values: Tensor) -> float:
    """Return half the interval's width of the mean of [SEEDS] values that are drawn at random, in percent."""
    assert len(values) == SEEDS
    return 100 * T * float(values.std()) / math.sqrt(SEEDS)
