"""A frozen projection with its adapter, in the compute type or in row-wise fp8.

    compute type   y = x W^T + c, the adapter merged into W              dx = dy W
    fp8            y = Q(x) Q(W)^T + c + (x A^T + A beta) (s B)^T        dx = Q(dy) Q(W^T)^T + (dy s B) A
                   the adapter stays separate, in bf16: merged into fp8 it would be rounded away

Q: e4m3 with one scale per row (kernels/quantize.py). Hopper's row-wise product needs separate copies of W and W^T, each
with its own scales, so fp8 weights take as many bytes as bf16 ones: fp8 saves time, not memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.kernels.lora_linear.fp8 import scaled_mm
from upstep_fast.kernels.quantize import quantize

EPILOGUES = {"erf": "none", "tanh": "tanh"}  # GELU after a product, as oneDNN names it


@dataclass(frozen=True)
class Quantized:
    """Rows [..., K] in e4m3 with scales [..., 1], and the values they were quantized from."""

    q: Tensor
    scale: Tensor
    dequantized: Tensor | None  # in the compute type; None where only an fp8 product uses the rows


@dataclass(frozen=True)
class Fp8Weight:
    """A frozen weight [N, K] for the forward product, and its transpose [K, N] for the backward one."""

    q: Tensor
    scale: Tensor  # [N, 1]
    q_t: Tensor
    scale_t: Tensor  # [K, 1]


@dataclass(frozen=True)
class MergedProjection:
    """The frozen weight with the adapter added, rounded once to the compute type."""

    weight: Tensor  # [N, K]
    bias: Tensor  # [N]

    def product(self, x: Tensor | Quantized) -> Tensor:
        """Multiply by the weight: x [..., K] -> [..., N]."""
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, self.bias)

    def input_gradient(self, dy: Tensor | Quantized) -> Tensor:
        """Multiply by the transpose: dy [..., N] -> [..., K]."""
        assert isinstance(dy, Tensor)
        return dy @ self.weight


@dataclass(frozen=True)
class Fp8Projection:
    """The frozen weight in fp8 and a separate adapter."""

    weight: Fp8Weight
    bias: Tensor  # [N], compute type
    factors: Sequence[Tensor] | None  # (A [T, r, K], A beta [T, r], s B [T, n, r]), compute type
    parts: Sequence[int]  # for each of the T adapter parts, the block of n output rows it adds to

    def product(self, x: Tensor | Quantized) -> Tensor:
        """Multiply by the weight: x [..., K] -> [..., N]."""
        y = _scaled_mm(x, self.weight.q, self.weight.scale, self.bias)
        if self.factors is not None:
            a, shift, b = self.factors
            low = F.linear(dequantized(x), a.flatten(0, 1), shift.flatten()).unflatten(-1, shift.shape)
            for t, rows in enumerate(self._rows(b)):
                y[..., rows] += low[..., t, :] @ b[t].T
        return y

    def input_gradient(self, dy: Tensor | Quantized) -> Tensor:
        """Multiply by the transpose: dy [..., N] -> [..., K]."""
        dx = _scaled_mm(dy, self.weight.q_t, self.weight.scale_t, None)
        if self.factors is not None:
            a, _, b = self.factors
            for t, rows in enumerate(self._rows(b)):
                dx += (dequantized(dy)[..., rows] @ b[t]) @ a[t]
        return dx

    def _rows(self, b: Tensor) -> list[slice]:
        return [slice(part * b.shape[1], (part + 1) * b.shape[1]) for part in self.parts]


@dataclass(frozen=True)
class PackedProjection:
    """A frozen weight in oneDNN's layout, for forward products alone."""

    weight: Tensor  # [N, K], opaque
    bias: Tensor  # [N]

    def product(self, x: Tensor | Quantized) -> Tensor:
        """Multiply by the weight: x [..., K] -> [..., N]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def gelu_product(self, x: Tensor, activation: str) -> Tensor:
        """Compute gelu(x W^T + c), [..., K] -> [..., N]; activation: a key of EPILOGUES."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], EPILOGUES[activation])

    def input_gradient(self, dy: Tensor | Quantized) -> Tensor:
        """Raise NotImplementedError: the weight is packed for the forward product."""
        raise NotImplementedError("engine: a packed weight has no gradient")


Projection = MergedProjection | Fp8Projection | PackedProjection


def to_fp8(weight: Tensor) -> Fp8Weight:
    """Quantize a weight [N, K], fp32."""
    return Fp8Weight(*quantize(weight), *quantize(weight.T.contiguous()))


def dequantized(x: Tensor | Quantized) -> Tensor:
    """Return rows [..., K] in the compute type."""
    if isinstance(x, Tensor):
        return x
    assert x.dequantized is not None, "engine: an adapter needs these rows, which exist in fp8 only"
    return x.dequantized


def _scaled_mm(x: Tensor | Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    q, scale = quantize(x) if isinstance(x, Tensor) else (x.q, x.scale)
    y = scaled_mm(q.flatten(0, -2), scale.flatten(0, -2), weight, weight_scale, bias, torch.bfloat16)
    return y.view(*q.shape[:-1], -1)
