"""One step: embeddings, gate, and on open steps loss, backward and update. A closed step keeps nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import gate as gates
from .config import AdaptConfig
from .device import Compute
from .methods import Embedded, Method
from .methods.schedules import warmup_cosine as schedule  # noqa: F401  (by the name that its tests know)
from .resume import RunState


def step(state: RunState, images: Any, rule: gates.GateRule, config: AdaptConfig, compute: Compute) -> dict[str, Any]:
    """One step, in place; images: the views that the method made. Returns what metrics.jsonl says of it.

    A step whose centre, loss or gradients are not finite changes no weight, moment or running value.
    """
    method = state.method
    method.schedule(state.optimizer, state.step)
    is_open, learning, target, state.gate = forward(method, images, rule, state.gate, config, compute)
    magnitude = learning.magnitudes[0].item()
    bad = None if math.isfinite(magnitude) else f"the centre's magnitude is {magnitude}"
    if is_open:
        with compute.autocast():
            loss = method.loss(learning, target)
        state.loss = loss.item()
        bad = update(loss, method, state.optimizer, state.scaler, state.received)
        if bad is None:
            method.after_update()
    if math.isfinite(magnitude):
        method.remember(learning)
    row = {
        "step": state.step,
        "loss": state.loss if is_open else None,
        "center": magnitude,
        "open": is_open,
        "lr": state.optimizer.param_groups[0]["lr"],
        "bad": bad,
        **(method.figures() if is_open else {}),
    }
    state.step += 1
    return row


def forward(
    method: Method,
    images: Any,
    rule: gates.GateRule,
    state: gates.GateState,
    config: AdaptConfig,
    compute: Compute,
) -> tuple[bool, Embedded, Embedded | None, gates.GateState]:
    """Embeds the views, asks the gate; returns the decision, what learns, what makes targets, the gate's new state."""
    ahead = gates.known_ahead(rule, state)
    # the only place where the host waits for the device before the decision
    with compute.autocast():
        if config.layout == "asymmetric":
            with torch.no_grad():
                target = method.embed(images[:1])
            is_open, state = gates.decide(rule, state, target.magnitudes.tolist())
            if not is_open:
                return False, target, None, state
            return True, method.embed(images[1:]), target, state
        with torch.set_grad_enabled(ahead is not False):
            learning = method.embed(images)
        is_open, state = gates.decide(rule, state, learning.magnitudes.tolist())
    if not is_open:  # nothing kept for a backward pass outlives the decision
        learning = learning.detach()
    return is_open, learning, None, state


def update(
    loss: Tensor,
    method: Method,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    received: Tensor,
) -> str | None:
    """Backward and one optimizer step, unless the loss or a gradient is not finite. Returns why it was not applied.

    received: [watched] bool, set where what the method watches got a gradient other than 0.
    """
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(loss.item()):
        return f"the loss is {loss.item()}"
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    parts = method.gradient_parts()
    norms = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part, _ in parts]
    finite = math.isfinite(sum(norms, torch.zeros(())).item())
    if finite:
        none = received.new_zeros(())
        received |= torch.stack([none if p.grad is None else p.grad.ne(0).any() for p in method.watched().values()])
        for (part, clip), norm in zip(parts, norms, strict=True):
            if clip:
                torch.nn.utils.clip_grads_with_norm_(part, clip, norm)
    if finite or scaler.is_enabled():
        scaler.step(optimizer)  # under fp16 the scaler itself leaves out a step with non-finite gradients
        scaler.update()
    # under fp16 an overflow is the ordinary way to find the scale, until there is none left to take
    if finite or (scaler.is_enabled() and scaler.get_scale() >= 1):
        return None
    return "a gradient is not finite"
