"""The passes of a frozen block between its products, on a CPU: norm with residual, and GELU with its derivative.

    norm           total = x + delta;  x_hat = (total - mean) rstd
    its backward   dx = rstd (d - mean d - x_hat mean(d x_hat)) + around
    gelu           g = u P(u), and its derivative dg/du in the memory of u, so that backward is one multiplication

Forms: `cpp` (csrc/rows_cpu.cpp, one pass over the memory with sums in fp32) and the library's ops; the one measured as
faster runs (_fastest_on_cpu.py). `cpp` against the library, [2080, 192] and [2080, 768] for GELU, one thread of an AMD
EPYC (Zen 4), torch 2.14, processor time: norm 1.2 times as fast in fp32 and 1.3 in bf16 with AVX512-BF16, its
backward 1.6 to 2.9; GELU with backward 1.2 to 1.3 in fp32, 2.0 in bf16 with AVX512-BF16 and 2.5 with AVX2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autotune import power_class
from ._dispatch import choose, requested
from ._fastest_on_cpu import fastest_on_cpu
from ._native import native_unsupported_reason
from .layer_norm import eager

APPROXIMATIONS = {"none": 0, "tanh": 1, "quick": 2}
_DTYPES = (torch.float32, torch.bfloat16)
Out = TypeVar("Out")


def norm(x: Tensor, delta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x_hat, total, rstd) of total = x + delta, [..., K], on any device; rstd [..., 1] in fp32 or wider."""
    forms = {"cpp": partial(_norm_cpp, x, delta, eps), "reference": partial(_norm_library, x, delta, eps)}
    return _run("norm", forms, x, delta)


def norm_backward(d: Tensor, x_hat: Tensor, rstd: Tensor, around: Tensor | None) -> Tensor:
    """Return the gradient of x [..., K] from d, that of x_hat, plus `around`, the gradient that bypasses the norm."""
    args = (d, x_hat, rstd, around)
    forms = {"cpp": partial(_norm_backward_cpp, *args), "reference": partial(eager.backward, *args)}
    return _run("norm_backward", forms, d, x_hat, around)


def gelu(u: Tensor, approximate: str, derivative: bool) -> Tensor | None:
    """Return GELU of u [...] where the compiled pass is faster than the library's, forward and backward together.

    approximate: a key of APPROXIMATIONS. derivative: put dg/du into u, else g. Returns None, with u as it was, where
    the library's is faster. Outside autograd.
    """
    forms: dict[str, Callable[[], object]] = {
        "cpp": lambda: _gelu_cpp(u, approximate, torch.empty_like(u)) * u,
        "reference": lambda: _gelu_library(u, approximate),
    }
    if _form("gelu_and_derivative", forms, u) != "cpp":
        return None
    return _gelu_cpp(u, approximate, u if derivative else None)


def unsupported_reason(*tensors: Tensor | None, op: str = "block_norm") -> str | None:
    """Return why the compiled pass `op` cannot take these tensors, or None."""
    present = [t for t in tensors if t is not None]
    first = present[0]
    if any(type(t) is not Tensor for t in present):
        return "tensors without content"
    if first.dtype not in _DTYPES or any(t.dtype != first.dtype for t in present):
        return f"no form for {first.dtype}"
    if not all(t.is_contiguous() for t in present):
        return "needs contiguous tensors"
    return native_unsupported_reason("cpp", first.device, op)


def form_of(op: str, forms: Mapping[str, Callable[[], object]], reason: str | None, rows: Tensor) -> str:
    """Return the name of the form to run: the requested one, or the one measured as faster; nothing is kept.

    forms: "cpp" and "reference". reason: why "cpp" cannot run, or None. rows: [..., K], the largest input.
    """
    if rows.device.type != "cpu" or not rows.numel() or torch.compiler.is_compiling():
        return "reference"
    name = choose(op, rows.device, {"cpp": reason, "reference": None})
    if name == "reference" or requested() == "cpp":
        return name
    kind = str(rows.dtype).removeprefix("torch.")
    problem = f"cpu {op} {kind} M{power_class(rows.numel() // rows.shape[-1])} K{rows.shape[-1]}"
    return fastest_on_cpu(problem, forms)


def _form(op: str, forms: Mapping[str, Callable[[], object]], *tensors: Tensor | None) -> str:
    first = tensors[0]
    assert first is not None
    return form_of(op, forms, unsupported_reason(*tensors), first)


def _run(op: str, forms: Mapping[str, Callable[[], Out]], *tensors: Tensor | None) -> Out:
    return forms[_form(op, forms, *tensors)]()


def _norm_cpp(x: Tensor, delta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x_hat, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    total = None if delta is None else torch.empty_like(x)
    torch.ops.upstep_ops.block_norm(x, delta, eps, total, x_hat, rstd)
    return x_hat, x if total is None else total, rstd


def _norm_library(x: Tensor, delta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x if delta is None else x + delta
    x_hat, rstd = eager.forward(total, eps)
    return x_hat, total, rstd


def _norm_backward_cpp(d: Tensor, x_hat: Tensor, rstd: Tensor, around: Tensor | None) -> Tensor:
    dx = torch.empty_like(d)
    torch.ops.upstep_ops.block_norm_backward(d, x_hat, rstd, around, dx)
    return dx


def _gelu_cpp(u: Tensor, approximate: str, derivative: Tensor | None) -> Tensor:
    g = u if derivative is None else torch.empty_like(u)
    torch.ops.upstep_ops.block_gelu(u, APPROXIMATIONS[approximate], g, derivative)
    return g


def _gelu_library(u: Tensor, approximate: str) -> Tensor:
    """Compute forward and backward, for the measurement."""
    if approximate == "quick":
        s = torch.sigmoid(1.702 * u)
        return u * s * (s + 1.702 * u * s * (1 - s))
    return torch.ops.aten.gelu_backward(F.gelu(u, approximate=approximate), u, approximate=approximate)
