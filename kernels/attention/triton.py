"""Launchers of the Triton form of `attention`."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .._tile_sizes import Tile, tile
from .._triton import INTERPRET, cdiv, launch, on_device_of
from .triton_backward import backward_kernel
from .triton_head import head_kernel
from .triton_kernels import forward_kernel

MAX_WIDTH = 128  # of a head
MAX_BEYOND = 16  # tokens beyond a power of two of keys that `backward_by_heads` takes without a larger one
MAX_HEAD_TOKENS, MAX_HEAD_WIDTH = 256 + MAX_BEYOND, 64  # of `backward_by_heads`: dk and dv fill half of the registers
HEAD_SHARED = 200_000  # bytes that a program may have where it is offered: sm_90 and sm_100; sm_80 spills at 197 tokens
_LOG2_E = 1 / math.log(2)


def _tiles(name: str, qkv: Tensor) -> Tile:
    kind = "_fp32" if qkv.element_size() == 4 else "_wide" if _width(qkv) > 64 else ""
    return tile(f"{name}{kind}", qkv.device)


def _width(qkv: Tensor) -> int:
    return int(max(16, 1 << (qkv.shape[4] - 1).bit_length()))


def _small(rest: int) -> int:
    """Return the size of the block that holds `rest` tokens: 0, or a power of two of at least 16."""
    return max(16, 1 << (rest - 1).bit_length()) if rest else 0


def forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a contiguous qkv [B, T, 3, H, d]."""
    out, lse = outputs(qkv)
    B, T, _, H, D = qkv.shape
    tiles = dict(_tiles("attention", qkv))
    rest, riders = T % tiles["BLOCK_N"], tiles.pop("RIDERS")
    rides = 0 < rest <= riders and rest < T
    blocks = cdiv(T - rest, tiles["BLOCK"]) + (rest > 0 and not rides)
    with on_device_of(qkv):
        launch(
            forward_kernel, blocks * B * H, (qkv, out, lse, T, H, rest, blocks, abs(scale) * _LOG2_E),
            NEGATIVE=scale < 0, RIDES=rides, MASKED=(T - rest) % tiles["BLOCK"] > 0, BLOCK_S=_small(rest),
            D=D, BLOCK_D=_width(qkv), UPCAST_DOT=INTERPRET, **tiles, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv [B, T, 3, H, d]; all arguments contiguous."""
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    B, T, _, H, D = qkv.shape
    tiles = _tiles("attention_backward", qkv)
    rest = T % tiles["BLOCK"]
    with on_device_of(qkv):
        for part in ("dq", "dkv"):
            launch(
                backward_kernel, cdiv(T, tiles["BLOCK"]) * B * H,
                (qkv, out, lse, grad, delta, dqkv, T, H, rest, scale, scale * _LOG2_E),
                PART=part, BLOCK_S=_small(rest), D=D, BLOCK_D=_width(qkv), UPCAST_DOT=INTERPRET, **tiles,
                enable_fp_fusion=True,
            )  # fmt: skip
    return dqkv


def fits_heads(qkv: Tensor) -> bool:
    """Return True if `backward_by_heads` takes `qkv`."""
    fits = qkv.element_size() == 2 and qkv.shape[1] <= MAX_HEAD_TOKENS and qkv.shape[4] <= MAX_HEAD_WIDTH
    return fits and _shared_memory(qkv.device) >= HEAD_SHARED


@functools.lru_cache
def _shared_memory(device: torch.device) -> int:
    # torch's type stub lacks the property (2.11 and 2.14), its classes have it
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def backward_by_heads(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv as `backward` does, by one program for each head; see `fits_heads`."""
    B, T, _, H, D = qkv.shape
    tiles = tile("attention_head", qkv.device)
    keys = 1 << max(T - MAX_BEYOND - 1, 63).bit_length()
    beyond = MAX_BEYOND if keys < T else 0
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    ds_beyond = qkv.new_empty(B, H, T, beyond) if beyond else delta
    with on_device_of(qkv):
        launch(
            head_kernel, B * H, (qkv, out, lse, grad, delta, ds_beyond, dqkv, T, scale, scale * _LOG2_E),
            H=H, ROWS=8 * tiles["num_warps"], KEYS=keys, BLOCK_S=beyond, MASKED=keys > T, D=D, BLOCK_D=_width(qkv),
            UPCAST_DOT=INTERPRET, **tiles, enable_fp_fusion=True,
        )  # fmt: skip
    return dqkv


def outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty out [B, T, H, d] and lse [B, H, T]."""
    B, T, _, H, D = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=wide)
