"""The Triton form of `lora_linear`: the two kernels of lora_linear_passes.py serve forward and backward.

Forward: one launch for each run of rows (adapted, or the gap between), S made in the K loop by a small dot.
Backward: a sweep of dY gives dS and dB, a sweep of x gives dA; dX = dY W + dS A is the first kernel, S given.
Ranks are padded to BLOCK_R; wide ones go in slices, and then S is made by a sweep of its own.
Deterministic: Q is summed from one partial per program, in their order; no atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._tiles import tile
from .._triton import INTERPRET, triton
from .eager import drop_threshold
from .kernels import lora_linear_kernel, lora_linear_sweep

MAX_RANK = 32  # of one slice: at 64 the registers spill beside the accumulators (sm_80)


def forward(x, weight, bias, a, b, scale, dropout, seed, rows, keep):
    """(y, S or an empty tensor), as the strategies of lora_linear.py."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    if b.shape[1] <= MAX_RANK:
        s = x.new_empty(x.shape[0] if keep else 0, a.shape[0])
        _launch_runs(x, weight, y, bias, b, s, rows, a=a, scale=scale, dropout=dropout, seed=seed)
    else:
        s = project(x, a, dropout, seed)
        _launch_runs(x, weight, y, bias, scale * b, s, rows)
    return y, s if keep else x.new_empty(0, a.shape[0])


def forward_scaled(x, weight, scales, bias, b, s, dtype, rows):
    """Y = (x weight^T) times the row scales of both + bias + S b^T, in dtype; x and weight in fp8."""
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    _launch_runs(x, weight, y, bias, b, s, rows, scales=scales)
    return y


def project(x, a, dropout, seed):
    """S = drop(x) a^T."""
    s = x.new_empty(x.shape[0], a.shape[0])
    for r in range(0, a.shape[0], MAX_RANK):
        here = slice(r, min(r + MAX_RANK, a.shape[0]))
        _sweep(x, a[here].T, None, s[:, here], 1 / (1 - dropout), dropout, seed)
    return s


def adapter(grad, x, a, b, s, scale, dropout, seed, rows, needs):
    """(dS, dA, dB), None where `needs` (x, a, b) has no use for it."""
    need_x, need_a, need_b = needs
    rank = b.shape[1]
    ds = grad.new_empty(grad.shape[0], a.shape[0]) if need_x or need_a else None
    db = b.new_empty(b.shape, dtype=torch.float32) if need_b else None
    taken = 0
    for t, (start, stop) in enumerate(_spans(rows) or [(0, grad.shape[1])]):
        block = slice(taken, taken + stop - start)
        for r in range(0, rank, MAX_RANK):
            here = slice(r, min(r + MAX_RANK, rank))
            ranks = slice(t * rank + here.start, t * rank + here.stop)
            share = _sweep(
                grad[:, start:stop],
                b[block, here] if ds is not None else None, s[:, ranks] if need_b else None,
                ds[:, ranks] if ds is not None else None, scale,
            )  # fmt: skip
            if db is not None:
                db[block, here] = share * scale
        taken = block.stop
    if not need_a:
        return ds, None, db
    da = a.new_empty(a.shape, dtype=torch.float32)
    for r in range(0, a.shape[0], MAX_RANK):
        here = slice(r, min(r + MAX_RANK, a.shape[0]))
        share = _sweep(x, None, ds[:, here], None, 1.0, dropout, seed)
        da[here] = share.T * (1 / (1 - dropout))
    return ds, da, db


def input_gradient(grad, weight, ds, a, b, scale, dropout, seed, rows):
    """DX = dY W + drop'(dS A)."""
    dx = grad.new_empty(grad.shape[0], weight.shape[1])
    _launch(grad, weight.T, dx, b=a.T, s=ds, dropout=dropout, seed=seed)
    return dx


def _launch_runs(x, weight, y, bias, b, s, rows, a=None, scales=None, **options):
    """One launch for each adapted run of rows of weight and each gap between them."""
    N, rank = weight.shape[0], b.shape[1]

    def launch(start: int, stop: int, **lora: Any) -> None:
        if start < stop:
            x_scale, w_scale = scales or (None, None)
            _launch(
                x, weight[start:stop], y[:, start:stop],
                bias=None if bias is None else bias[start:stop],
                scales=None if scales is None else (x_scale, w_scale[start:stop]),
                **lora,
            )  # fmt: skip

    taken, done = 0, 0
    for t, (start, stop) in enumerate(_spans(rows) or [(0, N)]):
        ranks, block = slice(t * rank, t * rank + rank), b[taken : taken + stop - start]
        launch(done, start)
        launch(start, stop, a=None if a is None else a[ranks], b=block, s=s[:, ranks], **options)
        taken, done = taken + stop - start, stop
    launch(done, N)


