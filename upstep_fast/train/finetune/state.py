"""What a fine-tuning run is between two steps, as a checkpoint holds it (checkpoint.py)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.runtime import checkpoint as checkpoints
from upstep_fast.train.finetune.classifier import trained
from upstep_fast.train.resume import STATE, Identity, check_same, manifest_entries

log = logging.getLogger("upstep_fast")


@dataclass
class State:
    """What changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # the next one
    best: float = -1.0  # held-out accuracy in percent of the best epoch so far
    best_epoch: int = -1
    best_tensors: dict[str, Tensor] = field(default_factory=dict)
    epoch: int = 0  # epochs done
    bad: int = 0  # steps in a row that were not applied
    seconds: float = 0.0  # spent training so far

    def remember(self, accuracy: float) -> None:
        """Take the held-out accuracy of the epoch that has ended; the first of equals is the best."""
        if accuracy > self.best:
            self.best, self.best_epoch = accuracy, self.epoch
            self.best_tensors = {name: p.detach().clone() for name, p in trained(self.model).items()}
        self.epoch += 1


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
    """Put the newest whole checkpoint into a fresh state, in place; says where the run goes on from.

    Raises ConfigError if it belongs to another run, RunFailedError if it cannot be read.
    """
    found = checkpoints.newest(folder)
    if found is None:
        log.warning("resume: no checkpoint in %s; starting from the beginning", folder)
        return
    check_same(found, identity)
    try:
        tensors = safetensors.torch.load(found.files[STATE])
        values = found.manifest["state"]
        for name in _VALUES:
            setattr(state, name, type(getattr(state, name))(values[name]))
        skipped.update(found.manifest["loader"]["skipped"])
        with torch.no_grad():
            for name, parameter in trained(state.model).items():
                parameter.copy_(tensors[f"model.{name}"])
                if f"best.{name}" in tensors:
                    state.best_tensors[name] = tensors[f"best.{name}"].to(parameter.device)
                prefix = f"optimizer.{name}."
                if moments := {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}:
                    state.optimizer.state[parameter] = {k: t.to(parameter.device) for k, t in moments.items()}
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(values["scaler"])
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise RunFailedError(f"resume: {found.path} is no checkpoint of such a run ({error})") from error
    state.step = found.step
    log.info("resume: going on after step %d, from %s", found.step, found.path)


def _tensors(state: State) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained(state.model).items():
        tensors[f"model.{name}"] = parameter
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors | {f"best.{name}": tensor for name, tensor in state.best_tensors.items()}
