"""What a run is between two steps, as a checkpoint holds it, and what must be the same to go on from one.

A step is a pure function of the run's state, the configuration, the base model and the images: the order of images,
their views, the start and a random gate are all drawn from (seed, step or index), so no state of a random generator
is kept. A resumed run is bit for bit the unbroken one on the same machine, with the same versions, kernels and number
of threads; where one of these differs it goes on all the same, and says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import renamed
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import defaults, flat
from upstep_fast.data.decode import gpu_jpeg
from upstep_fast.data.decode.image import decoder_fingerprint
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.kernels import _autotune
from upstep_fast.kernels import _dispatch as dispatch
from upstep_fast.kernels.views.op import made_by
from upstep_fast.methods.gate import GateState
from upstep_fast.runtime import checkpoint as checkpoints
from upstep_fast.runtime import distributed
from upstep_fast.runtime.checkpoint import Checkpoint
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.machine import package_version
from upstep_fast.train.state import RunState
from upstep_fast.version import __version__

log = logging.getLogger("upstep_fast")

STATE = "state.safetensors"
_SOMETIMES = ("optimizer.", "gradients.")  # parts of the state that are not there from the start
# these may change between a run and its resume; model and data are compared by what they hold, not by their names
_FREE = {
    *("model", "data", "out", "overwrite", "resume", "checkpoint_every", "log_every", "num_workers"),
    *("max_bad_fraction", "device", "debug", "tensorboard", "verify_resume", "auto_batch", "rank_timeout"),
    *("memory_check", "report_images", "strength", "strength_first", "keep_checkpoints", "cuda_graphs"),
}


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to, and where it was made; as JSON can hold it."""

    config: dict[str, Any]
    backbone: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)  # of config: what a field was before it existed


def manifest_entries(identity: Identity) -> dict[str, Any]:
    """What a checkpoint holds of it."""
    return {name: value for name, value in vars(identity).items() if name != "defaults"}


