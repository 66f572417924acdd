"""A frozen linear layer with a low-rank adapter.

    S = drop(x) A^T                      [M, R]
    Y = x W^T + b + scale * S B^T        [M, N]

    M tokens, K in, N out, R rank. `rows` adapts ranges of the rows of a fused W only: T separate adapters of
    rank r = R/T, A stacked [T r, K], B compact [sum of the ranges, r]: no zeros of a block-diagonal B.

Backward, with W frozen (G = dY):
    dS = scale * G B        dB = scale * G^T S        dA = dS^T drop(x)        dX = G W + drop'(dS A)

Kept for backward: x and S (2 R bytes a token in 16 bit). Dropout keeps no mask: it is a hash of (seed, row,
column), the same on every device and in every strategy.

Strategies of the forward, with the bytes they move beyond the frozen GEMM:
    split    the GEMM, then an in-place product of the low-rank part: Y once more in and out
    wide_k   one GEMM over K+R, [x, S] [W, scale B]^T: x and W copied once
    merged   W + scale B A, rounded once to the grid of W (the adapter with it), then the bare GEMM: W once
    triton   lora_linear_triton.py: S in the same K loop, the low-rank product in the epilogue: nothing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import autocast_dtype
from .._autotune import autotune, power_class
from .._dispatch import NAMESPACE, record, requested, triton_unsupported_reason
from . import eager as plain
from . import triton as fused
from .args import STRATEGIES, complaint, flat, seed_tensor
from .eager import drop


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
    """X W^T + bias + scale * (drop(x) A^T) B^T for a frozen `weight`; gradients reach x, lora_a and lora_b.

    x: [..., K]; weight: [N, K]; bias: [N] or None; all of one dtype (fp16, bf16, fp32, fp64).
    lora_a: [R, K] and lora_b: [N, R], in the dtype of x or in fp32 (then their gradients are fp32 too).
    rows: the T row ranges of `weight` that are adapted, each by its own adapter of rank r, e.g. q and v of a
        fused qkv: ((0, D), (2*D, 3*D)). Then lora_a is [T*r, K], the adapters stacked, and lora_b
        [sum of lengths, r].
    dropout: probability of zeroing an entry of x on its way into the adapter; the mask is a function of row,
        column and `seed` (an int, or an int64 tensor of one element; None: drawn from torch's generator).
    strategy: None: the fastest by measurement of those that keep the adapter's precision (split, wide_k,
        triton); "fastest": also `merged`, which rounds W + scale B A to the dtype of W; or one of STRATEGIES.
    Returns [..., N] in the dtype of x. Under autocast x, weight and bias are cast as for torch's own linear.
    A weight or bias that requires a gradient is not this op's purpose: such a call runs the reference under
    plain autograd, says so in `report()`, and refuses any other strategy.
    Raises ValueError for arguments that do not fit, RuntimeError for a strategy that cannot run here.
    """
    if x.is_floating_point() and x.dtype != torch.float64 and (dtype := autocast_dtype(x.device)):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if message := complaint(x, weight, bias, lora_a, lora_b, scale, dropout, flat(rows), strategy):
        raise ValueError(f"lora_linear: {message}")
    seed = seed_tensor(seed, x.device) if dropout else None
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _with_trained_weight(x, weight, bias, lora_a, lora_b, scale, dropout, seed, rows, strategy)
    keep = torch.is_grad_enabled() and lora_b.requires_grad
    x_MK, scale, dropout = x.reshape(-1, x.shape[-1]), float(scale), float(dropout)
    y, _ = _op(x_MK, weight, bias, lora_a, lora_b, scale, dropout, seed, flat(rows), keep, strategy or "")
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    rows: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """The specification, in fp32 or wider: differentiable in every tensor. Arguments as `lora_linear`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w, a, b = weight.to(wide), lora_a.to(wide), lora_b.to(wide)
    b_NR = b if rows is None else _block_diagonal(b, rows, weight.shape[0])
    s = drop(x.to(wide), dropout, seed) @ a.mT
    y = F.linear(x.to(wide), w, None if bias is None else bias.to(wide))
    return (y + scale * (s @ b_NR.mT)).to(x.dtype)


