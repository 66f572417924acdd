"""Triton form of `lora_linear`: the two kernels of triton_kernels.py serve forward and backward.

Forward: one launch for each run of rows (adapted, or the gap between), S made in the K loop by a small dot.
Backward: a sweep of dY gives dS and dB, a sweep of x gives dA; dX = dY W + dS A is the first kernel, S given.
Ranks are padded to BLOCK_R; wide ones go in slices, and then S is made by a sweep of its own.
Deterministic: a sweep's results are sums of shares, in their order; no atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._tile_sizes import tile
from .._triton import INTERPRET, cdiv, on_device_of, pointers
from .args import LoraArgs
from .eager import drop_threshold
from .triton_kernels import lora_linear_kernel, lora_linear_sweep

MAX_RANK = 32  # of one slice: at 64 the registers spill beside the accumulators (sm_80)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraArgs, save_s: bool) -> tuple[Tensor, Tensor]:
    """Return (y, S or an empty tensor), as eager.forward_split."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    if lora.b.shape[1] <= MAX_RANK:
        s = x.new_empty(x.shape[0] if save_s else 0, lora.a.shape[0])
        _launch_runs(x, weight, y, bias, lora, s, make_s=True)
    else:
        s = project(x, lora)
        _launch_runs(x, weight, y, bias, replace(lora, b=lora.scale * lora.b), s, make_s=False)
    return y, s if save_s else x.new_empty(0, lora.a.shape[0])