def identify(config: AdaptConfig | FinetuneConfig, compute: Compute, source: Source, backbone_sha256: str) -> Identity:
    """The identity of this run; backbone_sha256: the base model's fingerprint before it has adapters."""
    device = compute.device
    return Identity(
        config=json.loads(json.dumps(flat(config))),
        backbone={"name": config.model.name, "sha256": backbone_sha256},
        data={"images": len(source), "sha256": source.fingerprint()},
        environment={
            "upstep_fast": __version__,
            "torch": torch.__version__,
            "triton": package_version("triton"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "precision": compute.precision,
            "ranks": distributed.size(),
            "decoder": decoder_fingerprint(),
            **({"gpu_decoder": gpu_jpeg.decoder_name()} if getattr(config.data, "decode", "cpu") == "cuda" else {}),
            "views": made_by(device),
        },
        defaults=_defaults(config),
    )


def agree(identity: Identity) -> None:
    """Raise ConfigError naming the first thing in which a rank is not as rank 0: configuration, files, code."""
    found = manifest_entries(identity)
    # the number of the GPU, and what does not touch the result
    found["config"] = {name: value for name, value in identity.config.items() if name != "device"}
    found["environment"] = {k: v for k, v in identity.environment.items() if k not in ("device", "cpu", "threads")}
    distributed.agree_on(found | {"code": _code()})


def broadcast_tuned() -> None:
    """Every rank computes from now on as rank 0 has measured to be fastest."""
    if distributed.size() > 1 and (pins := distributed.gather(_autotune.tuned())[0]):
        _autotune.set_tuned(pins)


def resume_from(state: RunState, folder: Path, identity: Identity) -> None:
    """Put the newest whole checkpoint in `folder` into a fresh state, in place; says where the run goes on from.

    Raises as `checkpoint.newest` and `restore` do.
    """
    found = checkpoints.newest(folder)
    distributed.agree_on({"checkpoint": found and {"step": found.step, "files": found.manifest["files"]}})
    if found is None:
        log.warning("resume: no checkpoint in %s; starting from the beginning", folder)
        return
    restore(state, found, identity)
    log.info("resume: going on after step %d of %d, from %s", found.step, identity.config["steps"], found.path)


def save(state: RunState, folder: Path, identity: Identity, writer: checkpoints.Writer) -> None:
    """Copy `state` and has it written while the run goes on. Raises OSError if the save before failed."""
    writer.save(folder, state.step, copied(state), manifest(state, identity))


def copied(state: RunState) -> Callable[[], dict[str, bytes]]:
    """Copy the state to the host. The function returned makes the checkpoint's files of the copy, at any time later:
    the adapter as PEFT reads it, and every tensor of the state."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in _tensors(state).items()}
    adapter = state.method.result_files()
    return lambda: {**adapter, STATE: safetensors.torch.save(tensors)}


def manifest(state: RunState, identity: Identity) -> dict[str, Any]:
    """What the checkpoint says beside its tensors."""
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
    }


def restore(state: RunState, checkpoint: Checkpoint, identity: Identity) -> None:
    """Put the state of `checkpoint` into a fresh one of the same configuration, in place.

    Raises ConfigError if it belongs to another model, data or configuration, RunFailedError if it cannot be read;
    nothing is changed then.
    """
    check_same(checkpoint, identity)
    wanted = _tensors(state)
    for name, parameter in state.method.named_parameters():
        if parameter.requires_grad:
            wanted |= {f"optimizer.{name}.{key}": tensor for key, tensor in _moments(parameter).items()}
            wanted |= {f"gradients.{name}.sum": parameter}
    try:
        found = safetensors.torch.load(checkpoint.files[STATE])
        values, loader = checkpoint.manifest["state"], checkpoint.manifest["loader"]
        gate = GateState.from_dict(values["gate"])
        skipped = {str(name): str(reason) for name, reason in loader["skipped"].items()}
        loss, bad = math.nan if values["loss"] is None else float(values["loss"]), list(values["bad"])
        scaler, pins = dict(values["scaler"]), dict(checkpoint.manifest["pins"])
        accumulated, passes = int(values.get("accumulated", 0)), int(values.get("passes", 1))
        collapsed = int(values.get("collapsed", 0))
        if loader["step"] != checkpoint.step or gate.step != checkpoint.step:
            raise ValueError("its parts are of different steps")
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise RunFailedError(
            f"resume: {checkpoint.path} is no checkpoint of a run ({type(error).__name__}: {error})"
        ) from error
    # AdamW has moments of the parameters that it has moved: of each all or none
    moved = {name.rpartition(".")[0] for name in found}
    wrong = [
        f"{name} is not in it"
        for name in wanted
        if name not in found and (not name.startswith(_SOMETIMES) or name.rpartition(".")[0] in moved)
    ]
    wrong += [f"{name} is unknown" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        have, want = ((list(t.shape), t.dtype) for t in (found[name], wanted[name]))
        if have != want:
            wrong.append(f"{name} is {have[0]} {have[1]}, wanted {want[0]} {want[1]}")
    if wrong:
        raise ConfigError(f"resume: {checkpoint.path} does not fit this run: {'; '.join(sorted(wrong)[:5])}")
    with torch.no_grad():
        for name, tensor in _tensors(state).items():
            tensor.copy_(found[name])
    for name, parameter in state.method.named_parameters():
        prefix = f"optimizer.{name}."
        if moments := {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}:
            state.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
        if (waiting := found.get(f"gradients.{name}.sum")) is not None:
            state.gradients[name] = waiting.to(parameter.device)
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(scaler)
    if pins:
        _autotune.set_tuned(pins)
    state.gate, state.step, state.loss, state.bad = gate, checkpoint.step, loss, bad
    state.accumulated, state.method.num_microbatches, state.collapsed = accumulated, passes, collapsed
    state.skipped.update(skipped)


def differences(a: RunState, b: RunState) -> list[str]:
    """In what two states differ, bit for bit: names of tensors and numbers."""
    ours, theirs = ({k: t.detach().cpu().numpy().tobytes() for k, t in _tensors(s).items()} for s in (a, b))
    found = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return found + [name for name, value in _numbers(a).items() if repr(value) != repr(_numbers(b)[name])]


def _tensors(state: RunState) -> dict[str, Tensor]:
    method = state.method
    tensors = {f"method.{name}": tensor for name, tensor in method.state_tensors().items()}
    for name, parameter in method.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    waiting = {f"gradients.{name}.sum": tensor for name, tensor in state.gradients.items()}
    return tensors | waiting | {"received": state.got_grad}


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    # what AdamW keeps of a parameter once it has moved it
    return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}


def check_same(checkpoint: Checkpoint, identity: Identity) -> None:
    """Raise ConfigError if `checkpoint` belongs to another run; warns where it was made in another environment."""
    _refuse_another(checkpoint, identity)
    _name_differences(checkpoint, identity)


def _refuse_another(checkpoint: Checkpoint, identity: Identity) -> None:
    then = checkpoint.manifest
    cure = "use what it was made with, or start again with --overwrite"
    try:
        if then["backbone"]["sha256"] != identity.backbone["sha256"]:
            raise ConfigError(
                f"resume: {checkpoint.path} was made with another model ({then['backbone']['name']}), "
                f"not {identity.backbone['name']}; {cure}"
            )
        if then["data"]["sha256"] != identity.data["sha256"]:
            raise ConfigError(
                f"resume: the images are not those of {checkpoint.path}: {then['data']['images']} then, "
                f"{identity.data['images']} now, or other names or sizes; {cure}"
            )
        # a field that is newer than the checkpoint had its default
        before = {name: identity.defaults.get(name) for name in identity.config} | renamed(then["config"])
        changed = [
            f"{name} was {value}, is {identity.config.get(name)}"
            for name, value in before.items()
            if name not in _FREE and value != identity.config.get(name)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFailedError(
            f"resume: {checkpoint.path} is no checkpoint of a run ({type(error).__name__}: {error})"
        ) from error
    if changed:
        raise ConfigError(
            f"resume: {checkpoint.path} was made with another configuration: {'; '.join(changed)}; {cure}"
        )


def _defaults(config: AdaptConfig | FinetuneConfig) -> dict[str, Any]:
    """The default of each field that has one, as JSON can hold it."""
    return json.loads(json.dumps(defaults(type(config))))


def _name_differences(checkpoint: Checkpoint, identity: Identity) -> None:
    then, now = checkpoint.manifest.get("environment"), identity.environment
    then = then if isinstance(then, dict) else {}
    changed = [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]
    if changed:
        log.warning("resume: not bit for bit the run it goes on from: %s", "; ".join(changed))


def _code() -> str:
    """SHA-256 of this package's source."""
    files = sorted(Path(__file__).parents[1].rglob("*.py")) + sorted(Path(_autotune.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
