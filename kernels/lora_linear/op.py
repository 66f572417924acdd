"""A frozen linear layer with a low-rank adapter.

    S = drop(x) A^T                      [M, R]
    Y = x W^T + b + scale * S B^T        [M, N]

    M tokens, K in, N out, R rank. `rows` adapts ranges of the rows of a fused W only: T separate adapters of
    rank r = R/T, A stacked [T r, K], B compact [sum of the ranges, r]: no zeros of a block-diagonal B.

Backward, with W frozen (G = dY):
    dS = scale * G B        dB = scale * G^T S        dA = dS^T drop(x)        dX = G W + drop'(dS A)

Saved for backward: x and S (2 R bytes a token in 16 bit). Dropout saves no mask: it is a hash of (seed, row,
column), the same on every device and in every strategy.

Strategies of the forward, with the bytes they move beyond the frozen GEMM:
    split    the GEMM, then an in-place product of the low-rank part: Y once more in and out
    wide_k   one GEMM over K+R, [x, S] [W, scale B]^T: x and W copied once
    merged   W + scale B A, rounded once to the grid of W (the adapter with it), then the bare GEMM: W once
    triton   triton.py: S in the same K loop, the low-rank product in the epilogue: nothing

The default is the library's `split`; on a GPU the fastest by measurement runs. `triton` is measured where the library
has no rival to it: with dropout (its forms hash in int64, tensor by tensor, and write drop(x) out), in the adapter's
gradients (dS and dB from one read of dY, where the library reads it twice) and in fp8 (in fp16, and on GPUs of compute
capability 8.9, the library has no row-wise product). Without dropout it loses to `wide_k` (397 us to 321 us on an H200
at ViT-L/14's qkv in bf16), and runs only if asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import autocast_dtype
from .._dispatch import NAMESPACE, record, requested
from .._transforms import is_transformed
from . import eager, triton
from .args import STRATEGIES, LoraArgs, flat, pairs, seed_tensor, validate
from .eager import drop
from .strategy import run, shape_class

T = TypeVar("T")


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = 0,
    rows: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Compute the specification of `lora_linear` (its arguments) in fp32 or wider; differentiable in every tensor."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w, a, b = weight.to(wide), lora_a.to(wide), lora_b.to(wide)
    b_NR = b if rows is None else _block_diagonal(b, rows, weight.shape[0])
    s = drop(x.to(wide), dropout, seed) @ a.mT
    y = F.linear(x.to(wide), w, None if bias is None else bias.to(wide))
    return (y + scale * (s @ b_NR.mT)).to(x.dtype)


def _block_diagonal(b: Tensor, rows: Sequence[tuple[int, int]], num_rows: int) -> Tensor:
    r = b.shape[1]
    dense = b.new_zeros(num_rows, len(rows) * r)
    first = 0
    for t, (start, stop) in enumerate(rows):
        dense[start:stop, t * r : (t + 1) * r] = b[first : first + stop - start]
        first += stop - start
    return dense


def _forward_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraArgs, save_s: bool
) -> tuple[Tensor, Tensor]:
    y = lora_linear_reference(
        x, weight, bias, lora.a, lora.b, lora.scale, dropout=lora.dropout, seed=lora.seed, rows=pairs(lora.rows)
    )
    return y, drop(x, lora.dropout, lora.seed) @ lora.a.T if save_s else x.new_empty(0, lora.a.shape[0])


def _in_fp32(form: Callable[..., T]) -> Callable[..., T]:
    """Return `form` of arguments widened to fp32 or wider."""

    def widened(arg: Any) -> Any:
        if isinstance(arg, LoraArgs):
            return arg.to(torch.promote_types(arg.a.dtype, torch.float32))
        is_real = isinstance(arg, Tensor) and arg.is_floating_point()
        return arg.to(torch.promote_types(arg.dtype, torch.float32)) if is_real else arg

    return lambda *args: form(*map(widened, args))


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "split": eager.forward_split,
    "wide_k": eager.forward_wide_k,
    "triton": triton.forward,
    "merged": eager.forward_merged,
    "reference": _forward_reference,
}
_ADAPTER: dict[str, Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]] = {
    "split": eager.adapter_split,
    "triton": triton.adapter,
    "reference": _in_fp32(eager.adapter_split),
}
INPUT: dict[str, Callable[..., Tensor]] = {
    "split": eager.input_split,
    "triton": triton.input_gradient,
    "merged": eager.input_merged,
    "reference": _in_fp32(eager.input_split),
}


def gradients(
    grad: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora: LoraArgs,
    K: int,
    strategy: str,
    needs: Sequence[bool],
    input_gradient: Callable[[Tensor, LoraArgs, str], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dX, dA, dB), in the dtypes of grad, lora.a and lora.b; empty where not in `needs` (x, a, b).

    input_gradient: (dS, adapter in the dtype of grad, shape class) -> dX [M, K].
    """
    need_x, need_a, need_b = needs
    if grad.shape[0] == 0:
        return (
            grad.new_empty((0, K) if need_x else 0),
            lora.a.new_zeros(lora.a.shape if need_a else 0),
            lora.b.new_zeros(lora.b.shape if need_b else 0),
        )
    with torch.autocast(grad.device.type, enabled=False):
        cast = lora.to(grad.dtype)
        shape = shape_class(grad.shape[0], grad.shape[1], K, cast, grad.dtype)
        ds, da, db = run("lora_linear_adapter", _ADAPTER, (grad, x, s, cast, needs), cast, strategy, shape)
        # zero-size stand-ins: an op returns tensors
        dx = grad.new_empty(0)
        if need_x:
            assert ds is not None
            dx = input_gradient(ds, cast, shape).to(grad.dtype)
        return (
            dx,
            lora.a.new_empty(0) if da is None else da.to(lora.a.dtype),
            lora.b.new_empty(0) if db is None else db.to(lora.b.dtype),
        )


