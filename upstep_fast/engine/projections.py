"""A frozen projection with its adapter, in the compute type or in row-wise fp8.

    compute type   y = x W^T + c, the adapter merged into W              dx = dy W
    fp8            y = Q(x) Q(W)^T + c + (x A^T + A beta) (s B)^T        dx = Q(dy) Q(W^T)^T + (dy s B) A
                   the adapter stays separate, in bf16: merged into fp8 it would be rounded away

Q: e4m3 with one scale per row (kernels/quantize.py). Hopper's row-wise product needs separate copies of W and W^T, each
with its own scales, so fp8 weights take as many bytes as bf16 ones: fp8 saves time, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.engine.low_rank import LowRank
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

    def tensors(self) -> list[Tensor]:
        """Return what `product` reads."""
        return [self.weight, self.bias]

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
    adapter: LowRank | None

    def tensors(self) -> list[Tensor]:
        """Return what `product` reads."""
        of_adapter = [] if self.adapter is None else [self.adapter.a, self.adapter.shift, self.adapter.b]
        return [self.weight.q, self.weight.scale, self.bias, *of_adapter]

    def product(self, x: Tensor | Quantized) -> Tensor:
        """Multiply by the weight: x [..., K] -> [..., N]."""
        y = _scaled_mm(x, self.weight.q, self.weight.scale, self.bias)
        if self.adapter is not None:
            self.adapter.add_output(y, dequantized(x).flatten(0, -2))
        return y.view(*_shape(x)[:-1], -1)

    def input_gradient(self, dy: Tensor | Quantized) -> Tensor:
        """Multiply by the transpose: dy [..., N] -> [..., K]."""
        dx = _scaled_mm(dy, self.weight.q_t, self.weight.scale_t, None)
        if self.adapter is not None:
            self.adapter.add_input_gradient(dx, dequantized(dy).flatten(0, -2))
        return dx.view(*_shape(dy)[:-1], -1)


@dataclass(frozen=True)
class PackedProjection:
    """A frozen weight in oneDNN's layout, for forward products alone."""

    weight: Tensor  # [N, K], opaque
    bias: Tensor  # [N]

    def tensors(self) -> list[Tensor]:
        """Return what `product` reads."""
        return [self.weight, self.bias]

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


def _shape(x: Tensor | Quantized) -> torch.Size:
    return x.shape if isinstance(x, Tensor) else x.q.shape


def _scaled_mm(x: Tensor | Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the fp8 product of rows [..., K]: [M, N] in bf16."""
    q, scale = quantize(x) if isinstance(x, Tensor) else (x.q, x.scale)
    return scaled_mm(q.flatten(0, -2), scale.flatten(0, -2), weight, weight_scale, bias, torch.bfloat16)