def _block_diagonal(b: Tensor, rows: Sequence[tuple[int, int]], num_rows: int) -> Tensor:
    r = b.shape[1]
    dense = b.new_zeros(num_rows, len(rows) * r)
    taken = 0
    for t, (start, stop) in enumerate(rows):
        dense[start:stop, t * r : (t + 1) * r] = b[taken : taken + stop - start]
        taken += stop - start
    return dense


def _forward_reference(x, weight, bias, a, b, scale, dropout, seed, rows, keep):
    pairs = list(zip(rows[::2], rows[1::2], strict=True)) or None
    y = lora_linear_reference(x, weight, bias, a, b, scale, dropout=dropout, seed=seed, rows=pairs)
    return y, drop(x, dropout, seed) @ a.T if keep else x.new_empty(0, a.shape[0])


def _in_fp32(way):
    def widened(*args):
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) if _is_real(t) else t for t in args]
        return way(*wide)

    return widened


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


_FORWARD = {
    "split": plain.forward_split,
    "wide_k": plain.forward_wide_k,
    "triton": fused.forward,
    "merged": plain.forward_merged,
    "reference": _forward_reference,
}

_ADAPTER = {"split": plain.adapter_split, "triton": fused.adapter, "reference": _in_fp32(plain.adapter_split)}
INPUT = {
    "split": plain.input_split,
    "triton": fused.input_gradient,
    "merged": plain.input_merged,
    "reference": _in_fp32(plain.input_split),
}


def run(op, ways, strategy, shape, device, dropout, args):
    """Run `op` by the strategy named, asked for in the environment, or measured; notes which."""
    if not strategy or strategy == "fastest":
        named = requested() if requested() in ways else None
    else:
        # wide_k and merged name forms of the forward; where a part has no such form, split is its plain one
        named = strategy if strategy in ways else "split"
    no_triton = _no_triton([t for t in args if _is_real(t)])
    if named == "triton" and no_triton:
        raise RuntimeError(f"{op}: strategy 'triton' was requested but cannot run: {no_triton}")
    if named or device.type != "cuda":
        why = "requested" if named else "preferred: nothing is measured off a GPU"
        return ways[record(op, device, named or "split", why)](*args)
    barred = {"reference"} | ({"triton"} if no_triton else set())
    barred |= set() if strategy == "fastest" else {"merged"}
    barred |= {"merged", "wide_k"} if dropout else set()
    problem = f"{op} {shape} {'fastest' if strategy else ''}".rstrip()
    candidates = {name: lambda way=way: way(*args) for name, way in ways.items() if name not in barred}
    name, why = autotune(problem, device, candidates)
    return ways[record(problem, device, name, why)](*args)


def _no_triton(tensors: list[Tensor]) -> str | None:
    dtypes = {t.dtype for t in tensors}
    if torch.float64 in dtypes:
        return "float64 has no Triton form"
    if torch.float8_e4m3fn in dtypes and tensors[0].is_cuda:
        capability = torch.cuda.get_device_capability(tensors[0].device)
        if capability < (8, 9):
            return f"fp8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    return triton_unsupported_reason(*tensors)


def shape_class(M: int, N: int, K: int, r: int, rows: Sequence[int], dtype: torch.dtype, dropout: float) -> str:
    """The name of a problem to `autotune`: sizes of M within a power of two share a choice."""
    kind = str(dtype).removeprefix("torch.") + (" dropout" if dropout else "")
    return f"{kind} M{power_class(M)} K{K} N{N} r{r}" + (f" rows{'-'.join(map(str, rows))}" if rows else "")


