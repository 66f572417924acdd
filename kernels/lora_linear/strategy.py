"""The choice of a strategy: named, requested, or measured as fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .._autotune import autotune, power_class
from .._dispatch import record, requested, triton_unsupported_reason
from .args import LoraArgs

T = TypeVar("T")


def run(
    op: str,
    forms: Mapping[str, Callable[..., T]],
    args: Sequence[Tensor | LoraArgs | bool | Sequence[bool] | None],
    lora: LoraArgs,
    strategy: str,
    shape: str,
) -> T:
    """Run and record `op` by the strategy named, requested (`forced`, the environment), or measured as fastest.

    forms: strategy -> function of args. lora: the adapter among args. shape: from `shape_class`.
    Raises RuntimeError if the strategy named or requested is triton and cannot run.
    """
    tensors = [t for t in (*args, lora.a, lora.b) if isinstance(t, Tensor) and t.is_floating_point()]
    device, no_triton = tensors[0].device, _unsupported_reason(tensors)
    named = _named(strategy, forms)
    if named == "triton" and no_triton:
        raise RuntimeError(f"{op}: strategy 'triton' was requested but cannot run: {no_triton}")
    if named or device.type != "cuda":
        reason = "requested" if named else "preferred; kernels are only timed on a GPU"
        return forms[record(op, device, named or "split", reason)](*args)
    excluded = _not_measured(op, strategy, lora.dropout, no_triton)
    problem = f"{op} {shape} {'fastest' if strategy else ''}".rstrip()
    candidates = {name: partial(form, *args) for name, form in forms.items() if name not in excluded}
    name, reason = autotune(problem, device, candidates)
    return forms[record(problem, device, name, reason)](*args)


def _named(strategy: str, forms: Mapping[str, object]) -> str | None:
    """Return the form that `strategy` names or the user requested; None: free choice."""
    if not strategy or strategy == "fastest":
        request = requested()
        return request if request in forms else None
    # wide_k and merged name forms of the forward; where a part has no such form, split is its plain one
    return strategy if strategy in forms else "split"


# Here the library wins: on an H200 at M 32896, K 1024, N 3072 in bf16 the Triton kernel took 397 us, `wide_k` 321 us.
# With dropout its forms write drop(x) out and read it again.
_LIBRARY = ("lora_linear", "lora_linear_input")


def _not_measured(op: str, strategy: str, dropout: float, no_triton: str | None) -> set[str]:
    excluded = {"reference"} | ({"triton"} if no_triton or (op in _LIBRARY and not dropout) else set())
    excluded |= set() if strategy == "fastest" else {"merged"}
    return excluded | ({"merged", "wide_k"} if dropout else set())


def _unsupported_reason(tensors: Sequence[Tensor]) -> str | None:
    """Return why the Triton form cannot take `tensors`, or None."""
    dtypes = {t.dtype for t in tensors}
    if torch.float64 in dtypes:
        return "float64 has no Triton form"
    if torch.float8_e4m3fn in dtypes and tensors[0].is_cuda:
        capability = torch.cuda.get_device_capability(tensors[0].device)
        if capability < (8, 9):
            return f"fp8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    return triton_unsupported_reason(*tensors)


def shape_class(M: int, N: int, K: int, lora: LoraArgs, dtype: torch.dtype) -> str:
    """Return the name of a problem for `autotune`: sizes of M within a power of two share a choice."""
    kind, r = str(dtype).removeprefix("torch.") + (" dropout" if lora.dropout else ""), lora.b.shape[1]
    rows = f" rows{'-'.join(map(str, lora.rows))}" if lora.rows else ""
    return f"{kind} M{power_class(M)} K{K} N{N} r{r}{rows}"
