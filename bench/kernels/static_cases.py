"""Launches that bench/kernels/static.py estimates: the ops of a training step of ViT-L/14, 128 views of 224 pixels.

`bytes`: what an op has to move, each input and each output once. `flops`: what its formula has to compute in matrix
products. Both belong to the op and not to its implementation, so that they are the floor of every implementation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

VIEWS, TOKENS, WIDTH, HIDDEN, HEADS, RANK = 128, 257, 1024, 4096, 16, 16
M = VIEWS * TOKENS
HALF, BYTE, FP32 = torch.bfloat16, torch.uint8, torch.float32


class Work(NamedTuple):
    """One op at one shape; `run` launches it for a GPU of a compute capability, on tensors without content."""

    run: Callable[[tuple[int, int]], object]
    bytes: float
    flops: float = 0
    repeats: int = 1  # of a loop whose length depends on data
    outer_repeats: int = 1  # of such a loop around another loop


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Return a tensor on the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def op(name: str) -> Any:
    """Return a module of the kernels."""
    return importlib.import_module(f"upstep_fast.kernels.{name}")


def native(capability: tuple[int, int]) -> bool:
    """Return whether that GPU rounds to fp8 itself."""
    return capability >= (8, 9)


def _attention(form: str) -> Callable[[tuple[int, int]], object]:
    def run(_: tuple[int, int]) -> object:
        triton, qkv = op("attention.triton"), empty(VIEWS, TOKENS, 3, HEADS, WIDTH // HEADS)
        out, lse = triton.outputs(qkv)
        if form == "forward":
            return triton.forward(qkv, 0.125)
        return getattr(triton, form)(out.new_empty(out.shape), qkv, out, lse, 0.125)

    return run


def _gelu(capability: tuple[int, int], backward: bool = False, fp8: bool = False, keep: bool = True) -> object:
    gelu, x = op("gelu"), empty(M, HIDDEN)
    if backward:
        return gelu._gelu_bwd_triton(x, empty(M, HIDDEN, dtype=BYTE), fp8, native(capability))
    return gelu._gelu_fwd_triton(x, "none", keep, fp8, native(capability))


def _norm(capability: tuple[int, int], backward: bool = False) -> object:
    triton, x, stats = op("layer_norm.triton"), empty(M, WIDTH), empty(M, dtype=FP32)
    if backward:
        saved, grad_h = empty(M, WIDTH), empty(M, WIDTH)
        return triton.backward(x, saved, stats, stats, None, grad_h, False, False, native(capability), 132)
    return triton.forward(x, empty(M, WIDTH), None, None, None, 1e-6, True, False, native(capability))


def _lora(kind: str) -> Callable[[tuple[int, int]], object]:
    def run(capability: tuple[int, int]) -> object:
        triton, k, n, tma = op("lora_linear.triton"), WIDTH, 3 * WIDTH, capability >= (9, 0)
        if kind == "forward":
            parts = {"a": empty(RANK, k), "b": empty(n, RANK), "s": empty(M, RANK), "bias": empty(n)}
            return triton._launch(empty(M, k), empty(n, k), empty(M, n), **parts, scale=0.5, tma=tma)
        if kind == "dx":
            parts = {"b": empty(RANK, k).T, "s": empty(M, RANK)}
            return triton._launch(empty(M, n), empty(n, k).T, empty(M, k), **parts, tma=tma)
        wide = kind == "sweep dY"
        return triton._sweep(empty(M, n if wide else k), empty(n, RANK) if wide else None, empty(M, RANK),
                             empty(M, RANK) if wide else None, 1.0)  # fmt: skip

    return run


def _views(interpolation: str, taps: int) -> Callable[[tuple[int, int]], object]:
    def run(_: tuple[int, int]) -> object:
        pixels, places = empty(64 * 3 * 500 * 375, dtype=BYTE), empty(64, 4, dtype=torch.int64)
        boxes, factors = empty(VIEWS, 6, dtype=torch.int32), empty(VIEWS, 7, dtype=FP32)
        mean, out = empty(3, dtype=FP32), empty(VIEWS, 3, 224, 224)
        launch = op("views.triton").views_triton
        return launch(pixels, places, boxes, factors, mean, mean, out, 224, 224, interpolation, (taps, taps), 14)

    return run


def _sinkhorn(*shape: int) -> Callable[[tuple[int, int]], object]:
    return lambda _: op("sinkhorn.triton").assignments(empty(*shape, dtype=FP32), 0.05, 3)


def _scored(_: tuple[int, int]) -> object:
    return op("sinkhorn.scored")._fused(empty(2048, 128, dtype=FP32), empty(3000, 128, dtype=FP32), 0.05, 3)


def _swapped(_: tuple[int, int]) -> object:
    loss, scores, targets = op("swapped_loss"), empty(2048, 3000, dtype=FP32), empty(2048, 3000, dtype=FP32)
    value, peak, weight = loss._forward_triton(scores, targets, 0.1)
    return loss._backward_triton(value.mean().expand(2048), scores, targets, peak, weight, 0.1)


def _patchify(_: tuple[int, int]) -> object:
    pictures, patches = empty(VIEWS, 3, 224, 224, dtype=FP32), empty(VIEWS, 256, 588)
    return op("patchify")._patchify_triton(pictures, patches, 14, False)


PRODUCT = 2 * VIEWS * TOKENS * TOKENS * WIDTH  # flops of q k^T of all heads
GEMM = 2 * M * WIDTH * 3 * WIDTH
VIEW = VIEWS * 3 * (500 * 375 // 2 + 2 * 224 * 224)  # of half an image, to 16 bit
WORK: dict[str, Work] = {
    "attention forward": Work(_attention("forward"), 8 * M * WIDTH + 4 * M * HEADS, 2 * PRODUCT),
    "attention backward": Work(_attention("backward"), 16 * M * WIDTH + 4 * M * HEADS, 5 * PRODUCT),
    "attention backward by heads": Work(_attention("backward_by_heads"), 16 * M * WIDTH + 4 * M * HEADS, 5 * PRODUCT),
    "gelu forward": Work(lambda c: _gelu(c), 5 * M * HIDDEN),
    "gelu forward only": Work(lambda c: _gelu(c, keep=False), 4 * M * HIDDEN),
    "gelu forward to fp8": Work(lambda c: _gelu(c, fp8=True), 4 * M * HIDDEN),
    "gelu backward": Work(lambda c: _gelu(c, backward=True), 5 * M * HIDDEN),
    "layer_norm forward": Work(lambda c: _norm(c), 8 * M * WIDTH + 8 * M),
    "layer_norm backward": Work(lambda c: _norm(c, backward=True), 8 * M * WIDTH + 8 * M),
    "quantize 1024": Work(lambda c: op("quantize")._quantize_triton(empty(M, WIDTH), native(c)), 3 * M * WIDTH),
    "quantize 3072": Work(lambda c: op("quantize")._quantize_triton(empty(M, 3 * WIDTH), native(c)), 9 * M * WIDTH),
    "lora_linear forward qkv": Work(_lora("forward"), 2 * (4 * M * WIDTH + 3 * WIDTH * WIDTH), GEMM),
    "lora_linear dX qkv": Work(_lora("dx"), 2 * (4 * M * WIDTH + 3 * WIDTH * WIDTH), GEMM),
    "lora_linear sweep dY": Work(_lora("sweep dY"), 6 * M * WIDTH),
    "lora_linear sweep x": Work(_lora("sweep x"), 2 * M * WIDTH),
    # a view of half an image, 265 x 354 pixels to 224 x 224: its filters' taps are the inner loops, and 32 result rows
    # with the filter's reach take 41 or 45 source rows, 32 at a time
    "views bilinear": Work(_views("bilinear", 1), VIEW, repeats=4, outer_repeats=2),
    "views bicubic, blur": Work(_views("bicubic", 23), VIEW, repeats=7, outer_repeats=2),
    "patchify": Work(_patchify, VIEWS * 3 * 224 * 224 * 6),
    "sinkhorn 2x256x300": Work(_sinkhorn(2, 256, 300), 8 * 2 * 256 * 300),
    "sinkhorn 2048x3000": Work(_sinkhorn(2048, 3000), 8 * 2048 * 3000),
    "scored_sinkhorn 2048x3000": Work(_scored, 8 * 2048 * 3000, 2 * 2048 * 3000 * 128),
    "swapped_loss 2048x3000": Work(_swapped, 4 * 5 * 2048 * 3000),
}