@torch.library.custom_op(f"{NAMESPACE}::lora_linear", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, rows: Sequence[int], save_s: bool, strategy: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y [M, N], S [M, R]); S is empty unless `save_s`."""
    (M, K), N = x.shape, weight.shape[0]
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, lora_a.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        lora = LoraArgs(lora_a, lora_b, scale, dropout, seed, rows).to(x.dtype)
        shape = shape_class(M, N, K, lora, x.dtype)
        return run("lora_linear", _FORWARD, (x, weight, bias, lora, save_s), lora, strategy, shape)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, rows: Sequence[int], save_s: bool, strategy: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    M = x.shape[0]
    return x.new_empty(M, weight.shape[0]), x.new_empty(M if save_s else 0, lora_a.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::lora_linear_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, s: Tensor, scale: float,
    dropout: float, seed: Tensor | None, rows: Sequence[int], strategy: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dX, dA, dB); those not in `needs` (x, lora_a, lora_b) are empty."""

    def input_gradient(ds: Tensor, lora: LoraArgs, shape: str) -> Tensor:
        return run("lora_linear_input", INPUT, (grad, weight, ds, lora), lora, strategy, shape)

    lora = LoraArgs(lora_a, lora_b, scale, dropout, seed, rows)
    return gradients(grad, x, s, lora, weight.shape[1], strategy, needs, input_gradient)


