"""Triton form of `low_rank_mixer`: launchers of triton_kernels.py and triton_kernels_backward.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._tile_sizes import tile
from .._triton import INTERPRET, cdiv, on_device_of
from .args import MixerArgs
from .triton_kernels import columns_fwd_kernel, rows_fwd_kernel
from .triton_kernels_backward import columns_bwd_kernel, rows_bwd_kernel

MAX_RANK = 32  # beyond it the backward kernels spill registers


def forward(b: Tensor, a: Tensor, args: MixerArgs) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return (out, u, b - a or empty, each mixer's low), as eager.forward."""
    (P, N, D), b, a = b.shape, b.contiguous(), a.contiguous()
    factors, gate, scale = [t.contiguous() for t in args.factors], args.gate, args.scale
    has_tokens, R, S = len(args.axes) > 1, len(factors[0]), len(factors[-4])
    out, u, difference = torch.empty_like(b), torch.empty_like(b), b.new_empty(0 if gate is None else b.shape)
    lows = [b.new_empty(P, N, R), b.new_empty(P, S, D)][: len(args.axes)]
    stats = b.new_empty(2, P * N if has_tokens else 0, dtype=torch.float32)
    base, at_scale = b if args.combine == "replace" else a, b if scale is None else scale
    sizes = _sizes("low_rank_mixer", b, R, S) | {"SCALED": scale is not None}
    row_sizes = {name: value for name, value in sizes.items() if name != "BLOCK_S"}
    with on_device_of(b):
        rows_fwd_kernel[(P * cdiv(N, sizes["BLOCK_N"]),)](
            b, a, u, difference, out, base, stats, b if gate is None else gate, at_scale, lows[0], *factors[:4],
            N, D, R, P * N, args.eps,
            GATED=gate is not None, TOKENS=has_tokens, **row_sizes, enable_fp_fusion=True,
        )  # fmt: skip
        if has_tokens:
            columns_fwd_kernel[(P * cdiv(D, sizes["BLOCK_D"]),)](
                u, out, base, stats, at_scale, lows[0], *factors[2:4], lows[1], *factors[4:],
                N, D, R, S, P * N,
                **sizes, enable_fp_fusion=True,
        )  # fmt: skip
    return out, u, difference, lows


def backward(
    grad: Tensor, u: Tensor, difference: Tensor, lows: Sequence[Tensor], args: MixerArgs, needs_da: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    """Return the gradients of a, gate, scale (None where there is none) and of the factors, as eager.backward."""
    (P, N, D), grad, u, difference = u.shape, grad.contiguous(), u.contiguous(), difference.contiguous()
    factors, lows = [t.contiguous() for t in args.factors], [t.contiguous() for t in lows]
    gate, scale, has_tokens, R, S = args.gate, args.scale, len(args.axes) > 1, len(factors[0]), len(factors[-4])
    c_low, (c_down, c_down_bias, c_up, c_bias) = lows[0], factors[:4]
    t_low, (t_down, _, t_up, t_bias) = lows[-1], factors[-4:]  # without tokens never read
    t_dlow, t_dlow_sum = _token_low_gradients(grad, t_low, t_up, scale) if has_tokens else (u, u)
    sizes = _sizes("low_rank_mixer_backward", u, R, S) | {"SCALED": scale is not None, "TOKENS": has_tokens}
    num_n, num_d = cdiv(N, sizes["BLOCK_N"]), cdiv(D, sizes["BLOCK_D"])
    splits = max(1, min(P, 2 * _processors(u.device) // num_d))
    channel_shares, token_shares = _shares(u, splits, R, D), _shares(u, P if has_tokens else 0, S, N)
    stats, sums = (u.new_empty(shape, dtype=torch.float32) for shape in ((6, P * N), (2, num_n * P)))
    c_dlow, da = torch.empty_like(c_low), u.new_empty(u.shape if needs_da else 0)
    at_scale = u if scale is None else scale
    with on_device_of(u):
        rows_bwd_kernel[(num_n * P,)](
            grad, u, difference, da, stats, sums, *token_shares, u if gate is None else gate, at_scale,
            c_low, c_dlow, c_down, c_down_bias, c_down.to(u.dtype).sum(1, dtype=torch.float32), c_up, c_bias,
            t_low, t_dlow, t_dlow_sum, t_down, t_up, t_bias, N, D, R, S, P * N, args.eps,
            FINAL=needs_da or gate is not None or scale is not None, WRITE=needs_da,
            GATED=gate is not None, REPLACE=args.combine == "replace", **sizes, enable_fp_fusion=True,
        )  # fmt: skip
        columns_bwd_kernel[(num_d * splits,)](
            grad, u, stats, *channel_shares, at_scale, c_low, c_dlow, c_up, c_bias, t_dlow, t_down,
            P, N, D, R, S, P * N, **sizes, enable_fp_fusion=True,
        )  # fmt: skip
    d_factors = _factor_gradients(channel_shares, c_dlow.sum((0, 1), dtype=torch.float32))
    d_factors += _factor_gradients(token_shares, t_dlow_sum.sum(0)) if has_tokens else []
    d_gate, d_scale = _scalar_gradients(sums, gate, scale)
    return da if needs_da else None, d_gate, d_scale, [d.to(f.dtype) for d, f in zip(d_factors, factors, strict=True)]


def _token_low_gradients(grad: Tensor, t_low: Tensor, t_up: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute d_low [P, S, D] of the tokens and its sums over D."""
    weights = (t_up if scale is None else scale * t_up).to(grad.dtype).T.expand(len(grad), -1, -1)
    t_dlow = torch.ops.aten.gelu_backward(torch.bmm(weights, grad), t_low)
    return t_dlow, t_dlow.sum(2, dtype=torch.float32)


def _shares(u: Tensor, count: int, rank: int, length: int) -> list[Tensor]:
    """Return empty shares of the gradients of W1, W2 and c2."""
    return [u.new_empty(count, *shape, dtype=torch.float32) for shape in ((rank, length), (length, rank), (length,))]


def _factor_gradients(shares: Sequence[Tensor], d_down_bias: Tensor) -> list[Tensor]:
    """Add up the shares, in their order: gradients of W1, c1, W2, c2."""
    d_down, d_up, d_bias = (share.sum(0) for share in shares)
    return [d_down, d_down_bias, d_up, d_bias]


def _scalar_gradients(sums: Tensor, gate: Tensor | None, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    d_scale, d_gate = sums.sum(1)
    if gate is not None:
        share = gate.sigmoid()
        d_gate = (share * (1 - share) * d_gate).to(gate.dtype)
    return None if gate is None else d_gate, None if scale is None else d_scale.to(scale.dtype)


def _sizes(op: str, x: Tensor, R: int, S: int) -> dict[str, Any]:
    """Return tile sizes, padded ranks of the two axes and UPCAST_DOT."""
    row = "low_rank_mixer_fp32" if x.element_size() == 4 else "low_rank_mixer_wide" if max(R, S) > 16 else op
    padded = {f"BLOCK_{n}": max(16, 1 << (k - 1).bit_length()) for n, k in (("R", R), ("S", S))}
    return {**tile(row, x.device), **padded, "UPCAST_DOT": INTERPRET}


@functools.lru_cache
def _processors(device: torch.device) -> int:
    """Return the number of a GPU's processors; in the interpreter few, so that a program takes more than one image."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
