"""One step of fine-tuning, and the accuracy of predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor

from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.errors import DataError
from upstep_fast.methods.schedules import warmup_cosine
from upstep_fast.methods.trainable import trained
from upstep_fast.runtime.device import Compute
from upstep_fast.train.finetune.state import State


def train_step(
    state: State,
    x: Tensor,
    y: Tensor,
    logits: Callable[[Tensor], Tensor],
    mix: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None,
    config: FinetuneConfig,
    compute: Compute,
    steps: int,
) -> dict[str, Any]:
    """Take one step of `steps`, in place. Returns the row of metrics.jsonl.

    x, y: a batch and its classes [B]. mix: from `make_mixup`. A loss or gradient that is not finite changes no weight.
    Random numbers (drop path, mixup) are drawn from (seed, step), so that a resumed run draws equal ones.
    """
    lr = config.optimization.peak_lr
    factor = warmup_cosine(state.step, steps, config.optimization.warmup)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * factor * group["scale"]
    state.model.train()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed((config.runtime.seed << 32) + state.step)
        target = y
        if mix is not None:
            x, target = mix(x, y, state.step)
        with compute.autocast():
            out = logits(x)
        smoothing = config.regularization.label_smoothing if mix is None else 0.0  # timm's mixup smooths by itself
        loss = F.cross_entropy(out.float(), target, label_smoothing=smoothing)
    value = loss.item()
    bad = _update(state, loss, config.optimization.clip) if math.isfinite(value) else f"the loss is {value}"
    state.bad = state.bad + 1 if bad else 0
    row = {"step": state.step, "epoch": state.epoch, "loss": value, "lr": lr * factor, "bad": bad}
    state.step += 1
    return row


def _update(state: State, loss: Tensor, clip: float) -> str | None:
    """Run backward and one step of the optimizer. Returns why no weight was changed, None if they were."""
    scaler, reason = state.scaler, None
    scaler.scale(loss).backward()
    scaler.unscale_(state.optimizer)
    parameters = [p for p in trained(state.model).values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if math.isfinite(norm.item()):
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        scaler.step(state.optimizer)
    elif not scaler.is_enabled() or scaler.get_scale() < 1:  # under fp16 an overflow is how the scale is found
        reason = "a gradient is not finite"
    if scaler.is_enabled():
        scaler.update()
    return reason


def make_logits(model: Any, config: FinetuneConfig) -> Callable[[Tensor], Tensor]:
    """Return the function from a batch (images, or cached frozen activations) to logits [B, K]."""
    return model if config.cache == "off" else model.logits_of


def make_mixup(config: FinetuneConfig, classes: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None:
    """Return timm's Mixup as (x, y, step) -> (x, soft targets [B, K]), drawn from (seed, step); None if it is off."""
    own = config.regularization
    if not own.mixup and not own.cutmix:
        return None
    timms = Mixup(own.mixup, own.cutmix, label_smoothing=own.label_smoothing, num_classes=classes)

    def mix(x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
        caller = np.random.get_state()
        np.random.seed((config.runtime.seed * 1_000_003 + step) % 2**32)  # timm draws from numpy's global generator
        try:
            flat, target = timms(x.flatten(1, -3), y)  # a clip is mixed like an image of T C channels
            return flat.view_as(x), target
        finally:
            np.random.set_state(caller)

    return mix


@torch.no_grad()
def predict(
    model: Any,
    batches: Iterator[tuple[Tensor, Tensor]],
    compute: Compute,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the predicted and the true classes of all batches, [n] int64 on the CPU. Raises DataError if none."""
    model.eval()
    predicted, truth = [], []
    for x, y in batches:
        with compute.autocast():
            predicted.append((logits or model)(x).argmax(-1).cpu())
        truth.append(y.cpu())
    if not truth:
        raise DataError("data: none of the images to measure on could be read")
    return torch.cat(predicted), torch.cat(truth)


def top1(predicted: Tensor, truth: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100.0 * float((predicted == truth).float().mean())


def balanced(predicted: Tensor, truth: Tensor) -> float:
    """Return the mean accuracy of the classes that occur, in percent."""
    return sum(top1(predicted[truth == c], truth[truth == c]) for c in truth.unique()) / len(truth.unique())
