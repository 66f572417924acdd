"""FLOPs of the ops for torch.utils.flop_counter, which counts an op it has no formula for as nothing.

A product [M, K] [K, N] counts 2 M K N, as there; what is done entry by entry counts nothing, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._dispatch import NAMESPACE

Shape = Any  # the counter hands over the shape of each tensor among the arguments, and every other argument itself


def attention(qkv: Shape, *_: Any, **__: Any) -> int:
    """Count the two products of the forward pass. qkv: [B, T, 3, H, d]."""
    B, T, _, H, d = qkv
    return int(2 * 2 * B * H * T * T * d)


def attention_forward(qkv: Shape, *_: Any, **__: Any) -> int:
    """Count as `attention` does."""
    return attention(qkv)


def attention_backward(grad: Shape, qkv: Shape, *_: Any, **__: Any) -> int:
    """Count the five products of the backward pass: the scores again, dP, dV, dQ and dK."""
    return 5 * attention(qkv) // 2


def lora_linear(x: Shape, weight: Shape, bias: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Count x W^T, x A^T and S B^T. x: [M, K]; weight: [N, K]; a: [R, K]; b: [rows, r]."""
    return int(2 * x[0] * (_area(weight) + _area(a) + _area(b)))


def lora_linear_backward(
    grad: Shape, x: Shape, weight: Shape, a: Shape, b: Shape, s: Shape, scale: float, dropout: float, seed: Any,
    rows: Any, strategy: str, needs: Any, **_: Any,
) -> int:  # fmt: skip
    """Count dY W and dS A for x, dS^T x for A, dY^T S for B, and dS = dY B for the first two."""
    need_x, need_a, need_b = needs
    of_x = need_x * (_area(weight) + _area(a)) + need_a * _area(a)
    return int(2 * grad[0] * (of_x + (need_x or need_a) * _area(b) + need_b * _area(b)))


def lora_linear_fp8(
    x: Shape, weight: Shape, scale: Shape, weight_t: Shape, scale_t: Shape, bias: Shape, a: Shape, b: Shape, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """Count as `lora_linear` does."""
    return lora_linear(x, weight, bias, a, b)


def lora_linear_fp8_backward(
    grad: Shape, x: Shape, weight: Shape, weight_scale: Shape, is_transposed: bool, *rest: Any, **__: Any
) -> int:
    """Count as `lora_linear_backward` does."""
    return lora_linear_backward(grad, x, weight, *rest)


def scored_sinkhorn(z: Shape, centers: Shape, *_: Any, **__: Any) -> int:
    """Count the scores z C^T."""
    return int(2 * z[0] * _area(centers))


def low_rank_mixer(b: Shape, a: Shape, axes: str, *rest: Any, **__: Any) -> int:
    """Count two products for each axis, down to rank r and up again. b: [P, N, D]."""
    P, N, D = b
    return int(sum(2 * 2 * P * N * D * down[0] for down in rest[-1][::4]))


def low_rank_mixer_backward(
    grad: Shape, u: Shape, difference: Shape, lows: Any, axes: str, *rest: Any, **_: Any
) -> int:
    """Count twice the forward's products."""
    return 2 * low_rank_mixer(grad, grad, axes, rest[-2])


FORMULAS: tuple[Callable[..., int], ...] = (
    attention,
    attention_forward,
    attention_backward,
    lora_linear,
    lora_linear_backward,
    lora_linear_fp8,
    lora_linear_fp8_backward,
    scored_sinkhorn,
    low_rank_mixer,
    low_rank_mixer_backward,
)  # each by the name of its op


def register_flop_formulas() -> None:
    """Make torch.utils.flop_counter count the ops of this folder; a second call does nothing."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula  # half a second: not at import

    for formula in FORMULAS:
        op = getattr(getattr(torch.ops, NAMESPACE), formula.__name__)
        if op not in flop_registry:
            register_flop_formula(op)(formula)


def _area(shape: Shape) -> int:
    return int(shape[0] * shape[1])
