"""One pre-norm ViT block with frozen weights: forward, hand-written backward, and what is kept between them.

The residual stream travels as a sum x + delta, delta being the last branch, so that the addition is part of the next
norm. With h the bare normalisation (scale and shift are folded into the weights, fold.py; a trained norm has its own):

    h1 = norm(x + delta)
    y  = h1 (Wqkv + s B A)^T + c     the adapter merged into the weight: rounded once a step
    z  = y, or with q and k normalised (heads.py) and turned (rotary.py)
    o  = softmax(q k^T / sqrt(d)) v
    p  = o Wproj^T + c               middle = x + delta + p
    h2 = norm(middle)
    u  = h2 W1^T + c;  g = gelu(u) (or gated, hidden.py);  m = g W2^T + c
    returns (middle, m)

Backward, with the gradient of the new stream given (frozen weights need no gradient: one product each, not two):

    du = (dm W2) gelu'(u)            d_middle = d_stream + norm'(du W1)
    dy = attention'(d_middle Wproj)  d_before = d_middle + norm'(dy (Wqkv + s B A))
    S = h1 A^T + A beta              d(s B) = dy^T S;  dS = dy s B;  dA = dS^T h1;  d(A beta) = sum dS

A norm before proj (EVA-02 CLIP, BEiT-3) stands between o and its product, computed again in backward.

Kept for backward, in values a token of width D, at level

    fast       h1, y, o, h2, u       1 + 3 + 1 + 1 + 4 D    u as one byte an entry in fused form: 16 D bytes in all
    balanced   all but y             computed again from h1: an eighth of the products more
    lean       x + delta             1 D, and everything is computed again

and the norms' and the softmax's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.engine.fold import FoldedBlock, FoldedLinear
from upstep_fast.engine.merge import MergedBlock, factors_of
from upstep_fast.engine.mlp import hidden, hidden_backward, hidden_forward, linear_hidden
from upstep_fast.engine.norm_gelu import norm, norm_backward
from upstep_fast.engine.packing import Sizes, attend, attend_backward
from upstep_fast.engine.plain_block import run_plain, take
from upstep_fast.engine.projections import Quantized, dequantized
from upstep_fast.engine.qk_norm import qk_norm, qk_norm_backward
from upstep_fast.engine.rotary import Ropes, apply_rope

Memory = Literal["fast", "balanced", "lean"]
Run = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor]]
_FORGOTTEN: dict[str, tuple[str, ...]] = {"fast": (), "balanced": ("y",)}


def run_blocks(
    x: Tensor,
    blocks: Sequence[FoldedBlock | nn.Module],
    run: Run,
    sizes: Sizes = None,
    wanted: Tensor | None = None,
    ropes: Ropes = None,
) -> Tensor:
    """x: [B, N, D] in the compute type -> the same, after all blocks; those that are not folded run as they are.

    run: (x, delta, index) -> (x, delta) for a folded block. sizes: x holds several groups as rows [T, D] (packed.py).
    wanted: [M], the only tokens to give back, as rows [M, D]. ropes: the rotary table of each group (rotary.py).
    """
    delta: Tensor | None = None
    last = len(blocks) - 1
    for index, block in enumerate(blocks):
        if isinstance(block, FoldedBlock):
            x, delta = run(x, delta, index)
        else:
            with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
                x, delta, taken = x if delta is None else x + delta, None, wanted if index == last else None
                x = run_plain(block, x, sizes, taken, ropes).to(x.dtype)
    x = x if delta is None else x + delta
    return x if wanted is None or not isinstance(blocks[last], FoldedBlock) else take(x, wanted)


def run_block(
    x: Tensor,
    delta: Tensor | None,
    ready: MergedBlock,
    memory: Memory = "fast",
    sizes: Sizes = None,
    ropes: Ropes = None,
) -> tuple[Tensor, Tensor]:
    """The stream x + delta, [B, N, D] in the compute type, after the block, as a sum again.

    Differentiable in x, in delta, in the adapters and in the norms that are trained. sizes, ropes: as for `run_blocks`.
    """
    keep = ready.block.draw_paths(x, sizes)
    if torch.is_grad_enabled():
        trained = ready.block.trained()
        if any(t.requires_grad for t in (x, *trained)):
            return _Block.apply(x, delta, ready, memory, keep, sizes, ropes, *trained)
    return _forward(x, delta, ready, ready.trained, keep, sizes, ropes, None)[:2]


class _Block(torch.autograd.Function):
    """The hand-written pair; what is trained comes as tensors so that autograd carries on behind them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        ready: MergedBlock,
        memory: Memory,
        keep: Any,
        sizes: Sizes,
        ropes: Ropes,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        kept: dict[str, Tensor] = {}
        middle, m, before = _forward(x, delta, ready, trained, keep, sizes, ropes, kept)
        if memory == "lean":
            kept = {"before": before}
        for name in _FORGOTTEN.get(memory, ()):
            del kept[name]
        ctx.ready, ctx.names, ctx.has_delta = ready, list(kept), delta is not None
        ctx.keep, ctx.sizes, ctx.ropes = keep, sizes, ropes
        # the adapters are among them: autograd raises if they, and with them the merged weights, change before backward
        ctx.save_for_backward(*kept.values(), *trained, *ready.block.sources())
        return middle, m

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_middle, d_m = grads
        values = ctx.saved_tensors
        kept = dict(zip(ctx.names, values, strict=False))
        trained = values[len(kept) : len(values) - len(ctx.ready.block.sources())]
        if "before" in kept:
            before, kept = kept["before"], {}
            _forward(before, None, ctx.ready, trained, ctx.keep, ctx.sizes, ctx.ropes, kept)
        needs_dx = ctx.needs_input_grad[0]
        dx, d_trained = _backward(d_middle, d_m, ctx.ready, trained, ctx.keep, ctx.sizes, ctx.ropes, kept, needs_dx)
        return dx, dx if ctx.has_delta else None, None, None, None, None, None, *d_trained


