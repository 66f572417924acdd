"""State of a run between two steps: what a checkpoint holds, and how it is initialized."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upstep_fast import methods
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.reading import READING
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.errors import ConfigError, UpstepError
from upstep_fast.evaluation.feature_model import FeatureModel, load
from upstep_fast.evaluation.verdict import Verdict
from upstep_fast.methods import Method
from upstep_fast.methods.gate import GateState
from upstep_fast.methods.registry import make_optimizer
from upstep_fast.model import adapter_base
from upstep_fast.model import backbone as backbones
from upstep_fast.report.notebook import result_html
from upstep_fast.report.page import NAME as REPORT
from upstep_fast.runtime import sharding
from upstep_fast.runtime.device import Compute


@dataclass(frozen=True)
class PendingStep:
    """Results of a step that the device has not finished yet."""

    row: dict[str, Any]  # of metrics.jsonl, to be completed
    numbers: Tensor  # fp32: the center's magnitude; of update steps also loss, whether all was finite, and `metrics`
    metrics: list[str]  # names of the method's metrics
    marks: list[Any]  # of the device's clock: begin, gate, end


@dataclass(frozen=True)
class Plan:
    """Where the schedule of `planned` steps is: at `position` in step `step`, and at its end in step `end`."""

    planned: int
    step: int
    position: float
    end: int

    @classmethod
    def of(cls, num_steps: int, step: int) -> Plan:
        """Return the plan of a run of so many steps that has taken `step` of them."""
        return cls(num_steps, step, float(step), num_steps)

    def at(self, step: int) -> float:
        """Return the position of a step."""
        return self.position + (step - self.step) * (self.planned - self.position) / max(1, self.end - self.step)

    def ending(self, step: int, end: int) -> Plan:
        """Return the plan that goes on from `step` and ends at `end`."""
        return Plan(self.planned, step, min(float(self.planned), self.at(step)), end)


@dataclass
class RunState:
    """Everything that changes from step to step. Nothing else may carry over from one step to the next."""

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    got_grad: Tensor  # [n] bool by `must_receive_grad`: a gradient other than 0 has arrived
    gate: GateState = field(default_factory=GateState)
    step: int = 0  # number of steps taken
    loss: float = math.nan  # of the last update step
    bad: list[dict[str, Any]] = field(default_factory=list)  # steps not applied since the last update
    skipped: SkippedImages = field(default_factory=SkippedImages)  # unreadable images so far; shared with the loader
    gradients: dict[str, Tensor] = field(default_factory=dict)  # accumulated, by parameter
    accumulated: int = 0  # update steps in `gradients`
    collapsed: int = 0  # steps in a row with collapsed features
    plan: Plan | None = None  # of --budget
    pending: PendingStep | None = None  # the previous step; None where a checkpoint is made

    @property
    def position(self) -> float:
        """The step of the configuration's schedule that comes next: the number of steps, unless --budget moved it."""
        return self.step if self.plan is None else self.plan.at(self.step)

    def end(self, num_steps: int) -> int:
        """Return the number of steps at which the run ends. num_steps: of its configuration."""
        return num_steps if self.plan is None else self.plan.end


@dataclass(frozen=True)
class AdaptResult:
    """Result of a finished run; in a notebook it shows the verdict, the outcome and the next lines.

    adapter: its folder. steps, opened: steps taken, and those with an update. loss: of the last update. seconds: of the
    training. verdict: better, no measurable change, or None, without labels. measured: the same by the labels of the
    held-out images. An adapter that is worse raises AdapterRefusedError, which has the verdict.
    """

    adapter: Path
    steps: int
    opened: int  # update steps
    loss: float  # of the last update step
    seconds: float
    verdict: Verdict | None = None  # without labels; None: see the log
    measured: Verdict | None = None  # by the labels of the held-out images, if they have labels

    @property
    def report(self) -> Path:
        """The run's report.html."""
        return self.adapter.parent / REPORT

    def model(self, **options: Any) -> FeatureModel:
        """Return the adapted model, for features in memory: whitened ones appended if the run's folder has a whitening.

        options: as for `upstep_fast.load`, such as whiten=False. Raises ConfigError.
        """
        return load(self.adapter.parent, **options)

    def explore(self, **options: Any) -> Any:
        """Return a local page to look through the run's images: see `upstep_fast.explore`. Raises UpstepError."""
        from upstep_fast.explorer.open import explore

        return explore(self.adapter.parent, **options)

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows; None, for the plain repr, if the run's folder cannot be read any more."""
        try:
            verdicts = [f"{v.kind}: {v.text}" for v in (self.verdict, self.measured) if v is not None]
            return result_html(self.adapter.parent, verdicts)
        except (UpstepError, OSError):
            return None


def fresh_state(config: AdaptConfig, compute: Compute, backbone: backbones.Backbone) -> RunState:
    """Return the state before the first step, on the device. `backbone` becomes the method's, in place.

    Raises ConfigError for --cuda-graphs without a GPU.
    """
    if config.memory.cuda_graphs and compute.device.type != "cuda":
        raise ConfigError(f"cuda_graphs: needs a GPU, the device is {compute.device}; leave it out")
    if compute.device.type == "mps" and config.experimental.adapter_ema:
        raise ConfigError("adapter_ema: counts in float64, which an Apple GPU lacks; leave it out, or use --device cpu")
    base_record = adapter_base.record(backbone.vit)
    reading = {name: getattr(config.data, name) for name in READING}
    model_record = adapter_base.model_record(backbone, config.model, reading)
    method = methods.build(backbone, config)
    method.base_record, method.model_record = base_record, model_record
    if config.runtime.shard_weights:
        sharding.shard(method.vit, compute.device)
    method = method.to(compute.device)
    if config.runtime.implementation != "reference" and not config.runtime.shard_weights:
        assert config.memory.level != "auto"  # `memory.fit.settle` has chosen one
        method.accelerate(compute.dtype or torch.float32, config.memory.level, compute.fp8)
    return RunState(
        method=method,
        optimizer=make_optimizer(method, config),
        scaler=torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16"),
        got_grad=torch.zeros(len(method.must_receive_grad()), dtype=torch.bool, device=compute.device),
    )
