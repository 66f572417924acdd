"""Triton, or a stand-in with which the kernel files can be imported where Triton is not installed.

Windows and CPU-only builds of torch have no Triton. There `triton.jit` returns the function untouched,
nothing can be launched, and `_dispatch` names the reason and runs the reference.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MISSING: str | None = None  # why Triton cannot be used, or None

try:
    import triton
    import triton.language as tl
except ImportError as error:
    MISSING = f"triton is not installed ({error})"

    def _unchanged(function: Any = None, **_: Any) -> Any:
        return function if function is not None else _unchanged

    triton = SimpleNamespace(jit=_unchanged)
    tl = SimpleNamespace(constexpr=lambda value: value)

# The interpreter's tl.dot is wrong on bf16 (triton 3.6 and 3.9): kernels take UPCAST_DOT=INTERPRET as a
# constexpr and widen the operands to fp32 when it is set.
INTERPRET = MISSING is None and os.environ.get("TRITON_INTERPRET") == "1"

MAX_COMPILED = 4096  # launches that `launch` remembers: one for each shape
_NOTHING = contextlib.nullcontext()
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


@triton.jit
def dot(left, right, acc, UPCAST_DOT: tl.constexpr):
    """Compute acc + left right in fp32, in a kernel; fp32 operands are not rounded to tf32."""
    if UPCAST_DOT:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; triton.cdiv, which kernels can call too, takes 8 us on the host."""
    return -(-a // b)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the device of x is the current one; empty where it is already."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(x)


def launch(kernel: Any, programs: int, args: Sequence[Any], **constants: Any) -> None:
    """Launch kernel[(programs,)](*args, **constants), from the second time on without Triton's own lookup of 15 us.

    args: all that are not constexpr. The key has what Triton compiles for, and more: dtype and alignment of tensors,
    numbers themselves with their types (1 == 1.0 == True), names of constants.
    """
    key: list[Any] = [id(kernel), args[0].get_device(), *constants, *constants.values()]
    for value in args:
        if isinstance(value, Tensor):
            key += (value.dtype, value.data_ptr() & 15)
        else:
            key += (type(value), value)
    found = _compiled.get(tuple(key))
    if found is not None:
        compiled, rest = found
        compiled[programs, 1, 1](*args, *rest)
        return
    compiled = kernel[(programs,)](*args, **constants)
    if compiled is not None:  # the interpreter compiles nothing
        if len(_compiled) >= MAX_COMPILED:
            _compiled.clear()
        _compiled[tuple(key)] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]


def pointers(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Return `tensors` for a launch, with `stand_in`, which the kernel does not read, for each None."""
    return [stand_in if t is None else t for t in tensors]


__all__ = ["INTERPRET", "MISSING", "cdiv", "launch", "on_device_of", "pointers", "tl", "triton"]
