"""The MLP between fc1 (output u) and fc2 (input m): GELU or SwiGLU and an optional norm, forward and backward.

plain    m = gelu(u)                                  saved: u, or gelu'(u), or that as a byte (norm_gelu.py)
gated    m = silu(u_1) u_2                            u = [u_1, u_2], the gate first (SwiGLU, Shazeer 2020); saved: u
         du_1 = dm u_2 silu'(u_1), du_2 = dm silu(u_1)
with a norm before fc2 (EVA-02, BEiT-3), whose scale and shift are folded into fc2
         m = norm(a), a = gelu(u) or gated            dm -> da by the norm's backward; a and m are computed again from u
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.norm_gelu import (
    gelu,
    gelu_backward,
    gelu_forward,
    gelu_pass,
    linear_gelu,
    norm,
    norm_backward,
)
from upstep_fast.engine.projections import PackedProjection, Projection, Quantized


def activation(u: Tensor, block: FoldedBlock) -> Tensor:
    """Compute m from u: [..., H], or [..., 2 H] for SwiGLU -> [..., H]."""
    a = swiglu(u) if block.activation == "swiglu" else gelu(u, block.activation)
    return a if block.inner_eps[1] is None else norm(a, None, block.inner_eps[1], block.fused, rms=block.rms)[0]


def linear_activation(rows: Tensor | Quantized, fc1: Projection, block: FoldedBlock) -> Tensor:
    """Compute m from the input of fc1 [..., K], saving nothing."""
    if block.activation == "swiglu" or block.inner_eps[1] is not None:
        return activation(fc1.product(rows), block)
    # the same GELU as with gradients: training compares the features of both
    is_trained_form = isinstance(rows, Tensor) and rows.device.type == "cpu" and not isinstance(fc1, PackedProjection)
    if not is_trained_form or not block.saves_derivative or block.fused:
        return linear_gelu(rows, fc1, block.activation, block.fused)
    u = fc1.product(rows)
    g = gelu_pass(u, block.activation, derivative=False)
    return gelu(u, block.activation) if g is None else g


def activation_forward(u: Tensor, block: FoldedBlock) -> tuple[Tensor | Quantized, dict[str, Tensor]]:
    """Return (m, what to save for `activation_backward`): u, or GELU's derivative. May overwrite u."""
    if block.saves_derivative:
        if not block.fused and (g := gelu_pass(u, block.activation, derivative=True)) is not None:
            return g, {"derivative": u}
        m, saved = gelu_forward(u, block.activation, block.fused, block.fp8)
        return m, {"u": saved}
    return activation(u, block), {"u": u}


def activation_backward(
    dm: Tensor, saved: Mapping[str, Tensor], block: FoldedBlock, fp8: bool = False
) -> Tensor | Quantized:
    """Return du from dm [..., H], which may be overwritten, and what `activation_forward` saved.

    fp8: for an fp8 product only, where GELU's kernel can do it.
    """
    if "derivative" in saved:
        return dm.mul_(saved["derivative"])
    u, eps = saved["u"], block.inner_eps[1]
    if eps is not None:
        a = swiglu(u) if block.activation == "swiglu" else gelu(u, block.activation)
        m, _, rstd, _ = norm(a, None, eps, block.fused, rms=block.rms)
        dm, _ = norm_backward(dm, m, rstd, None, block.fused, rms=block.rms)
    if block.activation == "swiglu":
        return swiglu_backward(dm, u)
    return gelu_backward(dm, u, block.activation, fp8)


def swiglu(u: Tensor) -> Tensor:
    """Compute silu(u_1) u_2: [..., 2 H] -> [..., H]."""
    gate, value = u.chunk(2, -1)
    return F.silu(gate) * value


def swiglu_backward(da: Tensor, u: Tensor) -> Tensor:
    """Return du [..., 2 H] from da [..., H] and u [..., 2 H]."""
    gate, value = u.chunk(2, -1)
    du = torch.empty_like(u)
    d_gate, d_value = du.chunk(2, -1)
    d_gate.copy_(torch.ops.aten.silu_backward(da * value, gate))
    torch.mul(da, F.silu(gate), out=d_value)
    return du
