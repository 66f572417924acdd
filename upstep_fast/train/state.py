"""Training state: what a checkpoint holds, and how it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upstep_fast import methods
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.loading.skipped import SkippedImages
from upstep_fast.errors import ConfigError
from upstep_fast.methods import Method
from upstep_fast.methods.gate import GateState
from upstep_fast.methods.registry import make_optimizer
from upstep_fast.model import backbone as backbones
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute


@dataclass(frozen=True)
class PendingStep:
    """What a step tells once the device has done it."""

    row: dict[str, Any]  # of metrics.jsonl, to be filled in
    numbers: Tensor  # fp32: the centre's magnitude; of open steps also loss, whether all was finite, and figures
    figures: list[str]  # their names
    marks: list[Any]  # of the device's clock: begin, gate, end


@dataclass
class RunState:
    """What changes from step to step. Nothing else may carry over from one step to the next."""

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    got_grad: Tensor  # [watched] bool, whether what must learn ever got a gradient other than 0
    gate: GateState = field(default_factory=GateState)
    step: int = 0  # the next one
    loss: float = math.nan  # of the last open step
    bad: list[dict[str, Any]] = field(default_factory=list)  # steps not applied since the last that was
    skipped: SkippedImages = field(default_factory=SkippedImages)  # bad images met so far; shared with the loader
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of open steps that wait for more, by parameter
    accumulated: int = 0  # of how many
    collapsed: int = 0  # steps in a row whose features told images no longer apart
    pending: PendingStep | None = None  # of the last step; none where a checkpoint is made


@dataclass(frozen=True)
class AdaptResult:
    """Where a finished run's files are and how it went."""

    adapter: Path
    steps: int
    opened: int
    loss: float
    seconds: float


def fresh_state(config: AdaptConfig, compute: Compute, backbone: backbones.Backbone) -> RunState:
    """The state before the first step."""
    if config.memory.cuda_graphs and compute.device.type != "cuda":
        raise ConfigError(f"cuda_graphs: needs a GPU, the device is {compute.device}; leave it out")
    method = methods.build(backbone, config)
    if config.runtime.shard_weights:
        distributed.shard(method.vit, compute.device)
    method = method.to(compute.device)
    if config.runtime.implementation != "reference" and not config.runtime.shard_weights:
        assert config.memory.level != "auto"  # settled before the run began
        method.accelerate(compute.dtype or torch.float32, config.memory.level, compute.fp8)
    return RunState(
        method=method,
        optimizer=make_optimizer(method, config),
        scaler=torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16"),
        got_grad=torch.zeros(len(method.must_receive_grad()), dtype=torch.bool, device=compute.device),
    )
