"""One pre-norm ViT block with frozen weights: forward, hand-written backward, and the tensors saved between them.

The residual stream is passed as a sum x + delta, with delta the output of the last branch, so that the next norm's
kernel does the addition. h is normalized without scale and shift: those of frozen norms are folded into the weights
(fold.py), trained norms keep theirs.

    h1 = norm(x + delta)
    y  = h1 (Wqkv + s B A)^T + c     the adapter merged into the weight, rounded once per step
    z  = rope(qk_norm(y))            where the model has them
    o  = softmax(q k^T / sqrt(d)) v
    p  = o Wproj^T + c               middle = x + delta + p
    h2 = norm(middle)
    u  = h2 W1^T + c;  g = gelu(u) (or gated, mlp.py);  m = g W2^T + c
    returns (middle, m)

Backward, given the gradients of middle and m (frozen weights need none: one product instead of two):

    du = (dm W2) gelu'(u)            d_middle += norm'(du W1)
    dy = attention'(d_middle Wproj)  d_x = d_middle + norm'(dy (Wqkv + s B A))
    S = h1 A^T + A beta              d(s B) = dy^T S;  dS = dy s B;  dA = dS^T h1;  d(A beta) = sum dS

A norm before proj (EVA-02 CLIP, BEiT-3) is computed again in backward. Where only the first tokens of a block are read,
as the class token of the last one, o and all behind it are computed for those alone.

Saved for backward, in values per token of width D, by memory level:

    fast       h1, y, o, h2, u       1 + 3 + 1 + 1 + 4 D    u as one byte per entry in fused form: 16 D bytes in total
    balanced   all but y             y is computed again from h1: an eighth more matrix products
    lean       x + delta             1 D; everything is computed again

and the statistics of the norms and of the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.merge import MergedBlock
from upstep_fast.engine.mlp import activation, activation_backward, activation_forward, linear_activation
from upstep_fast.engine.norm_gelu import norm, norm_backward
from upstep_fast.engine.packing import Sizes, attend, attend_backward, attend_first, attend_first_backward, scale_branch
from upstep_fast.engine.plain_block import run_plain_block, select_tokens
from upstep_fast.engine.projections import Quantized, dequantized
from upstep_fast.engine.qk_norm import qk_norm, qk_norm_backward
from upstep_fast.engine.rotary import Ropes, apply_rope
from upstep_fast.kernels._transforms import refuse_second_derivative

Memory = Literal["fast", "balanced", "lean"]
RunFolded = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor]]  # x, delta, index of the block -> x, delta
_RECOMPUTED: dict[str, tuple[str, ...]] = {"fast": (), "balanced": ("y",)}


class BlockContext(NamedTuple):
    """A merged block and the layout of its tokens."""

    merged: MergedBlock
    drop_scale: tuple[Tensor | None, Tensor | None]  # factor of each branch by drop path; None: no drop path
    sizes: Sizes
    ropes: Ropes
    first: int | None = None  # tokens of each sequence that are returned, [B, first, D]; None: all


def run_blocks(
    x: Tensor,
    blocks: Sequence[FoldedBlock | nn.Module],
    run: RunFolded,
    sizes: Sizes = None,
    indices: Tensor | None = None,
    ropes: Ropes = None,
) -> Tensor:
    """Run all blocks on x [B, N, D] in the compute type; blocks that are not folded run by their own modules.

    run: runs a folded block. sizes: x holds several groups as rows [T, D] (packing.py). indices: [M] int64, return only
    these tokens, as rows [M, D]. ropes: the rotary table of each group (rotary.py).
    """
    delta: Tensor | None = None
    last = len(blocks) - 1
    for index, block in enumerate(blocks):
        if isinstance(block, FoldedBlock):
            x, delta = run(x, delta, index)
        else:
            with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
                x, delta, selected = x if delta is None else x + delta, None, indices if index == last else None
                x = run_plain_block(block, x, sizes, selected, ropes).to(x.dtype)
    x = x if delta is None else x + delta
    return x if indices is None or not isinstance(blocks[last], FoldedBlock) else select_tokens(x, indices)


def run_block(
    x: Tensor,
    delta: Tensor | None,
    merged: MergedBlock,
    memory: Memory = "fast",
    sizes: Sizes = None,
    ropes: Ropes = None,
    first: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a block on the stream x + delta, [B, N, D] in the compute type. Returns the new stream as such a sum.

    Differentiable in x, in delta, in the adapters and in trained norms. sizes, ropes: as for `run_blocks`. first:
    of a single group, return only the first tokens of each sequence, [B, first, D]; None: all.
    """
    context = BlockContext(merged, merged.block.drop_path_scales(x, sizes), sizes, ropes, first)
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in merged.trained)):
        return _Block.apply(x, delta, context, memory, *merged.trained)
    return _forward(x, delta, context, None)[:2]


