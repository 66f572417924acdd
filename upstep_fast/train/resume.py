"""Saving and restoring a run's state.

A step is a pure function of the run's state, the configuration, the base model and the images: the order of images,
their views, the initialization and a random gate are drawn from (seed, step or index), so no generator state is saved.
A resumed run equals the uninterrupted one bit for bit on the same machine with the same versions, kernels and number of
threads; if one of these differs, the run continues and the difference is logged (identity.py).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.kernels import _autotune
from upstep_fast.kernels import _dispatch as dispatch
from upstep_fast.methods.gate import GateState
from upstep_fast.methods.schedules import learning_rate
from upstep_fast.runtime import checkpoint as checkpoints
from upstep_fast.runtime import distributed
from upstep_fast.runtime.checkpoint import Checkpoint
from upstep_fast.train.identity import Identity, check_same, manifest_entries
from upstep_fast.train.state import Plan, RunState
from upstep_fast.train.strength import at_given_strength

log = logging.getLogger("upstep_fast")

STATE = "state.safetensors"
_OPTIONAL = ("optimizer.", "gradients.")  # tensors that do not exist from the first step on


def broadcast_tuned() -> None:
    """Set rank 0's autotuned choices on every rank. Collective."""
    if distributed.size() > 1 and (tuned := distributed.gather(_autotune.tuned())[0]):
        _autotune.set_tuned(tuned)


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint, or None after a warning. Collective.

    Raises ConfigError if the ranks do not see equal files.
    """
    newest = checkpoints.newest(folder)
    distributed.agree_on({"checkpoint": newest and {"step": newest.step, "files": newest.manifest["files"]}})
    if newest is None:
        log.warning("resume: no checkpoint in %s; starting from the beginning", folder)
    return newest


def resume_from(state: RunState, folder: Path, identity: Identity) -> None:
    """Restore the newest checkpoint in `folder` into a fresh state, in place, and log it.

    Raises as `find_checkpoint` and `restore` do.
    """
    if (newest := find_checkpoint(folder)) is not None:
        restore(state, newest, identity)
        end = state.end(identity.config["steps"])
        log.info("resume: continuing after step %d of %d, from %s", newest.step, end, newest.path)
        planned = newest.manifest["config"].get("steps")
        if planned not in (None, identity.config["steps"]):
            log.info(
                "steps: %s instead of %s: from step %d on, learning rate and all else that depends on the number of "
                "steps are those of a run of %s steps; learning rate %.3g now",
                *(identity.config["steps"], planned, newest.step, identity.config["steps"]),
                learning_rate(state.method.config.optimization, newest.step),
            )


def save(state: RunState, folder: Path, identity: Identity, writer: checkpoints.Writer) -> None:
    """Copy `state` and write the copy in the background. Raises OSError if the previous save failed."""
    writer.save(folder, state.step, copied(state), manifest(state, identity))


def copied(state: RunState) -> Callable[[], dict[str, bytes]]:
    """Copy the state to the host. Returns a function that makes the checkpoint's files from the copy, at any time.

    The files are the adapter in PEFT's format, at the strength of the configuration, and every tensor of the state.
    """
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in _tensors(state).items()}
    method = state.method
    adapter = at_given_strength(method.result_files(), method.config, len(method.vit.blocks))
    return lambda: {**adapter, STATE: safetensors.torch.save(tensors)}


def manifest(state: RunState, identity: Identity) -> dict[str, Any]:
    """Return the checkpoint's manifest: everything but the tensors."""
    assert state.pending is None, "flush the pending step first"
    return {
        **manifest_entries(identity),
        "state": _numbers(state),
        "loader": {"step": state.step, "skipped": dict(state.skipped)},
        "kernels": [dataclasses.asdict(choice) for choice in dispatch.report()],
        "pins": _autotune.tuned(),
    }


def _numbers(state: RunState) -> dict[str, Any]:
    return {
        "gate": state.gate.to_dict(),
        "scaler": state.scaler.state_dict(),
        "loss": state.loss if math.isfinite(state.loss) else None,
        "bad": list(state.bad),
        "accumulated": state.accumulated,
        "passes": state.method.num_microbatches,
        "collapsed": state.collapsed,
        **({} if state.plan is None else {"plan": dataclasses.astuple(state.plan)}),
    }


def restore(state: RunState, checkpoint: Checkpoint, identity: Identity) -> None:
    """Put the state of `checkpoint` into a fresh one of the same configuration, in place.

    Raises ConfigError if it belongs to another model, data or configuration, RunFailedError if it cannot be read;
    `state` is unchanged then.
    """
    check_same(checkpoint, identity)
    saved = _read(checkpoint)
    wrong = _misfits(state, saved.tensors)
    if state.scaler.is_enabled() and saved.scaler.keys() != state.scaler.state_dict().keys():
        wrong.append(f"the loss scaler has {', '.join(saved.scaler) or 'nothing'}")
    if wrong:
        raise ConfigError(f"resume: {checkpoint.path} does not fit this run: {'; '.join(sorted(wrong)[:5])}")
    with torch.no_grad():
        for name, tensor in _tensors(state).items():
            tensor.copy_(saved.tensors[name])
    restore_moments(state.method.named_parameters(), state.optimizer, saved.tensors)
    for name, parameter in state.method.named_parameters():
        if (gradient := saved.tensors.get(f"gradients.{name}.sum")) is not None:
            state.gradients[name] = gradient.to(parameter.device)
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(saved.scaler)
    if saved.tuned:
        _autotune.set_tuned(saved.tuned)
    state.gate, state.step, state.loss, state.bad = saved.gate, checkpoint.step, saved.loss, saved.bad
    state.accumulated, state.collapsed = saved.accumulated, saved.collapsed
    if saved.plan is not None and saved.plan.planned == identity.config["steps"]:
        state.plan = saved.plan  # else the run has another length now
    state.method.num_microbatches = saved.num_microbatches
    state.skipped.update(saved.skipped)


