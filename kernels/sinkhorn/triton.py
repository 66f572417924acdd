"""Triton form of `sinkhorn`: one resident grid runs all passes, or each pass is a launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._tile_sizes import tile
from .._triton import INTERPRET, cdiv, on_device_of, tl, triton
from .triton_kernels import barrier, columns_pass, rows_pass, sum_pass


@triton.jit
def after_first_pass(
    scores, q, part_peak, part_sum, rows, peak, share, arrived,
    inverse, iterations, num_first, num_parts, B, K, stride_b, stride_k,
    FITS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Run all passes after the first, which left `num_first` parts of the columns, in the launch of the first."""
    barrier(arrived, 1)
    sum_pass(
        part_peak, part_sum, peak, share, share, inverse, num_first, K, True, False, BLOCK_P, BLOCK_C
    )  # fmt: skip
    barrier(arrived, 2)
    for i in tl.range(1, iterations):
        rows_pass(
            scores, q, part_sum, rows, peak, share, inverse, B, K, stride_b, stride_k,
            False, BLOCK_B, BLOCK_K, FITS,
        )  # fmt: skip
        barrier(arrived, 2 * i + 1)
        sum_pass(
            part_peak, part_sum, peak, share, share, inverse, num_parts, K, False, False, BLOCK_P, BLOCK_C
        )  # fmt: skip
        barrier(arrived, 2 * i + 2)
    rows_pass(
        scores, q, part_sum, rows, peak, share, inverse, B, K, stride_b, stride_k,
        True, BLOCK_B, BLOCK_K, FITS,
    )  # fmt: skip