def forward_scaled(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    lora: LoraArgs,
    s: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Compute (x weight^T) times the row scales of both + bias + scale S B^T, in `dtype`; x and weight in fp8."""
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    _launch_runs(x, weight, y, bias, replace(lora, b=lora.scale * lora.b), s, make_s=False, scales=scales)
    return y


def project(x: Tensor, lora: LoraArgs) -> Tensor:
    """Compute S = drop(x) A^T, [M, R]."""
    a, dropout = lora.a, lora.dropout
    s = x.new_empty(x.shape[0], a.shape[0])
    for ranks in _slices(a.shape[0]):
        _sweep(x, a[ranks].T, None, s[:, ranks], 1 / (1 - dropout), dropout, lora.seed)
    return s


def adapter(
    grad: Tensor, x: Tensor | None, s: Tensor, lora: LoraArgs, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dS, dA, dB), None where `needs` (x, a, b) has no use for it."""
    need_x, need_a, need_b = needs
    a, b = lora.a, lora.b
    ds = grad.new_empty(grad.shape[0], a.shape[0]) if need_x or need_a else None
    db = b.new_empty(b.shape, dtype=torch.float32) if need_b else None
    first = 0
    for span, ranks, block in lora.adapters(grad.shape[1]):
        for part in _slices(b.shape[1]):
            here = slice(ranks.start + part.start, ranks.start + part.stop)
            outer = _sweep(
                grad[:, span],
                block[:, part] if ds is not None else None, s[:, here] if need_b else None,
                ds[:, here] if ds is not None else None, lora.scale,
            )  # fmt: skip
            if db is not None and outer is not None:
                db[first : first + len(block), part] = outer * lora.scale
        first += len(block)
    return ds, _gradient_of_a(x, ds, lora) if need_a and ds is not None else None, db


def _gradient_of_a(x: Tensor | None, ds: Tensor, lora: LoraArgs) -> Tensor:
    assert x is not None
    da = lora.a.new_empty(lora.a.shape, dtype=torch.float32)
    for ranks in _slices(lora.a.shape[0]):
        outer = _sweep(x, None, ds[:, ranks], None, 1.0, lora.dropout, lora.seed)
        assert outer is not None
        da[ranks] = outer.T * (1 / (1 - lora.dropout))
    return da


def input_gradient(grad: Tensor, weight: Tensor, ds: Tensor, lora: LoraArgs) -> Tensor:
    """Compute dX = dY W + drop'(dS A)."""
    dx = grad.new_empty(grad.shape[0], weight.shape[1])
    _launch(grad, weight.T, dx, b=lora.a.T, s=ds, dropout=lora.dropout, seed=lora.seed)
    return dx


def _launch_runs(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None,
    lora: LoraArgs,
    s: Tensor,
    *,
    make_s: bool,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launch once for each adapted run of rows of weight and each gap between; not make_s: s is given, b scaled."""

    def launch(start: int, stop: int, **adapter: Any) -> None:
        if start < stop:
            _launch(
                x, weight[start:stop], y[:, start:stop],
                bias=None if bias is None else bias[start:stop],
                scales=None if scales is None else (scales[0], scales[1][start:stop]),
                **adapter,
            )  # fmt: skip

    end = 0
    for span, ranks, block in lora.adapters(weight.shape[0]):
        launch(end, span.start)
        options: dict[str, Any] = {"b": block, "s": s[:, ranks]}
        if make_s:
            options |= {"a": lora.a[ranks], "scale": lora.scale, "dropout": lora.dropout, "seed": lora.seed}
        launch(span.start, span.stop, **options)
        end = span.stop
    launch(end, weight.shape[0])


def _launch(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    s: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    tma: bool | None = None,
) -> None:
    """Fill y [M, N] with x w^T + bias + the low-rank part; x: [M, K], w: [N, K].

    With `a` that part is scale * drop(x) a^T b^T, and s, if it has rows, receives drop(x) a^T.
    Without, it is drop'(s b^T). scales: of the rows of x and of w, by which their product is multiplied.
    tma: whether blocks are read through descriptors; None: where the device and the layout allow it.
    """
    (M, K), N, R = x.shape, w.shape[0], 1 if b is None else b.shape[1]
    lora = "none" if b is None else "make" if a is not None else "given"
    tiles = _gemm_tiles(x, is_masked=dropout > 0 and lora != "make")
    x_block, w_block, is_transposed = _blocks(w, tiles)
    if tma is None:
        tma = _has_tma(x.device) and _fits_tma(x) and _fits_tma(w.T if is_transposed else w)
    blocks = cdiv(M, tiles["BLOCK_M"]) * cdiv(N, tiles["BLOCK_N"])
    bias_, a_, b_, s_, seed_ = pointers(x, bias, a, b, s, seed)
    with on_device_of(x):
        lora_linear_kernel[(min(blocks, _num_programs(x.device)),)](
            _descriptor(x, x_block) if tma else x, _descriptor(w.T if is_transposed else w, w_block) if tma else w,
            bias_, a_, b_, s_, y, seed_, *(scales or (x, x)), scale, *_drop_numbers(dropout), M, N, K, R,
            *x.stride(), *w.stride(), *a_.stride(), *b_.stride(), *s_.stride(), y.stride(0),
            LORA=lora, STORE_S=s is not None and s.shape[0] > 0, HAS_BIAS=bias is not None, DROPOUT=dropout > 0,
            SCALED=scales is not None, TMA=tma, W_TRANSPOSED=is_transposed, UPCAST_DOT=INTERPRET,
            BLOCK_R=_block_r(R), **tiles, enable_fp_fusion=True,
        )  # fmt: skip


def _gemm_tiles(x: Tensor, is_masked: bool) -> dict[str, int]:
    kind = {1: "_fp8", 4: "_fp32"}.get(x.element_size(), "_masked" if is_masked else "")
    return dict(tile(f"lora_linear{kind}", x.device))


def _blocks(w: Tensor, tiles: dict[str, int]) -> tuple[list[int], list[int], bool]:
    """Return the blocks of x and of w as stored, and whether w is stored transposed."""
    is_transposed = w.stride(1) != 1 and w.stride(0) == 1
    m, n, k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    return [m, k], [k, n] if is_transposed else [n, k], is_transposed


def _sweep(
    g: Tensor,
    b: Tensor | None,
    s: Tensor | None,
    p: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | None:
    """Fill p = scale * g b if b is given; returns g^T s [N, R] in fp32 if s is given."""
    right = b if b is not None else s
    assert right is not None
    (M, N), R = g.shape, right.shape[1]
    tiles = dict(tile("lora_linear_sweep" if g.element_size() == 2 else "lora_linear_sweep_fp32", g.device))
    splits = cdiv(N, tiles["BLOCK_N"])
    programs = max(1, min(cdiv(M, tiles["BLOCK_M"]), 2 * _num_programs(g.device) // splits))
    q = g.new_empty(programs if s is not None else 0, N, R, dtype=torch.float32)
    parts = None if p is None else p[None] if splits == 1 else p.new_empty(splits, M, R, dtype=torch.float32)
    b_, s_, seed_ = pointers(g, b, s, seed)
    threshold, _ = _drop_numbers(dropout)
    with on_device_of(g):
        lora_linear_sweep[(programs, splits)](
            g, b_, s_, q if parts is None else parts, q, seed_,
            scale, threshold,
            M, N, R,
            *g.stride(), *b_.stride(), *s_.stride(), *(q if parts is None else parts).stride(),
            PROJECT=b is not None, OUTER=s is not None, DROPOUT=dropout > 0, UPCAST_DOT=INTERPRET,
            BLOCK_R=_block_r(R), **tiles, enable_fp_fusion=True,
        )  # fmt: skip
    if p is not None and parts is not None and splits > 1:
        p.copy_(parts.sum(0))
    return q.sum(0) if s is not None else None


def _slices(rank: int) -> list[slice]:
    """Cut `rank` ranks into slices of at most MAX_RANK."""
    return [slice(r, min(r + MAX_RANK, rank)) for r in range(0, rank, MAX_RANK)]


def _block_r(R: int) -> int:
    # tl.dot wants at least 16
    return min(max(16, 1 << (R - 1).bit_length()), MAX_RANK)


def _drop_numbers(dropout: float) -> tuple[int, float]:
    return drop_threshold(dropout), 1 / (1 - dropout)


@functools.lru_cache
def _num_programs(device: torch.device) -> int:
    # in the interpreter: few, so that a program takes more than one block
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.lru_cache
def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _fits_tma(matrix: Tensor) -> bool:
    # rows apart from one another: an expanded row, or windows that overlap, have no descriptor
    (row, column), size = matrix.stride(), matrix.element_size()
    return column == 1 and row >= matrix.shape[1] and row * size % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block)
