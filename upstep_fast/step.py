"""One step: embeddings, gate, and on open steps loss, backward and update. A closed step keeps nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import gate as gates
from .config import AdaptConfig
from .device import Compute
from .methods.upstep import Embedded, UpStep
from .resume import RunState


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine to 0. Skipped steps advance it too.

    warmup: a fraction of `steps` below 1, a number of steps from 1 on.
    """
    rising = warmup * steps if warmup < 1 else warmup
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def step(
    state: RunState, images: Tensor, rule: gates.GateRule, config: AdaptConfig, compute: Compute
) -> dict[str, Any]:
    """One step, in place; images: [2, B, C, H, W], two views. Returns what metrics.jsonl says of it.

    A step whose centre, loss or gradients are not finite changes no weight, moment or running value.
    """
    assert config.steps is not None
    method, lr = state.method, config.lr * schedule(state.step, config.steps, config.warmup)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    is_open, learning, target, state.gate = forward(method, images, rule, state.gate, config, compute)
    magnitude = learning.magnitudes[0].item()
    bad = None if math.isfinite(magnitude) else f"the centre's magnitude is {magnitude}"
    if is_open:
        with compute.autocast():
            loss = method.loss(learning, target)
        state.loss = loss.item()
        bad = update(loss, method, state.optimizer, state.scaler, state.received, config.clip)
    if math.isfinite(magnitude):
        method.remember(learning)
    row = {
        "step": state.step,
        "loss": state.loss if is_open else None,
        "center": magnitude,
        "open": is_open,
        "lr": lr,
        "bad": bad,
    }
    state.step += 1
    return row


def forward(
    method: UpStep,
    images: Tensor,
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
        learning = Embedded(learning.z.detach(), learning.centre.detach(), learning.magnitudes)
    return is_open, learning, None, state


def update(
    loss: Tensor,
    method: UpStep,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    received: Tensor,
    clip: float,
) -> str | None:
    """Backward and one optimizer step, unless the loss or a gradient is not finite. Returns why it was not applied.

    received: [adapters] bool, set where an adapter's B got a gradient other than 0.
    """
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(loss.item()):
        return f"the loss is {loss.item()}"
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    adapters = method.adapter_parameters()
    norm = torch.nn.utils.get_total_norm([p.grad for p in adapters if p.grad is not None])
    others = torch.nn.utils.get_total_norm([p.grad for p in method.other_parameters() if p.grad is not None])
    finite = math.isfinite((norm + others).item())
    if finite:
        received |= torch.stack([a.lora_b.grad.ne(0).any() for a in method.adapters.values()])  # type: ignore[union-attr]
        if clip:
            torch.nn.utils.clip_grads_with_norm_(adapters, clip, norm)
    if finite or scaler.is_enabled():
        scaler.step(optimizer)  # under fp16 the scaler itself leaves out a step with non-finite gradients
        scaler.update()
    # under fp16 an overflow is the ordinary way to find the scale, until there is none left to take
    if finite or (scaler.is_enabled() and scaler.get_scale() >= 1):
        return None
    return "a gradient is not finite"
