"""The backward half of a step: gradients, clipping, accumulation and one step of the optimizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.runtime import distributed
from upstep_fast.train.out_of_memory import OutOfMemoryError, is_out_of_memory
from upstep_fast.train.state import RunState


def update(loss: Tensor, state: RunState, config: AdaptConfig) -> tuple[list[Tensor], bool]:
    """Run backward and one step of the optimizer, in place; the step is skipped where a value is not finite.

    loss: scalar, of this rank; gradients are averaged over the ranks. With --accumulate above 1 the gradients wait in
    `state.gradients` until there are as many. Returns [loss, bool: loss and gradients are finite], scalars on the
    device, and whether the optimizer was called. Raises OutOfMemoryError on every rank if one is out of memory.
    """
    method, optimizer, scaler, accumulate = state.method, state.optimizer, state.scaler, config.optimization.accumulate
    value = _backward(loss, state)
    scaler.unscale_(optimizer)
    parts = method.gradient_parts()
    norms = [_norm(part) for part, _ in parts]
    finite = torch.stack([value, *norms]).isfinite().all()
    state.got_grad |= _has_gradient(list(method.must_receive_grad().values())) & finite
    # only accumulation needs to know now, on the host, whether these gradients count
    is_due = accumulate == 1 or (bool(finite) and _accumulated(state, accumulate))
    if is_due:
        for (part, clip), norm in zip(parts, norms, strict=True):
            if clip:
                torch.nn.utils.clip_grads_with_norm_(part, clip, norm if accumulate == 1 else _norm(part))
        optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]  # as GradScaler sets for AdamW
        optimizer.step()
        method.after_update(finite)
    if scaler.is_enabled():
        scaler.update()
    return [value, finite], is_due


def _backward(loss: Tensor, state: RunState) -> Tensor:
    """Set the gradients of the mean loss over the ranks. Returns that loss."""
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    state.optimizer.zero_grad(set_to_none=True)
    is_short = False
    try:
        state.scaler.scale(loss).backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        is_short = True
    numbers = torch.stack([loss.detach(), loss.new_tensor(float(is_short))])
    value, num_short = distributed.average_gradients(trained, numbers)
    if is_short or (distributed.size() > 1 and num_short.item()):
        raise OutOfMemoryError
    return value


def _has_gradient(parameters: list[nn.Parameter]) -> Tensor:
    """Return for each parameter whether its gradient has an entry other than 0, [n] bool on the device."""
    grads = [p.grad if p.grad is not None else p.new_zeros(1) for p in parameters]
    # the largest magnitudes in one launch for all; ne, so that NaN counts
    return torch.stack(torch._foreach_norm(grads, ord=math.inf)).ne(0)


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _accumulated(state: RunState, accumulate: int) -> bool:
    """Add the gradients to the waiting ones; once there are `accumulate`, set the mean as gradients and return True."""
    for name, p in state.method.named_parameters():
        if p.grad is not None:
            part = p.grad / accumulate
            state.gradients[name] = state.gradients[name].add_(part) if name in state.gradients else part
    state.accumulated += 1
    if state.accumulated < accumulate:
        return False
    for name, p in state.method.named_parameters():
        p.grad = state.gradients.get(name)
    state.gradients, state.accumulated = {}, 0
    return True
