"""Ops without autograd, for code with a backward of its own: a quarter of the host time of a torch.library.custom_op.

The wrappers by which custom_op makes an op differentiable, and its checks of what aliases what, take 30 to 70 us a call
on the host for ops of several tensors. These ops have none of that: called under autograd they give no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._dispatch import NAMESPACE


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the op of `schema`, "name(Tensor x, ...) -> ...", for all devices. Returns its default overload.

    run: computes it; its results are new tensors, or None where not requested, which the op gives as tensors of size 0.
    fake: returns empty results of the same shapes.
    """
    name = schema.split("(")[0]
    torch.library.define(f"{NAMESPACE}::{name}", schema.removeprefix(name))
    torch.library.impl(f"{NAMESPACE}::{name}", "default", filled(run))
    torch.library.register_fake(f"{NAMESPACE}::{name}", filled(fake))
    op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def filled(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with a tensor of size 0 for each None among its results: an op has tensors alone."""

    @functools.wraps(run)
    def with_tensors(x: Tensor, *rest: Any) -> Any:
        results = run(x, *rest)
        return results if isinstance(results, Tensor) else tuple(x.new_empty(0) if t is None else t for t in results)

    return with_tensors


def call(op: Callable[..., Any], run: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """Call `run` itself where nothing observes its `op` of `define`: the dispatcher's way to it takes the host 7 us."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        return op(x, *rest)
    return op(x, *rest) if torch._C._len_torch_dispatch_stack() else run(x, *rest)