@_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, s: Tensor, scale: float,
    dropout: float, seed: Tensor | None, rows: Sequence[int], strategy: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_a, need_b = needs
    return (
        grad.new_empty((grad.shape[0], weight.shape[1]) if need_x else 0),
        lora_a.new_empty(lora_a.shape if need_a else 0),
        lora_b.new_empty(lora_b.shape if need_b else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, lora_a, lora_b, ctx.scale, ctx.dropout, seed, ctx.rows, _, strategy = inputs
    needs = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if needs[3] else None, weight, lora_a, lora_b, output[1], seed)
    request = requested()  # what is requested of the forward holds for its backward, whenever that runs
    ctx.strategy = request if strategy not in STRATEGIES and request in STRATEGIES else strategy


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    x, weight, lora_a, lora_b, s, seed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    dx, da, db = _backward_op(
        grad, x, weight, lora_a, lora_b, s, ctx.scale, ctx.dropout, seed, ctx.rows, ctx.strategy, needs
    )
    dx, da, db = (d if need else None for d, need in zip((dx, da, db), needs, strict=True))
    return dx, None, None, da, db, None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _with_trained_weight(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraArgs, strategy: str | None
) -> Tensor:
    if is_transformed("lora_linear", x, weight, bias, lora.a, lora.b):
        return _composed(x, weight, bias, lora)
    if strategy not in (None, "fastest", "reference"):
        raise ValueError(
            f"lora_linear: strategy={strategy!r} wants a frozen weight and bias, got one that requires a gradient;"
            " call requires_grad_(False) on it, or leave strategy out for the reference"
        )
    if not torch.compiler.is_compiling():
        record("lora_linear", x.device, "reference", "weight or bias requires a gradient", fallback=True)
    return _composed(x, weight, bias, lora)


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraArgs) -> Tensor:
    """Compute the reference by torch's own operators, which autograd and torch.func differentiate in any way."""
    with torch.autocast(x.device.type, enabled=False):
        return _forward_reference(x, weight, bias, lora, save_s=False)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    rows: Sequence[tuple[int, int]] | None = None,
    strategy: str | None = None,
) -> Tensor:
    """Compute x W^T + bias + scale * (drop(x) A^T) B^T for a frozen `weight`; gradients reach x, lora_a and lora_b.

    x: [..., K]; weight: [N, K]; bias: [N] or None; all of one dtype (fp16, bf16, fp32, fp64).
    lora_a: [R, K] and lora_b: [N, R], in the dtype of x or in fp32 (then their gradients are fp32 too).
    rows: the T row ranges of `weight` that are adapted, each by its own adapter of rank r, e.g. q and v of a
        fused qkv: ((0, D), (2*D, 3*D)). Then lora_a is [T*r, K], the adapters stacked, and lora_b
        [sum of lengths, r].
    dropout: probability of zeroing an entry of x on its way into the adapter; the mask is a function of row,
        column and `seed` (an int, or an int64 tensor of one element; None: drawn from torch's generator).
    strategy: None: the fastest by measurement of those that keep the adapter's precision (split, wide_k,
        with dropout triton); "fastest": also `merged`, which rounds W + scale B A to the dtype of W; or one of
        STRATEGIES.
    Returns [..., N] in the dtype of x. Under autocast x, weight and bias are cast as for torch's own linear.
    A weight or bias that requires a gradient runs the reference under autograd; another strategy is refused.
    Raises ValueError for arguments that do not fit, RuntimeError for a strategy that cannot run here.
    """
    if x.is_floating_point() and x.dtype != torch.float64 and (dtype := autocast_dtype(x.device)):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    validate("lora_linear", x, weight, bias, lora_a, lora_b, scale, dropout, flat(rows), strategy)
    seed_ = seed_tensor(seed, x.device) if dropout else None
    is_trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if is_trained or is_transformed("lora_linear", x, weight, bias, lora_a, lora_b):
        lora = LoraArgs(lora_a, lora_b, scale, dropout, seed_, flat(rows))
        return _with_trained_weight(x, weight, bias, lora, strategy)
    save_s, x_MK = torch.is_grad_enabled() and lora_b.requires_grad, x.reshape(-1, x.shape[-1])
    settings = float(scale), float(dropout), seed_, flat(rows), save_s, strategy or ""
    return _op(x_MK, weight, bias, lora_a, lora_b, *settings)[0].view(*x.shape[:-1], weight.shape[0])