class _Block(torch.autograd.Function):
    """Forward and backward of a block; trained tensors are arguments, so that autograd continues behind them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, context: BlockContext, memory: Memory, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        saved: dict[str, Tensor] = {}
        middle, m, stream = _forward(x, delta, context, saved)
        if memory == "lean":
            saved = {"stream": stream}
        for name in _RECOMPUTED.get(memory, ()):
            del saved[name]
        ctx.context, ctx.names, ctx.has_delta = context, list(saved), delta is not None
        # with the adapters' parameters among them, autograd raises if they (and the merged weights) change in between
        ctx.save_for_backward(*saved.values(), *context.merged.parameters)
        return middle, m

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("engine")
        d_middle, d_m = grads
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=False))
        if "stream" in saved:
            stream, saved = saved["stream"], {}
            _forward(stream, None, ctx.context, saved)
        dx, d_trained = _backward(d_middle, d_m, ctx.context, saved, ctx.needs_input_grad[0])
        return dx, dx if ctx.has_delta else None, None, None, *(d_trained if ctx.context.merged.trained else ())


def _forward(
    x: Tensor,
    delta: Tensor | None,
    context: BlockContext,
    saved: dict[str, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (middle, m, the stream x + delta); put the tensors for backward into `saved` if given."""
    merged, drop_scale, sizes, ropes, first = context
    block, (qkv, proj, fc1, fc2) = merged.block, merged.projections
    h1, stream, rstd1, rows = norm(x, delta, block.eps[0], block.fused, block.fp8, block.rms)
    y = qkv.product(_affine(rows, merged, 0))
    if saved is None:
        del h1, rows
    z = apply_rope(qk_norm(y, block.heads, block.head_norm), block.heads, block.rotary, ropes, sizes)
    if first is None:
        o, lse = attend(z, block.heads, sizes)
    else:
        o, lse = attend_first(z, block.heads, first), z.new_empty(0)
    p = scale_branch(proj.product(_inner_norm(o, block)[0]), drop_scale[0])
    h2, middle, rstd2, rows = norm(stream[:, :first].contiguous(), p, block.eps[1], block.fused, block.fp8, block.rms)
    rows = _affine(rows, merged, 1)
    g: Tensor | Quantized
    if saved is None:
        g = linear_activation(rows, fc1, block)
    else:
        g, of_activation = activation_forward(fc1.product(rows), block)
        saved |= {"h1": h1, "rstd1": rstd1, "y": y, "o": o, "lse": lse, "h2": h2, "rstd2": rstd2, **of_activation}
    return middle, scale_branch(fc2.product(g), drop_scale[1]), stream


