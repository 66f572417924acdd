"""What an MLP does between its two products: fc1 gives u, fc2 takes m.

plain    m = gelu(u)                                  kept: u, or gelu'(u) as a byte an entry (pieces.py)
gated    m = silu(u_1) u_2                            u = [u_1, u_2], the gate first (SwiGLU, Shazeer 2020); kept: u
         du_1 = dm u_2 silu'(u_1), du_2 = dm silu(u_1)
with a norm before fc2 (EVA-02, BEiT-3), m is normalised; its scale and shift are folded into fc2
         m = norm(a)                                  dm -> da by the norm's backward, a and m computed again from u
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.norm_gelu import gelu, gelu_backward, gelu_forward, linear_gelu, norm, norm_backward
from upstep_fast.engine.projections import Projection, Quantized


def hidden(u: Tensor, block: FoldedBlock) -> Tensor:
    """M from u: [..., H], or [..., 2 H] where it is gated -> [..., H]."""
    a = swiglu(u) if block.activation == "swiglu" else gelu(u, block.activation)
    return a if block.inner_eps[1] is None else norm(a, None, block.inner_eps[1], block.fused, rms=block.rms)[0]


def linear_hidden(rows: Tensor | Quantized, fc1: Projection, block: FoldedBlock) -> Tensor:
    """M from what fc1 takes, where nothing is kept."""
    if block.activation != "swiglu" and block.inner_eps[1] is None:
        return linear_gelu(rows, fc1, block.activation)
    return hidden(fc1.product(rows), block)


def hidden_forward(u: Tensor, block: FoldedBlock) -> tuple[Tensor | Quantized, Tensor]:
    """(m, what `hidden_backward` takes)."""
    if block.activation != "swiglu" and block.inner_eps[1] is None:
        return gelu_forward(u, block.activation, block.keeps_byte, block.fp8)
    return hidden(u, block), u


def hidden_backward(dm: Tensor, kept: Tensor, block: FoldedBlock, fp8: bool = False) -> Tensor | Quantized:
    """du, from what `hidden_forward` kept. fp8: as an fp8 product alone wants it, where GELU's kernel gives that."""
    eps = block.inner_eps[1]
    if eps is not None:
        a = swiglu(kept) if block.activation == "swiglu" else gelu(kept, block.activation)
        m, _, rstd, _ = norm(a, None, eps, block.fused, rms=block.rms)
        dm, _ = norm_backward(dm, m, rstd, None, block.fused, rms=block.rms)
    if block.activation == "swiglu":
        return swiglu_backward(dm, kept)
    return gelu_backward(dm, kept, block.activation, fp8)


def swiglu(u: Tensor) -> Tensor:
    """silu(u_1) u_2: [..., 2 H] -> [..., H]."""
    gate, value = u.chunk(2, -1)
    return F.silu(gate) * value


def swiglu_backward(da: Tensor, u: Tensor) -> Tensor:
    """Du [..., 2 H] from da [..., H] and u."""
    gate, value = u.chunk(2, -1)
    du = torch.empty_like(u)
    d_gate, d_value = du.chunk(2, -1)
    d_gate.copy_(torch.ops.aten.silu_backward(da * value, gate))
    torch.mul(da, F.silu(gate), out=d_value)
    return du