@triton.jit
def _sinkhorn_kernel(
    scores, q, part_peak, part_sum, rows, peak, share, total, arrived,
    inverse,  # log2(e) / epsilon
    iterations, num_parts, B, K, stride_v, stride_b, stride_k,
    PASS: tl.constexpr,  # "all" in one launch with barriers, or one of "columns", "rows", "sum", "assign"
    FIRST: tl.constexpr, SPLIT: tl.constexpr, FITS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # problems have nothing in common, not even barriers
    v = tl.program_id(1).to(tl.int64)
    scores, q, rows, arrived = scores + v * stride_v, q + v * B * K, rows + v * 2 * B, arrived + v
    part_peak, part_sum = part_peak + v * num_parts * K, part_sum + v * num_parts * K
    peak, share, total = peak + v * K, share + v * K, total + v * K
    if PASS == "all" or PASS == "columns":
        columns_pass(scores, part_peak, part_sum, inverse, B, K, stride_b, stride_k, BLOCK_B, BLOCK_K)
    if PASS == "all":
        after_first_pass(
            scores, q, part_peak, part_sum, rows, peak, share, arrived,
            inverse, iterations, num_parts, num_parts, B, K, stride_b, stride_k,
            FITS, BLOCK_B, BLOCK_K, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    if PASS == "sum":
        sum_pass(
            part_peak, part_sum, peak, share, total, inverse, num_parts, K, FIRST, SPLIT, BLOCK_P, BLOCK_C
        )  # fmt: skip
    if PASS == "rows" or PASS == "assign":
        rows_pass(
            scores, q, part_sum, rows, peak, share, inverse, B, K, stride_b, stride_k,
            PASS == "assign", BLOCK_B, BLOCK_K, FITS,
        )  # fmt: skip


class Partition(NamedTuple):
    """Partition of scores [..., B, K] into the programs of a resident grid."""

    block_b: int
    block_k: int
    num_warps: int
    num_parts: int  # programs of a problem
    resident: bool  # whether the programs of all problems fit the device together

    @property
    def options(self) -> dict[str, int | bool]:
        """Constants and options of a launch."""
        return {
            "BLOCK_B": self.block_b, "BLOCK_K": self.block_k, "BLOCK_P": 32, "BLOCK_C": 32,
            "num_warps": self.num_warps, "maxnreg": 128, "enable_fp_fusion": True,
        }  # fmt: skip


def partition(scores: Tensor, *, tiles: int = 1, fewest_warps: int = 1) -> Partition:
    """Partition the problems; tiles: number of programs for which the first pass of a problem has work."""
    (V, B, K), cells = _sizes(scores), tile("sinkhorn", scores.device)
    block_k = min(triton.next_power_of_2(K), cells["BLOCK"])
    resident = _resident_warps(scores.device) // V
    # a small problem is cut finer, so that more processors have a share of it; 16 scores a thread
    size = min(max(B * block_k // max(resident, 1) * 16, cells["SMALL_BLOCK"]), cells["BLOCK"])
    block_b = min(max(1, triton.next_power_of_2(size // block_k + 1) // 2), triton.next_power_of_2(B))
    num_warps = min(max(block_b * block_k // cells["WARP_CELLS"], fewest_warps), 16)
    most = resident // num_warps
    return Partition(block_b, block_k, num_warps, min(max(cdiv(B, block_b), tiles), max(most, 1)), most > 0)


def launch(
    passes: Sequence[str], scores: Tensor, epsilon: float, peak: Tensor, share: Tensor, *,
    iterations: int = 1, q: Tensor | None = None, total: Tensor | None = None,
    by: Partition | None = None, parts: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Launch `passes` one after another. A "sum" ends the pass before it, in `total` if given, else in `share`.

    parts: of the first pass, left by an earlier launch with the same partition; then the first of `passes` is a "sum".
    """
    (V, B, K), by = _sizes(scores), by or partition(scores)
    fits = by.block_k >= K
    part_peak, part_sum = parts or (scores.new_empty(V, by.num_parts, K, dtype=torch.float32) for _ in range(2))
    rows = room_for_rows(scores, by, peak)
    arrived = scores.new_zeros(V, dtype=torch.int32) if "all" in passes else peak
    with on_device_of(scores):
        for i, name in enumerate(passes):
            first = i == 0 or passes[i - 1] == "columns"
            grid = min(by.num_parts, cdiv(K, 32)) if name == "sum" else by.num_parts
            _sinkhorn_kernel[(grid, V)](
                scores, peak if q is None else q, part_peak, part_sum, rows, peak, share,
                peak if total is None else total, arrived,
                math.log2(math.e) / epsilon, iterations, part_peak.shape[-2] if first else by.num_parts,
                B, K, *(0, *scores.stride())[-3:],
                PASS=name, FIRST=first, SPLIT=total is not None, FITS=fits,
                launch_cooperative_grid=name == "all", **by.options,
            )  # fmt: skip


def room_for_rows(scores: Tensor, by: Partition, unused: Tensor) -> Tensor:
    """Return an empty [V, 2, B] where a row does not fit a program, else `unused`."""
    V, B, K = _sizes(scores)
    return unused if by.block_k >= K else scores.new_empty(V, 2, B, dtype=torch.float32)


def _sizes(scores: Tensor) -> tuple[int, int, int]:
    """Return (V problems, B samples, K centers)."""
    return scores.shape[0] if scores.dim() == 3 else 1, scores.shape[-2], scores.shape[-1]


@functools.lru_cache
def _resident_warps(device: torch.device) -> int:
    """Return the number of warps, 128 registers a thread, that the device holds at once; interpreter: 48."""
    if device.type != "cuda":
        return 48
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count


def like_scores(scores: Tensor, *_: object) -> Tensor:
    """Return an empty fp32 tensor of the shape of `scores`."""
    return scores.new_empty(scores.shape, dtype=torch.float32)


def two_columns(scores: Tensor, *_: object) -> tuple[Tensor, ...]:
    """Return two empty fp32 tensors [..., K]."""
    return tuple(scores.new_empty(*scores.shape[:-2], scores.shape[-1], dtype=torch.float32) for _ in range(2))


def assignments(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Compute Q [..., B, K], in one launch unless there are more problems than the device holds."""
    peak, share = two_columns(scores)
    q, by = like_scores(scores), partition(scores)
    # programs run in turn in the interpreter, where none may wait for the next
    passes = ["all"] if by.resident and not INTERPRET else pass_names(iterations)
    launch(passes, scores, epsilon, peak, share, iterations=iterations, q=q, by=by)
    return q


def pass_names(iterations: int) -> list[str]:
    """Return the names of the passes when each is a launch."""
    return ["columns", "sum", *["rows", "sum"] * (iterations - 1), "assign"]


def columns(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute (peak, sum) of every column, [..., K] each."""
    peak, total = two_columns(scores)
    launch(["columns", "sum"], scores, epsilon, peak, peak, total=total)
    return peak, total


def rows(scores: Tensor, epsilon: float, peak: Tensor, share: Tensor) -> Tensor:
    """Compute the columns' sums [..., K] after scaling the rows to sum to 1."""
    total = torch.empty_like(peak)
    launch(["rows", "sum"], scores, epsilon, peak, share, total=total)
    return total


def assign(scores: Tensor, epsilon: float, peak: Tensor, share: Tensor) -> Tensor:
    """Compute Q [..., B, K] from the columns' peaks and shares."""
    q = like_scores(scores)
    launch(["assign"], scores, epsilon, peak, share, q=q)
    return q