@dataclass(frozen=True)
class _Saved:
    """Content of a checkpoint; fields as in `RunState`."""

    tensors: dict[str, Tensor]
    gate: GateState
    scaler: dict[str, Any]
    loss: float
    bad: list[dict[str, Any]]
    accumulated: int
    num_microbatches: int
    collapsed: int
    skipped: dict[str, str]
    tuned: dict[str, str]
    plan: Plan | None


def _read(checkpoint: Checkpoint) -> _Saved:
    try:
        values, loader = checkpoint.manifest["state"], checkpoint.manifest["loader"]
        saved = _Saved(
            tensors=safetensors.torch.load(checkpoint.files[STATE]),
            gate=GateState.from_dict(values["gate"]),
            scaler={name: _finite(name, value) for name, value in values["scaler"].items()},
            loss=math.nan if values["loss"] is None else float(values["loss"]),
            bad=[dict(step) for step in values["bad"]],
            accumulated=_count(values, "accumulated", 0),
            num_microbatches=_count(values, "passes", 1),
            collapsed=_count(values, "collapsed", 0),
            skipped={str(name): str(reason) for name, reason in loader["skipped"].items()},
            tuned={str(name): str(choice) for name, choice in checkpoint.manifest["pins"].items()},
            plan=_plan(values.get("plan")),
        )
        if loader["step"] != checkpoint.step or saved.gate.step != checkpoint.step:
            raise ValueError("its parts are of different steps")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SafetensorError) as error:
        raise RunFailedError(
            f"resume: {checkpoint.path} is no checkpoint of a run ({type(error).__name__}: {error})"
        ) from error
    return saved


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return value


def _plan(values: Any) -> Plan | None:
    """Return the plan of --budget that a manifest holds, None if it holds none."""
    if values is None:
        return None
    planned, step, position, end = values
    counts = {"planned": planned, "step": step, "end": end}
    planned, step, end = (_count(counts, name, 0) for name in counts)
    return Plan(planned, step, float(_finite("position", position)), end)


def _count(values: dict[str, Any], name: str, low: int) -> int:
    """Return a count of the manifest, `low` where an earlier version has written none."""
    value = values.get(name, low)
    if type(value) is not int or not low <= value <= 10**6:
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return value


def _misfits(state: RunState, tensors: dict[str, Tensor]) -> list[str]:
    """Return what is missing, unknown or of another shape or dtype in a checkpoint's tensors."""
    expected = _tensors(state)
    for name, parameter in state.method.named_parameters():
        if parameter.requires_grad:
            # AdamW's state of a parameter once it has been updated
            own = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            expected |= {f"optimizer.{name}.{key}": tensor for key, tensor in own.items()}
            expected |= {f"gradients.{name}.sum": parameter}
    # the optional tensors of a parameter are there all or not at all
    present = {name.rpartition(".")[0] for name in tensors}
    wrong = [
        f"{name} is not in it"
        for name in expected
        if name not in tensors and (not name.startswith(_OPTIONAL) or name.rpartition(".")[0] in present)
    ]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        have, want = ((list(t.shape), t.dtype) for t in (tensors[name], expected[name]))
        if have != want:
            wrong.append(f"{name} is {have[0]} {have[1]}, wanted {want[0]} {want[1]}")
    return wrong


def differences(a: RunState, b: RunState) -> list[str]:
    """Return the names of tensors and numbers in which two states differ, bit for bit."""
    ours, theirs = ({k: t.detach().cpu().numpy().tobytes() for k, t in _tensors(s).items()} for s in (a, b))
    tensors = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return tensors + [name for name, value in _numbers(a).items() if repr(value) != repr(_numbers(b)[name])]


def _tensors(state: RunState) -> dict[str, Tensor]:
    method = state.method
    tensors = {f"method.{name}": tensor for name, tensor in method.state_tensors().items()}
    tensors |= moments(method.named_parameters(), state.optimizer)
    tensors |= {f"gradients.{name}.sum": tensor for name, tensor in state.gradients.items()}
    return tensors | {"received": state.got_grad}


def moments(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by `optimizer.PARAMETER.KEY`."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Set the optimizer's state, in place, to the tensors that `moments` returned, where there are any."""
    for name, parameter in parameters:
        prefix = f"optimizer.{name}."
        if own := {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in own.items()}