def _forward(
    x: Tensor,
    delta: Tensor | None,
    ready: MergedBlock,
    trained: Sequence[Tensor],
    keep: tuple[Tensor | None, Tensor | None],
    sizes: Sizes,
    ropes: Ropes,
    kept: dict[str, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(middle, m, the stream before the block); fills `kept` if it is given."""
    block, (qkv, proj, fc1, fc2) = ready.block, ready.merged
    h1, before, rstd1, rows = norm(x, delta, block.eps[0], block.fused, block.fp8, block.rms)
    y = qkv.product(_affine(rows, block, 0, trained))
    if kept is None:
        del h1, rows
    z = apply_rope(qk_norm(y, block.heads, block.head_norm), block.heads, block.rotary, ropes, sizes)
    o, lse = attend(z, block.heads, sizes)
    p = _scaled(proj.product(_normed(o, block)[0]), keep[0])
    h2, middle, rstd2, rows = norm(before, p, block.eps[1], block.fused, block.fp8, block.rms)
    rows = _affine(rows, block, 1, trained)
    g: Tensor | Quantized
    if kept is None:
        g = linear_hidden(rows, fc1, block)
    else:
        g, of_u = hidden_forward(fc1.product(rows), block)
        kept |= {"h1": h1, "rstd1": rstd1, "y": y, "o": o, "lse": lse, "h2": h2, "rstd2": rstd2, "u": of_u}
    return middle, _scaled(fc2.product(g), keep[1]), before


def _backward(
    d_middle: Tensor,
    d_m: Tensor,
    ready: MergedBlock,
    trained: Sequence[Tensor],
    keep: tuple[Tensor | None, Tensor | None],
    sizes: Sizes,
    ropes: Ropes,
    kept: dict[str, Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    block, (qkv, proj, fc1, fc2) = ready.block, ready.merged
    h1, rstd1, o, lse, h2, rstd2, u = (kept[name] for name in ("h1", "rstd1", "o", "lse", "h2", "rstd2", "u"))
    factors = factors_of(block, trained)
    d_of: dict[str, tuple[Tensor, ...]] = {}

    d_m = _scaled(d_m, keep[1])
    if "fc2" in factors:
        d_of["fc2"] = adapter_gradients(d_m, hidden(u, block), block.fc2, factors["fc2"])
    du = hidden_backward(fc2.input_gradient(d_m), u, block, block.fp8 and "fc1" not in factors)
    if "fc1" in factors:
        h2_affine = dequantized(_affine(h2, block, 1, trained))
        d_of["fc1"] = adapter_gradients(dequantized(du), h2_affine, block.fc1, factors["fc1"])
    d_h2, d_norm2 = _affine_backward(fc1.input_gradient(du), h2, block, 1, trained)
    del du
    d_middle, rows = norm_backward(d_h2, h2, rstd2, d_middle, block.fused, block.fp8, block.rms)
    d_p = _scaled(d_middle, keep[0])
    o_hat, o_rstd = _normed(o, block)
    if "proj" in factors:
        d_of["proj"] = adapter_gradients(d_p, o_hat, block.proj, factors["proj"])
    h1_affine = dequantized(_affine(h1, block, 0, trained))
    y = kept["y"] if "y" in kept else qkv.product(h1_affine)
    z = qk_norm(y, block.heads, block.head_norm)
    if z is not kept.get("y"):  # where q and k are not normalised, y was turned in its own place, and kept so
        z = apply_rope(z, block.heads, block.rotary, ropes, sizes)
    d_o = proj.input_gradient(rows if keep[0] is None else d_p)
    if o_rstd is not None:
        d_o, _ = norm_backward(d_o, o_hat, o_rstd, None, block.fused, rms=block.rms)
    dz = attend_backward(d_o, z, o, lse, block.heads, sizes)
    dz = apply_rope(dz, block.heads, block.rotary, ropes, sizes, back=True)
    dy = qk_norm_backward(dz, y, block.heads, block.head_norm)
    if "qkv" in factors:
        d_of["qkv"] = adapter_gradients(dy, h1_affine, block.qkv, factors["qkv"])
    dx: Tensor | None = None
    d_norm1: tuple[Tensor, ...] = ()
    if needs_dx or block.norms[0] is not None:
        d_h1, d_norm1 = _affine_backward(qkv.input_gradient(dy), h1, block, 0, trained)
        dx = norm_backward(d_h1, h1, rstd1, d_middle, block.fused, rms=block.rms)[0] if needs_dx else None
    return dx, [*(d for name in factors for d in d_of[name]), *d_norm1, *d_norm2]


def adapter_gradients(
    dy: Tensor, h: Tensor, linear: FoldedLinear, factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (A [T, r, K], A beta [T, r], s B [T, n, r]) in fp32, from dy [..., N] and the input h [..., K]."""
    a, shift, b = (f.detach() for f in factors)
    dy, h = dy.flatten(0, -2), h.flatten(0, -2)
    low = F.linear(h, a.flatten(0, 1).to(h.dtype), shift.flatten().to(h.dtype))  # [M, T r]
    rows, r = b.shape[1:]
    d_low, d_b = torch.empty_like(low), torch.empty_like(b)
    for t, part in enumerate(linear.parts):
        dy_part, own = dy[:, part * rows : (part + 1) * rows], slice(t * r, (t + 1) * r)
        d_b[t] = dy_part.T @ low[:, own]
        d_low[:, own] = dy_part @ b[t].to(dy.dtype)
    return (d_low.T @ h).float().view_as(a), d_low.float().sum(0).view_as(shift), d_b


def _scale_and_shift(block: FoldedBlock, which: int, trained: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """(gamma, beta) of a norm that is trained; they stand last in `trained`, two each."""
    if block.norms[which] is None:
        return None
    after = 2 if which == 0 and block.norms[1] is not None else 0
    return trained[len(trained) - after - 2 : len(trained) - after]


def _affine(x_hat: Tensor | Quantized, block: FoldedBlock, which: int, trained: Sequence[Tensor]) -> Tensor | Quantized:
    pair = _scale_and_shift(block, which, trained)
    if pair is None:
        return x_hat
    rows = dequantized(x_hat)
    return torch.addcmul(pair[1].to(rows.dtype), rows, pair[0].to(rows.dtype))


def _affine_backward(
    d: Tensor, x_hat: Tensor, block: FoldedBlock, which: int, trained: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradient of x_hat, and of (gamma, beta) if they are trained."""
    pair = _scale_and_shift(block, which, trained)
    if pair is None:
        return d, ()
    rows = tuple(range(d.dim() - 1))
    of_pair = ((d * x_hat).sum(rows, dtype=torch.float32), d.sum(rows, dtype=torch.float32))
    return d * pair[0].to(d.dtype), of_pair


def _normed(o: Tensor, block: FoldedBlock) -> tuple[Tensor, Tensor | None]:
    """(what proj takes, rstd) where a norm stands before it; else (o, None)."""
    if block.inner_eps[0] is None:
        return o, None
    o_hat, _, rstd, _ = norm(o, None, block.inner_eps[0], block.fused, rms=block.rms)
    return o_hat, rstd


def _scaled(branch: Tensor, keep: Tensor | None) -> Tensor:
    return branch if keep is None else branch * keep
