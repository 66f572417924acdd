"""Forward-mode AD, the transforms of torch.func, and second derivatives: what the ops have no formulas for.

An op of torch.library without a formula for forward mode does not fail: it drops the tangent, and the derivative is
zero. So every differentiable op asks `is_transformed`, and then computes its reference by torch's own operators, all of
which can be transformed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._dispatch import record

REASON = "inside torch.func or forward-mode AD"


def is_transformed(op: str, *tensors: Tensor | None) -> bool:
    """Return whether a transform of torch.func is active or a tensor has a tangent (recorded for `report()`)."""
    if torch.compiler.is_compiling():
        # dynamo answers the last question wrongly; what it compiles inside grad or vmap fails in torch.library itself
        return _has_tangent(tensors)
    has_tangent = forward_ad._current_level >= 0 and _has_tangent(tensors)
    if not has_tangent and torch._C._functorch.peek_interpreter_stack() is None:
        return False
    device = next(t.device for t in tensors if t is not None)
    record(op, device, "reference", REASON, fallback=True)
    return True


def _has_tangent(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def refuse_second_derivative(op: str) -> None:
    """Raise NotImplementedError in a backward whose own graph is asked for.

    For an op whose backward has only what forward saved outside the graph: torch would take that for constants.
    """
    if torch.is_grad_enabled():  # in backward only with create_graph=True
        raise NotImplementedError(
            f"{op}: its backward has no derivative (create_graph=True); inside torch.func.grad the reference runs, "
            "which has one"
        )
