"""The adapter of a projection in the compute type: its products and its gradients.

    low = x A^T + A beta [M, T r]      y += low (s B)^T      dx += (dy s B) A
    dA = d_low^T x                     d(A beta) = sum d_low      d(s B) = dy^T low      with d_low = dy s B

Each of the T parts adds to its own n of the N output columns, so s B is block-diagonal. It has one of two layouts:

    by parts    [T, n, r]       a product for each part, on its columns alone; on CPUs the block-diagonal one takes 1.5
                                times as long
    wide        [1, span, T r]  one product, zeros and all: for T = 3, dy is read by two products instead of by six

The gradient has the layout of s B. What stands outside its diagonal is meaningless; `AdapterGroup.layout` drops it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from upstep_fast.kernels.adapter_gradients import adapter_gradients, d_low_of


@dataclass(frozen=True)
class LowRank:
    """The adapter of a projection of K inputs, in the compute type."""

    a: Tensor  # [T r, K]
    shift: Tensor  # [T r], A beta
    b: Tensor  # [T, n, r] or [1, span, T r]
    first: tuple[int, ...]  # first output column of each block of b

    def low(self, x: Tensor) -> Tensor:
        """Compute the product with A: x [..., K] -> [..., T r]."""
        return F.linear(x, self.a, self.shift)

    def add_output(self, y: Tensor, x: Tensor) -> None:
        """Add the adapter's output for x [M, K] to y [M, N], in place."""
        low = self.low(x)
        for columns, ranks, b in self._blocks():
            y[:, columns].addmm_(low[:, ranks], b.T)

    def add_input_gradient(self, dx: Tensor, dy: Tensor) -> None:
        """Add the gradient of the input, from dy [M, N], to dx [M, K], in place."""
        dx.addmm_(d_low_of(dy, self.b, self.first), self.a)

    def gradients(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of A and s B in the compute type and of A beta in fp32; dy: [..., N], x: [..., K]."""
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        return adapter_gradients(dy, x, self.a, self.shift, self.b, self.first)

    def _blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the columns of y, the columns of low and the matrix [n, r] of each block of b."""
        n, r = self.b.shape[1:]
        for i, (start, b) in enumerate(zip(self.first, self.b, strict=True)):
            yield slice(start, start + n), slice(i * r, (i + 1) * r), b
