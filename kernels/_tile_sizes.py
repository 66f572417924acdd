"""Tile sizes by op and GPU, with a default for every GPU.

A row is `op: {compute capability or None: {constexpr: value}}`; None is the default, used on any GPU without a row
of its own, so an unknown GPU never raises. Rows for a capability carry the measurement that chose them.
`tests/kernels/test_aot.py` compiles every row for sm_80, sm_90 and sm_100 and checks it against their limits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

Tile = Mapping[str, int]

MAX_ROW = 8192  # cells of a row that one program holds in registers

TILES: dict[str, dict[tuple[int, int] | None, Tile]] = {
    # not measured yet: guesses that fit sm_80's shared memory
    "lora_linear": {
        None: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
        # the first tried on an H200 (1.16x the bare cuBLAS GEMM at L/14 in bf16)
        (9, 0): {
            "BLOCK_M": 128,
            "BLOCK_N": 256,
            "BLOCK_K": 64,
            "GROUP_M": 8,
            "num_warps": 8,
            "num_stages": 3,
        },
    },
    "lora_linear_fp32": {
        None: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8, "num_warps": 8, "num_stages": 2},
    },
    "lora_linear_fp8": {
        None: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
        (9, 0): {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    },
    # dX under dropout holds a second accumulator
    "lora_linear_masked": {
        None: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    },
    # each BLOCK_N columns write a share of P in fp32: at rank 16 an eighth of the bytes of 256 columns in 16 bit
    "lora_linear_sweep": {None: {"BLOCK_M": 64, "BLOCK_N": 256, "num_warps": 4, "num_stages": 2}},
    "lora_linear_sweep_fp32": {None: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}},
    # not measured yet: scores a program holds, at most and in small problems, and scores of a warp
    "sinkhorn": {
        None: {"BLOCK": 8192, "SMALL_BLOCK": 2048, "WARP_CELLS": 512},
        # larger ones spill with Triton 3.6
        (8, 0): {"BLOCK": 4096, "SMALL_BLOCK": 2048, "WARP_CELLS": 256},
    },
    # of its product: rows of a tile in batches of less than MANY_ROWS, and else; not measured yet
    "scored_sinkhorn": {None: {"FEW_ROWS": 16, "MANY_ROWS": 1024, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32}},
    # a deeper tile spills three registers with Triton 3.6 on sm_90
    "scored_sinkhorn_fp32": {None: {"FEW_ROWS": 16, "MANY_ROWS": 1024, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}},
    "swapped_cross_entropy": {None: {"BLOCK": 4096}},
    # ops that hold whole rows (see row_tile): cells of a program and of a warp; not measured yet
    "quantize": {None: {"CELLS": 4096, "WARP_CELLS": 1024}},
    "gelu": {None: {"CELLS": 2048, "WARP_CELLS": 512}},
    "layer_norm": {None: {"CELLS": 4096, "WARP_CELLS": 1024}},
    # query rows and keys; RIDERS: tokens of a small block that may ride (attention/triton_kernels.py); not measured yet
    "attention": {
        None: {"BLOCK": 64, "BLOCK_N": 32, "RIDERS": 0, "num_warps": 4, "num_stages": 3},
        # two groups of four warps share k and v; with 128 keys a program needs 254 registers, and half the warps fit
        (9, 0): {"BLOCK": 128, "BLOCK_N": 64, "RIDERS": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 128},
    },
    "attention_wide": {None: {"BLOCK": 32, "BLOCK_N": 32, "RIDERS": 0, "num_warps": 8, "num_stages": 2}},
    "attention_fp32": {None: {"BLOCK": 16, "BLOCK_N": 16, "RIDERS": 0, "num_warps": 4, "num_stages": 2}},
    "attention_backward": {
        None: {"BLOCK": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        # 32 keys spill with Triton 3.6 where the width of a head is no power of two
        (8, 0): {"BLOCK": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3},
    },
    # 4 warps spill (sm_90, sm_100)
    "attention_backward_wide": {None: {"BLOCK": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}},
    # 4 warps spill with Triton 3.6 where heads are wider than 64
    "attention_backward_fp32": {None: {"BLOCK": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}},
    # 16 warps, or blocks of twice as many queries, spill in the loop
    "attention_head": {
        None: {"BLOCK_N": 16, "num_warps": 8, "num_stages": 2},
        (9, 0): {"BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (10, 0): {"BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    },
    # results and source rows of a tile; pixels that a program colors; not measured yet. 64 rows take 164 registers, not
    # 96, on sm_90: three programs fit a multiprocessor instead of five
    "views": {None: {"BLOCK": 32, "BLOCK_K": 32, "CELLS": 1024, "num_warps": 4}},
    # cells of a program; not measured yet
    "patchify": {None: {"CELLS": 4096, "num_warps": 4}},
}


def tile(op: str, device: torch.device) -> Tile:
    """Return the tile sizes (and num_warps, num_stages) of `op` for this device."""
    rows = TILES[op]
    return rows.get(_capability(device), rows[None])


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def row_tile(op: str, device: torch.device, width: int, fewest: int = 1) -> Tile:
    """Return BLOCK_M (at least `fewest`), BLOCK_K and num_warps of an op that holds whole rows of `width` cells."""
    cells = tile(op, device)
    return _row_tile(cells["CELLS"], cells["WARP_CELLS"], width, fewest)


@functools.lru_cache
def _row_tile(cells: int, warp_cells: int, width: int, fewest: int) -> Tile:
    block = 1 << max(width - 1, 15).bit_length()
    rows = min(max(cells // block, fewest), 32)
    return {"BLOCK_M": rows, "BLOCK_K": block, "num_warps": min(max(rows * block // warp_cells, 1), 16)}
