"""Identity of a run: what must be equal to resume from a checkpoint, and what is reported if it is not.

Configuration, base model and data must be equal. The environment (versions, device, threads, decoder) decides only
whether the resumed run is bit for bit the uninterrupted one; a difference is logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import renamed
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import defaults, flat
from upstep_fast.config.presets import PRESETS
from upstep_fast.data.decode import gpu_jpeg
from upstep_fast.data.decode.fingerprint import decoder_fingerprint
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.kernels import _autotune
from upstep_fast.kernels.views.op import made_by
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.identity import differences, model_identity
from upstep_fast.runtime import distributed
from upstep_fast.runtime.checkpoint import Checkpoint
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.machine import package_version, processor_name
from upstep_fast.version import __version__

log = logging.getLogger("upstep_fast")

# flags that may change between a run and its resume; model and data are compared by content, not by name
_FREE = {
    *("model", "data", "out", "overwrite", "resume", "checkpoint_every", "log_every", "num_workers"),
    *("max_bad_fraction", "device", "debug", "tensorboard", "log_to", "verify_resume", "auto_batch", "rank_timeout"),
    *("memory_check", "report_images", "strength", "strength_first", "keep_checkpoints", "cuda_graphs", "any_base"),
    "whitening",
    "verdict",  # the images that it holds out are not among the run's, which are compared by content
}
# what chooses a CPU's instructions, and so the last bits of its matrix products
_CPU_SETTINGS = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
_LATER = {"processor", *_CPU_SETTINGS}  # checkpoints of earlier versions do not tell
_PER_RANK = {"device", "cpu", "threads", *_LATER}


@dataclass(frozen=True)
class Identity:
    """Run that a checkpoint belongs to and environment in which it was made, as JSON values."""

    config: dict[str, Any]  # by flag
    backbone: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)  # by flag: value for checkpoints older than the flag


def manifest_entries(identity: Identity) -> dict[str, Any]:
    """Return the entries of a checkpoint's manifest that describe the run."""
    return {name: value for name, value in vars(identity).items() if name != "defaults"}


def identify(config: AdaptConfig | FinetuneConfig, compute: Compute, source: Source, backbone: Backbone) -> Identity:
    """Return the identity of this run. backbone: the base model without adapters."""
    device, flags = compute.device, flat(config)
    earlier = PRESETS["upstep"] if type(config) is AdaptConfig else {}  # the defaults of earlier versions
    return Identity(
        config=json.loads(json.dumps(flags)),
        backbone={"name": config.model.name} | model_identity(backbone),
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
            **({"gpu_decoder": gpu_jpeg.decoder_name()} if flags.get("decode") == "cuda" else {}),
            "views": made_by(device),
            **(_cpu() if device.type == "cpu" else {}),
        },
        defaults=json.loads(json.dumps(defaults(type(config)))) | {"intensity": "full"} | earlier,
    )


def agree(identity: Identity) -> None:
    """Raise ConfigError naming the first entry in which a rank differs from rank 0: configuration, files or code."""
    entries = manifest_entries(identity)
    # the index of a rank's GPU, and what does not change the result, may differ
    entries["config"] = {name: value for name, value in identity.config.items() if name != "device"}
    entries["environment"] = {k: v for k, v in identity.environment.items() if k not in _PER_RANK}
    distributed.agree_on(entries | {"code": _code()})


def check_same(checkpoint: Checkpoint, identity: Identity) -> None:
    """Raise ConfigError if `checkpoint` belongs to another run; log a warning if it is from another environment."""
    _validate(checkpoint, identity)
    then = checkpoint.manifest.get("environment")
    then = then if isinstance(then, dict) else {}
    changed = [
        f"{name} was {then.get(name)}, is {value}"
        for name, value in identity.environment.items()
        if then.get(name) != value and (name in then or name not in _LATER)
    ]
    if changed:
        log.warning("resume: not bit for bit the uninterrupted run: %s", "; ".join(changed))


def _validate(checkpoint: Checkpoint, identity: Identity) -> None:
    saved = checkpoint.manifest
    cure = "use what it was made with, or start again with --overwrite"
    try:
        if saved["backbone"]["sha256"] != identity.backbone["sha256"]:
            raise ConfigError(
                f"resume: {checkpoint.path} was made with another model ({saved['backbone']['name']}), "
                f"not {identity.backbone['name']}; {cure}"
            )
        if different := differences(saved["backbone"], identity.backbone):
            raise ConfigError(
                f"resume: {checkpoint.path} was made with another model, of the same weights: "
                f"{'; '.join(different[:5])}; {cure}"
            )
        labels = identity.data.get("labels")  # of finetune; checkpoints of earlier versions do not tell
        if saved["data"]["sha256"] != identity.data["sha256"]:
            raise ConfigError(
                f"resume: the images are not those of {checkpoint.path}: {saved['data']['images']} then, "
                f"{identity.data['images']} now, or other names{', labels' if labels else ''} or sizes; {cure}"
            )
        if saved["data"].get("labels", labels) != labels:
            raise ConfigError(f"resume: the labels are not those of {checkpoint.path}; {cure}")
        # a flag that is newer than the checkpoint had its default
        flags = {name: identity.defaults.get(name) for name in identity.config} | renamed(saved["config"])
        changed = [
            f"{name} was {value}, is {identity.config.get(name)}"
            for name, value in flags.items()
            if name not in _FREE and value != identity.config.get(name)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFailedError(
            f"resume: {checkpoint.path} is no checkpoint of a run ({type(error).__name__}: {error})"
        ) from error
    length = "steps" if "steps" in identity.config else "epochs"  # of adapt, of finetune
    if [text.split()[0] for text in changed] == [length]:  # it alone may change: a run goes on, or ends earlier
        _check_length(checkpoint, length, identity.config[length])
    elif changed:
        raise ConfigError(
            f"resume: {checkpoint.path} was made with another configuration: {'; '.join(changed)}; {cure}"
        )


def _check_length(checkpoint: Checkpoint, length: str, now: object) -> None:
    done = checkpoint.step if length == "steps" else checkpoint.manifest["state"]["epoch"]
    if isinstance(now, int) and isinstance(done, int) and now < done:
        raise ConfigError(f"resume: {checkpoint.path} is {done} {length} long; give at least as many --{length}")


def _cpu() -> dict[str, str | None]:
    return {"processor": processor_name(), **{name: os.environ.get(name) for name in _CPU_SETTINGS}}


def _code() -> str:
    """Return the SHA-256 of this package's source."""
    files = sorted(Path(__file__).parents[1].rglob("*.py")) + sorted(Path(_autotune.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