def gradients(args, K: int, shape: str, input_gradient: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dA, dB), empty where not needed; input_gradient: (dS, a, b) -> dX. args: those of lora_linear_backward."""
    grad, x, lora_a, lora_b, s, scale, dropout, seed, rows, strategy, needs = args
    need_x, need_a, need_b = needs
    if grad.shape[0] == 0:
        return (
            grad.new_empty((0, K) if need_x else 0),
            lora_a.new_zeros(lora_a.shape if need_a else 0),
            lora_b.new_zeros(lora_b.shape if need_b else 0),
        )
    with torch.autocast(grad.device.type, enabled=False):
        a, b = lora_a.to(grad.dtype), lora_b.to(grad.dtype)
        args = (grad, x, a, b, s, scale, dropout, seed, rows, needs)
        ds, da, db = run("lora_linear_adapter", _ADAPTER, strategy, shape, grad.device, dropout, args)
        # zero-size stand-ins: an op returns tensors
        return (
            input_gradient(ds, a, b).to(grad.dtype) if need_x else grad.new_empty(0),
            lora_a.new_empty(0) if da is None else da.to(lora_a.dtype),
            lora_b.new_empty(0) if db is None else db.to(lora_b.dtype),
        )


@torch.library.custom_op(f"{NAMESPACE}::lora_linear", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, rows: Sequence[int], keep: bool, strategy: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y [M, N], S [M, R]); S is empty unless `keep`."""
    (M, K), N = x.shape, weight.shape[0]
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, lora_a.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        shape = shape_class(M, N, K, b.shape[1], rows, x.dtype, dropout)
        args = (x, weight, bias, a, b, scale, dropout, seed, rows, keep)
        return run("lora_linear", _FORWARD, strategy, shape, x.device, dropout, args)


@_op.register_fake
def _(x, weight, bias, lora_a, lora_b, scale, dropout, seed, rows, keep, strategy):
    M = x.shape[0]
    return x.new_empty(M, weight.shape[0]), x.new_empty(M if keep else 0, lora_a.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::lora_linear_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, s: Tensor, scale: float,
    dropout: float, seed: Tensor | None, rows: Sequence[int], strategy: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dX, dA, dB); those not in `needs` (x, lora_a, lora_b) are empty."""
    shape = shape_class(*grad.shape, weight.shape[1], lora_b.shape[1], rows, grad.dtype, dropout)

    def input_gradient(ds: Tensor, a: Tensor, b: Tensor) -> Tensor:
        args = (grad, weight, ds, a, b, scale, dropout, seed, rows)
        return run("lora_linear_input", INPUT, strategy, shape, grad.device, dropout, args)

    args = (grad, x, lora_a, lora_b, s, scale, dropout, seed, rows, strategy, needs)
    return gradients(args, weight.shape[1], shape, input_gradient)


@_backward_op.register_fake
def _(grad, x, weight, lora_a, lora_b, s, scale, dropout, seed, rows, strategy, needs):
    need_x, need_a, need_b = needs
    return (
        grad.new_empty((grad.shape[0], weight.shape[1]) if need_x else 0),
        lora_a.new_empty(lora_a.shape if need_a else 0),
        lora_b.new_empty(lora_b.shape if need_b else 0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, ctx.scale, ctx.dropout, seed, ctx.rows, _, strategy = inputs
    needs = ctx.needs_input_grad
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if needs[3] else None, weight, lora_a, lora_b, output[1], seed)
    # read here: `forced` does not reach the threads that run backward on a GPU
    ctx.strategy = strategy if strategy in STRATEGIES else (requested() if requested() in STRATEGIES else strategy)


def _backward(ctx, grad, _):
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


def _with_trained_weight(x, weight, bias, lora_a, lora_b, scale, dropout, seed, rows, strategy):
    if strategy not in (None, "fastest", "reference"):
        raise ValueError(
            f"lora_linear: strategy={strategy!r} wants a frozen weight and bias, got one that requires a gradient;"
            " call requires_grad_(False) on it, or leave strategy out for the reference"
        )
    if not torch.compiler.is_compiling():
        record("lora_linear", x.device, "reference", "weight or bias requires a gradient", fallback=True)
    with torch.autocast(x.device.type, enabled=False):
        return lora_linear_reference(x, weight, bias, lora_a, lora_b, scale, dropout=dropout, seed=seed, rows=rows)