def _backward(
    d_middle: Tensor,
    d_m: Tensor,
    context: BlockContext,
    saved: dict[str, Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of the stream (None unless `needs_dx`) and of `MergedBlock.trained`."""
    d_middle, rows, d_mlp, d_norm2 = _mlp_backward(d_middle, d_m, context, saved)
    dx, d_attention, d_norm1 = _attention_backward(d_middle, rows, context, saved, needs_dx)
    d_adapters = d_mlp | d_attention
    return dx, [*(d for name in context.merged.adapters for d in d_adapters[name]), *d_norm1, *d_norm2]


_AdapterGrads = dict[str, tuple[Tensor, ...]]  # of (A, A beta, s B) by projection


def _mlp_backward(
    d_middle: Tensor, d_m: Tensor, context: BlockContext, saved: dict[str, Tensor]
) -> tuple[Tensor, Tensor | Quantized, _AdapterGrads, tuple[Tensor, ...]]:
    """Return the gradient of middle, that gradient as input of a product, and those of the adapters and the norm."""
    merged, drop_scale = context.merged, context.drop_scale[1]
    block, (_, _, fc1, fc2), adapters = merged.block, merged.projections, merged.adapters
    h2 = saved["h2"]
    d_adapters: _AdapterGrads = {}
    d_m = scale_branch(d_m, drop_scale)
    if "fc2" in adapters:
        d_adapters["fc2"] = adapters["fc2"].gradients(d_m, activation(saved["u"], block))
    du = activation_backward(fc2.input_gradient(d_m), saved, block, block.fp8 and "fc1" not in adapters)
    if "fc1" in adapters:
        d_adapters["fc1"] = adapters["fc1"].gradients(dequantized(du), dequantized(_affine(h2, merged, 1)))
    d_h2, d_norm = _affine_backward(fc1.input_gradient(du), h2, merged, 1)
    del du  # the largest tensor of the block, before the norm makes new ones
    d_middle, rows = norm_backward(d_h2, h2, saved["rstd2"], d_middle, block.fused, block.fp8, block.rms)
    return d_middle, rows, d_adapters, d_norm


def _attention_backward(
    d_middle: Tensor,
    rows: Tensor | Quantized,
    context: BlockContext,
    saved: dict[str, Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, _AdapterGrads, tuple[Tensor, ...]]:
    """Return the gradients of the stream, of the adapters and of the norm; rows: d_middle as input of a product."""
    merged, drop_scale, sizes, ropes, first = context
    block, (qkv, proj, _, _), adapters = merged.block, merged.projections, merged.adapters
    h1, o, lse = saved["h1"], saved["o"], saved["lse"]
    d_adapters: _AdapterGrads = {}
    d_p = scale_branch(d_middle, drop_scale[0])
    o_hat, o_rstd = _inner_norm(o, block)
    if "proj" in adapters:
        d_adapters["proj"] = adapters["proj"].gradients(d_p, o_hat)
    h1_affine = dequantized(_affine(h1, merged, 0))
    y = saved["y"] if "y" in saved else qkv.product(h1_affine)
    z = qk_norm(y, block.heads, block.head_norm)
    if z is not saved.get("y"):  # without QK-norm RoPE was applied to y in place, and y was saved so
        z = apply_rope(z, block.heads, block.rotary, ropes, sizes)
    d_o = proj.input_gradient(rows if drop_scale[0] is None else d_p)
    if o_rstd is not None:
        d_o, _ = norm_backward(d_o, o_hat, o_rstd, None, block.fused, rms=block.rms)
    if first is None:
        dz = attend_backward(d_o, z, o, lse, block.heads, sizes)
    else:
        dz, d_middle = attend_first_backward(d_o, z, block.heads), F.pad(d_middle, (0, 0, 0, h1.shape[1] - first))
    dz = apply_rope(dz, block.heads, block.rotary, ropes, sizes, inverse=True)
    dy = qk_norm_backward(dz, y, block.heads, block.head_norm)
    if "qkv" in adapters:
        d_adapters["qkv"] = adapters["qkv"].gradients(dy, h1_affine)
    if not needs_dx and block.norms[0] is None:
        return None, d_adapters, ()
    d_h1, d_norm = _affine_backward(qkv.input_gradient(dy), h1, merged, 0)
    dx = norm_backward(d_h1, h1, saved["rstd1"], d_middle, block.fused, rms=block.rms)[0] if needs_dx else None
    return dx, d_adapters, d_norm


def _scale_and_shift(merged: MergedBlock, which: int) -> tuple[Tensor, Tensor] | None:
    """Return (gamma, beta) of norm `which` (0 or 1) if it is trained."""
    norm = merged.block.norms[which]
    return None if norm is None else (norm.weight.detach(), norm.bias.detach())


def _affine(x_hat: Tensor | Quantized, merged: MergedBlock, which: int) -> Tensor | Quantized:
    """Apply the scale and shift of norm `which` if it is trained."""
    pair = _scale_and_shift(merged, which)
    if pair is None:
        return x_hat
    rows = dequantized(x_hat)
    return torch.addcmul(pair[1].to(rows.dtype), rows, pair[0].to(rows.dtype))


def _affine_backward(d: Tensor, x_hat: Tensor, merged: MergedBlock, which: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the gradients of x_hat and of (gamma, beta); the latter is empty for a frozen norm."""
    pair = _scale_and_shift(merged, which)
    if pair is None:
        return d, ()
    rows = tuple(range(d.dim() - 1))
    d_pair = ((d * x_hat).sum(rows, dtype=torch.float32), d.sum(rows, dtype=torch.float32))
    return d * pair[0].to(d.dtype), d_pair


def _inner_norm(o: Tensor, block: FoldedBlock) -> tuple[Tensor, Tensor | None]:
    """Apply the norm before proj, if there is one. Returns (input of proj, rstd or None)."""
    if block.inner_eps[0] is None:
        return o, None
    o_hat, _, rstd, _ = norm(o, None, block.inner_eps[0], block.fused, rms=block.rms)
    return o_hat, rstd
