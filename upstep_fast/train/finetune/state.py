"""State of a fine-tuning run between two steps, and its checkpoints (runtime/checkpoint.py)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.methods.supervised.baselines import Baseline, parameter_groups
from upstep_fast.methods.supervised.losa import Losa
from upstep_fast.methods.trainable import trained
from upstep_fast.runtime import checkpoint as checkpoints
from upstep_fast.runtime.device import Compute
from upstep_fast.train.identity import Identity, check_same, manifest_entries
from upstep_fast.train.resume import STATE, find_checkpoint, moments, restore_moments

log = logging.getLogger("upstep_fast")


@dataclass
class State:
    """Everything that changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # number of steps taken
    best: float = -1.0  # held-out accuracy of the best epoch so far, percent
    best_epoch: int = -1
    best_tensors: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0  # number of finished epochs
    bad: int = 0  # steps in a row that were not applied
    seconds: float = 0.0  # training time so far

    def end_epoch(self, accuracy: float) -> None:
        """Count the epoch and keep its weights if they are the best; the first of equals is kept.

        accuracy: on held-out images, percent.
        """
        if accuracy > self.best:
            self.best, self.best_epoch = accuracy, self.epoch
            self.best_tensors = {name: p.detach().clone() for name, p in trained(self.model).items()}
        self.epoch += 1


def fresh_state(model: Losa | Baseline, config: FinetuneConfig, compute: Compute) -> State:
    """Return the state before the first step."""
    taps = model.side.taps if isinstance(model, Losa) else ()
    groups = parameter_groups(
        model,
        len(model.vit.blocks),
        weight_decay=config.optimization.weight_decay,
        layer_decay=config.optimization.layer_decay,
        taps=taps,
    )
    optimizer = torch.optim.AdamW(groups, lr=config.optimization.lr or 0.0, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
    return State(model, optimizer, scaler)


_VALUES = ("best", "best_epoch", "epoch", "bad", "seconds")


def save(state: State, folder: Path, identity: Identity, skipped: Mapping[str, str]) -> None:
    """Write a checkpoint. Raises OSError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(state).items()}
    manifest = {
        **manifest_entries(identity),
        "state": {name: getattr(state, name) for name in _VALUES} | {"scaler": state.scaler.state_dict()},
        "loader": {"step": state.step, "skipped": dict(skipped)},
    }
    checkpoints.save(folder, state.step, {STATE: safetensors.torch.save(tensors)}, manifest)


def resume_from(state: State, folder: Path, identity: Identity, skipped: dict[str, str]) -> None:
    """Restore the newest checkpoint in `folder` into a fresh state, in place, and log it.

    skipped: updated with the images that the checkpoint names. Raises ConfigError if the checkpoint belongs to another
    run, RunFailedError if it cannot be read.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        return
    check_same(checkpoint, identity)
    try:
        tensors = safetensors.torch.load(checkpoint.files[STATE])
        values = checkpoint.manifest["state"]
        for name in _VALUES:
            setattr(state, name, type(getattr(state, name))(values[name]))
        skipped.update(checkpoint.manifest["loader"]["skipped"])
        with torch.no_grad():
            for name, parameter in trained(state.model).items():
                parameter.copy_(tensors[f"model.{name}"])
                if f"best.{name}" in tensors:
                    state.best_tensors[name] = tensors[f"best.{name}"].to(parameter.device)
        restore_moments(trained(state.model).items(), state.optimizer, tensors)
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(values["scaler"])
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, SafetensorError) as error:
        raise RunFailedError(f"resume: {checkpoint.path} is no checkpoint of such a run ({error})") from error
    state.step = checkpoint.step
    log.info("resume: continuing after step %d, from %s", checkpoint.step, checkpoint.path)
    planned, epochs = checkpoint.manifest["config"].get("epochs"), identity.config["epochs"]
    if planned != epochs:
        log.info(
            "epochs: %s instead of %s: from here on, the learning rate is that of a run of that length", epochs, planned
        )


def _tensors(state: State) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in trained(state.model).items()}
    tensors |= moments(trained(state.model).items(), state.optimizer)
    return tensors | {f"best.{name}": tensor for name, tensor in state.best_tensors.items()}
