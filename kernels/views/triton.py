"""Triton form of random views: launches of triton_kernels.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._tile_sizes import tile
from .._triton import cdiv, on_device_of
from .eager import halves
from .triton_kernels import blur_kernel, color_kernel, resize_kernel


def views_triton(
    pixels: Tensor, places: Tensor, boxes: Tensor, factors: Tensor, mean: Tensor, std: Tensor, out: Tensor,
    height: int, width: int, interpolation: str, taps: tuple[int, int], patch: int,
) -> None:  # fmt: skip
    """Fill `out`; arguments as `make_views`, all contiguous."""
    N, channels, is_fixed, has_blur = len(out), len(mean), out.element_size() == 2, max(taps) > 1
    tiles = dict(tile("views", out.device))
    cells, block = tiles.pop("CELLS"), tiles["BLOCK"]
    parts = channels * cdiv(height, block) * cdiv(width, block)
    room = out.view(torch.int16) if is_fixed else out
    sums = pixels.new_empty(N, parts, dtype=torch.float32)
    shape, options = (channels, height, width), {"PATCH": patch, "FIXED": is_fixed, "enable_fp_fusion": True}
    with on_device_of(out):
        resize_kernel[(N * parts,)](
            pixels, places, boxes, factors, room, sums, *shape,
            RGB=channels == 3, CUBIC=interpolation == "bicubic", **tiles, **options,
        )  # fmt: skip
        color_kernel[(N * cdiv(height * width, cells),)](
            room, sums.sum(1), factors, mean, std, out, *shape,
            RGB=channels == 3, BLUR=has_blur, CELLS=cells, num_warps=tiles["num_warps"], **options,
        )  # fmt: skip
        if has_blur:
            _blur(room, factors, mean, std, out, shape, halves(taps, height, width), tiles, options)


def _blur(
    room: Tensor, factors: Tensor, mean: Tensor, std: Tensor, out: Tensor,
    shape: tuple[int, int, int], halves: tuple[int, int], tiles: dict[str, int], options: Mapping[str, int],
) -> None:  # fmt: skip
    """Blur the colored views in `room` along columns, then along rows."""
    (channels, height, width), scratch = shape, torch.empty_like(room)
    steps = ((room, scratch, height, width, halves[0], False), (scratch, out, width, height, halves[1], True))
    for source, target, length, across, half, is_last in steps:
        programs = cdiv(length, tiles["BLOCK"]) * cdiv(across, tiles["BLOCK_K"])
        blur_kernel[(len(out) * channels * programs,)](
            source, factors, mean, std, target, *shape, half, FINISH=is_last, **tiles, **options
        )
