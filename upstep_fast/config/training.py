"""Configuration of the training loop: optimization, memory, checkpoints, validation and output."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from upstep_fast.config.base import DataConfig, OutputConfig, RuntimeConfig, at_least, positive
from upstep_fast.config.flat import flag
from upstep_fast.errors import ConfigError

TRACKERS = {"tensorboard": "report", "wandb": "loggers", "mlflow": "loggers"}  # package: extra that installs it


@dataclass(frozen=True)
class AdaptDataConfig(DataConfig):
    """The images, how they are read, and what is measured of them before a run."""

    mean_std: Literal["given", "auto"] = "given"
    """auto: measure --mean and --std on a sample of the images; given: these options, or the model's own."""
    decode: Literal["cpu", "cuda"] = "cpu"
    """cuda: decode JPEGs on the GPU (nvJPEG); pixels differ slightly from the CPU's, truncated files may pass."""
    triage: bool = False
    """Check all images first: leave out copies and blank ones, list near-duplicates and outliers in skipped.csv."""


@dataclass(frozen=True)
class AdaptRuntimeConfig(RuntimeConfig):
    """The device, its precision and kernels, the seed, and several processes."""

    shard_weights: bool = False
    """Under torchrun: shard the frozen weights over the GPUs (FSDP2), for models too large for one; slower."""
    rank_timeout: float = 15.0
    """Seconds after which a process that waits for another ends the run (from the second step on)."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        positive(self, "rank_timeout")


def checked_trackers(given: Iterable[str]) -> tuple[str, ...]:
    """Return the names of trackers, each once; a,b,c is one value to the command line. Raises ConfigError."""
    names = tuple(dict.fromkeys(name for text in given for name in text.split(",") if name))
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"log_to: got {name!r}, choose from {' '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log_to: {name} is not installed; pip install 'upstep_fast[{TRACKERS[name]}]'")
    return names


@dataclass(frozen=True)
class AdaptOutputConfig(OutputConfig):
    """The folder of a run and what is logged."""

    log_every: int = 10
    """Steps between two log lines when the console is not a terminal."""
    tensorboard: bool = False
    """The same as --log-to tensorboard."""
    log_to: tuple[str, ...] = ()
    """Also send every number of metrics.jsonl to tensorboard (events in --out), wandb or mlflow, one or several."""
    report_images: bool = True
    """Compute features of 512 images with the base and the adapted model at the end, for the plots in report.html."""
    whitening: Literal["auto", "off"] = "auto"
    """Fit a whitening to at most 2,048 of the training images at the end, for embed; at most 5 % of the run's work."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        at_least(self, "log_every", 1)
        object.__setattr__(self, "log_to", checked_trackers(self.log_to))
        checked_trackers(self.trackers)  # --tensorboard too

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers that the run logs to, each once."""
        return tuple(dict.fromkeys((*self.log_to, *(["tensorboard"] if self.tensorboard else []))))


@dataclass(frozen=True)
class OptimizationConfig:
    """Length of a run, batch and optimizer."""

    batch_size: int = 256
    """Images per step over all devices; reduced to the number of images if there are fewer."""
    steps: int | None = None
    """Number of steps. Default: 10 epochs, or 400 steps if more, but at most 30 epochs. Steps the gate skips count."""
    epochs: float | None = None
    """Number of epochs, in place of --steps."""
    budget: str | None = None
    """Time for the whole command, 90s, 10min or 2h, in place of --steps: as many steps as fit, learning rate 0 at the
    end; adapters in the last third of the blocks if few fit."""
    accumulate: int = 1
    """Update steps per optimizer step (gradient accumulation), each with its own gate decision and targets."""
    lr: float = 1e-3
    """Peak learning rate of adapter and head, reached after the warm-up."""
    warmup: float = 0.05
    """Length of the warm-up: below 1 a fraction of the steps, from 1 on a number of steps."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine falls to 0 over the steps; constant suits runs that are made longer."""
    weight_decay: float = 0.0
    """AdamW's weight decay of the head; adapters have none."""
    clip: float = 1.0
    """Largest norm of the adapters' gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "batch_size", 2)
        for name in ("steps", "accumulate"):
            at_least(self, name, 1)
        for name in ("epochs", "lr"):
            positive(self, name)
        for name in ("warmup", "weight_decay", "clip"):
            at_least(self, name, 0)
        if self.budget is not None:
            parse_seconds(self.budget)
        for one, other in itertools.combinations(("steps", "epochs", "budget"), 2):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ConfigError(f"{one} and {other}: give one of them, not both")

    @property
    def num_steps(self) -> int:
        """Number of steps of a resolved configuration. Raises ValueError before `config.resolve.resolve`."""
        if self.steps is None:
            raise ValueError("steps: not resolved yet; they depend on the number of images")
        return self.steps


@dataclass(frozen=True)
class MemoryConfig:
    """What a step keeps in memory."""

    level: Literal["fast", "balanced", "lean", "auto"] = field(default="fast", metadata=flag("memory"))
    """Activations kept for backward: all (fast), all but qkv (balanced), each block's input only (lean). auto: the
    fastest level that fits in free memory."""
    check: bool = field(default=True, metadata=flag("memory_check"))
    """Refuse to start a run that does not fit in free memory; --no-memory-check starts it anyway."""
    auto_batch: bool = False
    """On out of memory, retry with the batch split into micro-batches (GradCache). Same result; update steps run the
    forward twice."""
    cuda_graphs: bool = False
    """Run the backbone's forward and backward as CUDA graphs. Same result; faster for small models and batches."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        if self.auto_batch and self.cuda_graphs:
            raise ConfigError("cuda_graphs and auto_batch: give one of them, not both")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int | str = field(default=200, metadata=flag("checkpoint_every"))
    """Steps between two checkpoints, or minutes (10min); signals and the last step write one too."""
    keep: int = field(default=2, metadata=flag("keep_checkpoints"))
    """Number of newest checkpoints kept, at least 2, so that one is left if the other is damaged."""
    verify: int = field(default=0, metadata=flag("verify_resume"))
    """Steps to repeat from the first checkpoint and compare bit for bit; exit 1 if they differ; 0: off."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        parse_interval(self.every)
        at_least(self, "keep", 2)
        at_least(self, "verify", 0)


MIN_VERDICT_IMAGES = 16


@dataclass(frozen=True)
class ValidationConfig:
    """Validation on held-out images without labels, and the strength of the adapter that is written."""

    every: int = field(default=0, metadata=flag("judge_every"))
    """Steps between validations on held-out images (a tenth, at most 256); the best adapter is kept; 0: off."""
    patience: int = field(default=4, metadata=flag("judge_patience"))
    """Validations without improvement after which the run stops early; 0: never."""
    strength: float | Literal["auto"] = 1.0
    """Scale of the written adapter relative to the trained one; auto: the best one on --judge-every's images."""
    verdict: int | Literal["auto", "off"] = "auto"
    """Images held out to compare the adapter with the base model at the end, without labels; auto: a tenth, at most 256
    and 5 % of the run's work; off: none."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for name in ("every", "patience"):
            at_least(self, name, 0)
        if self.verdict not in ("auto", "off"):
            at_least(self, "verdict", MIN_VERDICT_IMAGES)
        if self.strength != "auto":
            positive(self, "strength")
        elif not self.every:
            raise ConfigError("strength: auto needs --judge-every, which holds out images to judge it on")


_UNITS = {"min": 60.0, "s": 1.0, "h": 3600.0}
_YEAR = 8760 * 3600.0


def parse_seconds(value: str) -> float:
    """Return a time such as 90s, 10min or 2h in seconds. Raises ConfigError."""
    text = value.strip()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        seconds = float(text.removesuffix(unit)) * _UNITS[unit]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"budget: got {value!r}, must be a time with its unit, above 0: 90s, 10min or 2h")
    if seconds > _YEAR:
        raise ConfigError(f"budget: got {value!r}, must be at most a year, 8760h")
    return seconds


def parse_interval(value: int | str) -> tuple[int, float]:
    """Return `checkpoint_every` as (steps, seconds), of which one is 0. Raises ConfigError."""
    text = str(value).strip()
    number, is_minutes = text.removesuffix("min"), text.endswith("min")
    try:
        interval = (0, 60 * float(number)) if is_minutes else (int(number), 0.0)
    except ValueError:
        interval = (0, 0.0)
    if not 0 < sum(interval) < math.inf:
        raise ConfigError(f"checkpoint_every: got {text!r}, must be steps (200) or minutes (10min), above 0")
    return interval