def _launch(x, w, y, *, bias=None, a=None, b=None, s=None, scale=1.0, dropout=0.0, seed=None, scales=None, tma=None):
    """Y [M, N] <- x w^T + bias + the low-rank part; x: [M, K], w: [N, K].

    With `a` that part is scale * drop(x) a^T b^T, and s, if it has rows, receives drop(x) a^T.
    Without, it is drop'(s b^T). scales: of the rows of x and of w, by which their product is multiplied.
    """
    (M, K), N = x.shape, w.shape[0]
    R = 1 if b is None else b.shape[1]
    kind = {1: "_fp8", 4: "_fp32"}.get(x.element_size(), "_masked" if dropout and a is None else "")
    tiles = dict(tile(f"lora_linear{kind}", x.device))
    lora = "none" if b is None else "make" if a is not None else "given"
    transposed = w.stride(1) != 1 and w.stride(0) == 1
    stored_w = w.T if transposed else w
    x_block = [tiles["BLOCK_M"], tiles["BLOCK_K"]]
    w_block = [tiles["BLOCK_K"], tiles["BLOCK_N"]] if transposed else [tiles["BLOCK_N"], tiles["BLOCK_K"]]
    if tma is None:
        tma = _has_tma(x.device) and _fits_tma(x) and _fits_tma(stored_w)
    blocks = triton.cdiv(M, tiles["BLOCK_M"]) * triton.cdiv(N, tiles["BLOCK_N"])
    a_, b_, s_ = (x if t is None else t for t in (a, b, s))
    x_scale, w_scale = scales or (x, x)
    with torch.cuda.device_of(x):
        lora_linear_kernel[(min(blocks, _num_programs(x.device)),)](
            _descriptor(x, x_block) if tma else x,
            _descriptor(stored_w, w_block) if tma else w,
            x if bias is None else bias, a_, b_, s_, y, x if seed is None else seed, x_scale, w_scale,
            scale, *_drop_numbers(dropout),
            M, N, K, R,
            *x.stride(), *w.stride(), *a_.stride(), *b_.stride(), *s_.stride(), y.stride(0),
            LORA=lora, STORE_S=s is not None and s.shape[0] > 0, HAS_BIAS=bias is not None,
            DROPOUT=dropout > 0, SCALED=scales is not None, TMA=tma, W_TRANSPOSED=transposed, UPCAST_DOT=INTERPRET,
            BLOCK_R=_block_r(R), **tiles,
        )  # fmt: skip


def _sweep(g, b, s, p, scale, dropout=0.0, seed=None):
    """Fill p = scale * g b if b is given; returns g^T s [N, R] in fp32 if s is given."""
    M, N = g.shape
    R = (b if b is not None else s).shape[1]
    tiles = dict(tile("lora_linear_sweep" if g.element_size() == 2 else "lora_linear_sweep_fp32", g.device))
    programs = min(triton.cdiv(M, tiles["BLOCK_M"]), _num_programs(g.device))
    q = g.new_empty(programs if s is not None else 0, N, R, dtype=torch.float32)
    b_, s_, p_ = (g if t is None else t for t in (b, s, p))
    threshold, _ = _drop_numbers(dropout)
    with torch.cuda.device_of(g):
        lora_linear_sweep[(programs,)](
            g, b_, s_, p_, q, g if seed is None else seed,
            scale, threshold,
            M, N, R,
            *g.stride(), *b_.stride(), *s_.stride(), *p_.stride(),
            PROJECT=b is not None, OUTER=s is not None, DROPOUT=dropout > 0, UPCAST_DOT=INTERPRET,
            BLOCK_R=_block_r(R), **tiles,
        )  # fmt: skip
    return q.sum(0) if s is not None else None


def _spans(rows: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def _block_r(R: int) -> int:
    # tl.dot wants at least 16
    return min(max(16, 1 << (R - 1).bit_length()), MAX_RANK)


def _drop_numbers(dropout: float) -> tuple[int, float]:
    return drop_threshold(dropout), 1 / (1 - dropout)


@functools.lru_cache
def _num_programs(device: torch.device) -> int:
    # in the interpreter: few, so that a program meets more than one block
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.lru_cache
def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _fits_tma(matrix: Tensor) -> bool:
    # rows apart from one another: an expanded row, or windows that overlap, have no descriptor
    (row, column), size = matrix.stride(), matrix.element_size()
    return column == 1 and row >= matrix.shape[1] and row * size % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: Tensor, block: list[int]):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block)
