"""Logistic regression to a proven optimum, by Newton's method with conjugate gradients.

    f(W, b) = 1/N sum_i -log p_i[y_i] + l2/2 |W|^2,    p_i = softmax(W^T x_i + b)

Newton's step d solves H d = -g; conjugate gradients need only products H v. They are preconditioned by the mean of the
Hessian's blocks over the classes, M = X^T diag(mean_c p_c (1 - p_c)) X / N + l2 I.

The fit ends when half the Newton decrement, -g^T d / 2, which is f - f* to second order, is below GAP / N. At the
optimum f - f* >= 1/2 mean_i dz_i^T S_i dz_i with S = diag(p) - p p^T, dp = S dz and |S| <= 1/2, so that
|dp_i|^2 <= N (f - f*): no probability of a training image is off by more than sqrt(GAP) = 1e-3.

Products are in fp32; gradient, value and decrement are in fp64, since at small l2 the optimum is flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GAP = 1e-6
NEWTON_STEPS, CG_STEPS = 50, 300
CG_RESIDUAL = 0.1  # squared, relative, in the norm of M^-1
SHORTEST = 1e-8  # share of a Newton step below which the line search gives up


@dataclass(frozen=True)
class Logistic:
    """A fitted logistic regression. converged: the gap to the optimum is below GAP / N."""

    weight: Tensor  # [D + 1, C] fp64, the biases in the last row
    converged: bool

    def scores(self, x: Tensor) -> Tensor:
        """Return the logits [N, C] fp64 of x [N, D]."""
        return _with_ones(x).double() @ self.weight


def fit_logistic(x: Tensor, y: Tensor, classes: int, l2: float, start: Logistic | None = None) -> Logistic:
    """Minimize mean cross-entropy + l2/2 |W|^2. x: [N, D], standardized; y: [N] int64; start: a fit near by."""
    x = _with_ones(x).float()
    target = F.one_hot(y, classes).double()
    decay = torch.full((x.shape[1], 1), l2, dtype=torch.float64)
    decay[-1] = 0  # of the biases
    w = torch.zeros(x.shape[1], classes, dtype=torch.float64) if start is None else start.weight
    exact = x.double()

    def value(z: Tensor, w: Tensor) -> Tensor:
        return (z.logsumexp(1) - (z * target).sum(1)).mean() + 0.5 * (decay * w.square()).sum()

    z = exact @ w
    f, factor = value(z, w), None
    for _ in range(NEWTON_STEPS):
        p = z.softmax(1)
        g = exact.T @ (p - target) / len(x) + decay * w
        p = p.float()
        if factor is None:
            factor = _preconditioner(x, p, l2)
        step = _newton_step(x, p, g.float(), decay.float(), factor).double()
        decrement, change, share = -float((g * step).sum()), exact @ step, 1.0
        while not (new := value(z + share * change, w + share * step)) <= f - 1e-4 * share * decrement:
            share /= 2
            if share < SHORTEST:  # rounding: the value does not fall any more
                return Logistic(w, decrement / 2 <= GAP / len(x))
        w, z, f = w + share * step, z + share * change, new
        if decrement / 2 <= GAP / len(x):
            return Logistic(w, True)
    return Logistic(w, False)


def _with_ones(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


def _preconditioner(x: Tensor, p: Tensor, l2: float) -> Tensor:
    m = (x * (p * (1 - p)).mean(1, keepdim=True)).T @ x / len(x)
    while True:
        m.diagonal().add_(l2)
        factor, failed = torch.linalg.cholesky_ex(m)
        if not failed:
            return factor
        l2 *= 10  # below the rounding of m in fp32


def _newton_step(x: Tensor, p: Tensor, g: Tensor, decay: Tensor, factor: Tensor) -> Tensor:
    """Return d with H d = -g, [D + 1, C], by preconditioned conjugate gradients."""
    d, r = torch.zeros_like(g), -g
    v = q = torch.cholesky_solve(r, factor)
    first = rq = (r * q).sum()
    for _ in range(CG_STEPS):
        pu = p * (x @ v)
        hv = x.T @ (pu - p * pu.sum(1, keepdim=True)) / len(x) + decay * v
        curvature = (v * hv).sum()
        if not curvature > 0:  # rounding
            break
        a = rq / curvature
        d, r = d + a * v, r - a * hv
        q = torch.cholesky_solve(r, factor)
        rq, before = (r * q).sum(), rq
        if rq <= CG_RESIDUAL * first:
            break
        v = q + rq / before * v
    return d
