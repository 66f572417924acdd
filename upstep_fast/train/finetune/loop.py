"""The training loop of fine-tuning: steps, held-out accuracy after each epoch, metrics and checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.errors import Interrupted, RunFailedError
from upstep_fast.report.metrics import Metrics
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.progress import track
from upstep_fast.runtime.signals import signals
from upstep_fast.train.failures import MAX_BAD_STEPS
from upstep_fast.train.finetune import state as finetune_state
from upstep_fast.train.finetune.state import State
from upstep_fast.train.finetune.step import make_logits, make_mixup, predict, top1, train_step
from upstep_fast.train.identity import Identity

log = logging.getLogger("upstep_fast")

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # step -> batches (x, y [B]) from that step on, without end
InOrder = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # every held-out (x, y [B]) once


def train(
    state: State,
    learn: Batches,
    choose: InOrder,
    config: FinetuneConfig,
    compute: Compute,
    skipped: SkippedImages,
    out: Path,
    identity: Identity,
    metrics: Metrics,
) -> None:
    """Train in place to the last epoch, or until --patience epochs in a row were no better. Raises UpstepError.

    skipped: images that `learn` could not read. Writes rows to `metrics` and checkpoints to `out`.
    """
    per_epoch = identity.data["images"] // config.optimization.batch_size
    num_steps, logits = config.optimization.epochs * per_epoch, make_logits(state.model, config)
    mix = make_mixup(config, state.model.head.out_features)  # type: ignore[union-attr,arg-type]
    batches = learn(state.step)
    with (
        signals() as requests,
        track("finetune", num_steps, "steps", state.step, compute.device.type) as task,
    ):
        while state.step < num_steps and not _has_stopped(state, config):
            began = time.monotonic()
            row = train_step(state, *next(batches), logits, mix, config, compute, num_steps)
            task.advance()
            ends_epoch = state.step % per_epoch == 0
            if ends_epoch:
                _end_epoch(state, row, config, lambda: top1(*predict(state.model, choose(), compute, logits)))
            state.seconds += time.monotonic() - began
            stop, save = requests.poll()
            with output.writing(out):
                metrics.write(row)
                if ends_epoch or stop or save:
                    metrics.sync()
                    finetune_state.save(state, out / output.CHECKPOINTS, identity, skipped)
            _raise_if_over(state, row, stop and state.step < num_steps, num_steps)
    if isinstance(batches, Generator):
        batches.close()


def _raise_if_over(state: State, row: dict[str, Any], stop: bool, num_steps: int) -> None:
    if state.bad >= MAX_BAD_STEPS:
        raise RunFailedError(f"step {row['step']}: {row['bad']}, {state.bad} in a row; lower --lr")
    if stop:
        done = f"stopped after {state.step} of {num_steps} steps, all saved"
        raise Interrupted(f"{done}; continue with the same command and --resume")


def _has_stopped(state: State, config: FinetuneConfig) -> bool:
    """Return whether --patience ends the run here, and log it then."""
    run = config.optimization
    if not (run.held_out and run.patience and state.epoch - 1 - state.best_epoch >= run.patience):
        return False
    text = "patience: %d epochs in a row were no better; stopped after epoch %d of %d"
    log.info(text, run.patience, state.epoch, run.epochs)
    return True


def _end_epoch(state: State, row: dict[str, Any], config: FinetuneConfig, accuracy: Callable[[], float]) -> None:
    """Count the epoch, with its held-out accuracy in percent if images are held out, and log it."""
    text = f"loss {row['loss']:.3f}"
    if config.optimization.held_out:
        row["held_out_top1"] = accuracy()
        state.end_epoch(row["held_out_top1"])
        text += f", held-out top-1 {row['held_out_top1']:.1f}, best {state.best:.1f} in epoch {state.best_epoch + 1}"
    else:
        state.epoch += 1
    log.info("epoch %d of %d: %s", state.epoch, config.optimization.epochs, text)
