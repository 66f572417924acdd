"""The configuration of `upstep-fast adapt`: groups of fields; one field = one flag = one line of help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from upstep_fast.config.base import ModelConfig
from upstep_fast.config.flat import defaults, flat, paths
from upstep_fast.config.objective import ExperimentalConfig, GateConfig, ObjectiveConfig
from upstep_fast.config.training import (
    AdaptDataConfig,
    AdaptOutputConfig,
    AdaptRuntimeConfig,
    CheckpointConfig,
    MemoryConfig,
    OptimizationConfig,
    ValidationConfig,
)
from upstep_fast.config.views import AdaptLoraConfig, ViewsConfig
from upstep_fast.errors import ConfigError

# these act on adapters, or need the base model's weights to be frozen
_NOT_WITH_FULL = (
    *("from_", "lora_r", "lora_alpha", "lora_targets", "lora_blocks", "distil", "base_targets", "strength"),
    *("strength_first", "shard_weights"),
)
# prototypes, their targets, and additions to clustering
CLUSTERING = (
    *("prototypes", "prototype_init", "temperature", "epsilon", "sinkhorn_iterations", "sharpen", "distil"),
    *("local_views", *(name for name in paths(ExperimentalConfig) if name != "strength_first")),
)


@dataclass(frozen=True)
class AdaptConfig(ModelConfig):
    """Adapt a pretrained ViT to unlabeled images; writes an adapter in PEFT's format.

    The defaults are the recipe that gained most in our measurements; `--preset upstep` is UpStep's own.
    `--method explora --help` shows ExPLoRA's options, `--method diet` DIET's.
    """

    unused: ClassVar[tuple[str, ...]] = ()  # flags that have no effect with this method and must keep their defaults

    data: AdaptDataConfig
    output: AdaptOutputConfig
    method: Literal["upstep", "explora", "diet"] = "upstep"
    """Adaptation method; each has its own defaults."""
    preset: Literal["upstep", "gentle", "balanced", "strong", "fast"] | None = None
    """Recipe that other options override. Default: none, but upstep with --objective clustering or its options."""
    optimization: OptimizationConfig = OptimizationConfig(batch_size=64, lr=6e-3)
    lora: AdaptLoraConfig = AdaptLoraConfig()
    objective: ObjectiveConfig = ObjectiveConfig(loss="vicreg", cvr="off")
    gate: GateConfig = GateConfig(rule="none")
    views: ViewsConfig = ViewsConfig(crop_min=0.5)
    validation: ValidationConfig = ValidationConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    runtime: AdaptRuntimeConfig = AdaptRuntimeConfig()
    experimental: ExperimentalConfig = ExperimentalConfig()

    def __post_init__(self) -> None:
        """Check what concerns several groups. Raises ConfigError naming the field, its value and what is allowed."""
        own, initial = flat(self), defaults(type(self))
        for name in self.unused:
            if own[name] != initial[name]:
                raise ConfigError(f"{name.rstrip('_')}: belongs to --method upstep; leave it out with {self.method}")
        if self.data.mean_std == "auto" and (self.model.mean or self.model.std):
            raise ConfigError("mean_std: auto measures mean and std; do not give --mean or --std as well")
        self._check_memory()
        self._check_gate()
        self._check_objective()
        if self.views.uses > 1 and self.views.local_views:
            raise ConfigError("view_uses and local_views: give one of them, not both")
        if self.experimental.cvr_on == "features" and self.objective.cvr not in ("sq", "norm"):
            raise ConfigError(f"cvr_on: features needs --cvr sq or norm, got {self.objective.cvr}")
        if self.lora.tune == "full" and self.method != "explora":
            for name in _NOT_WITH_FULL:
                if own[name] != initial[name]:
                    raise ConfigError(f"{name.rstrip('_')}: needs --tune lora; leave it out with full")
        if self.optimization.budget is not None:
            for name in ("judge_every", "verify_resume"):
                if flat(self)[name]:
                    raise ConfigError(f"budget and {name}: give one of them, not both")
        if self.experimental.strength_first == "auto" and not self.validation.every:
            raise ConfigError("strength_first: auto needs --judge-every, which holds out images to judge it on")

    def _check_memory(self) -> None:
        if self.runtime.shard_weights and self.memory.auto_batch:
            raise ConfigError("shard_weights and auto_batch: give one of them, not both")
        if self.method == "explora":
            for name in ("shard_weights", "auto_batch", "cuda_graphs"):
                if flat(self)[name]:
                    raise ConfigError(f"{name}: --method {self.method} cannot; leave it out")
        if self.memory.cuda_graphs:
            for name in ("shard_weights", "local_views"):
                if flat(self)[name]:
                    raise ConfigError(f"cuda_graphs and {name}: give one of them, not both")
            if self.runtime.implementation == "reference":
                raise ConfigError("cuda_graphs: only the engine is captured; leave out --implementation reference")

    def _check_objective(self) -> None:
        if self.learns_by != "vicreg":
            return
        own = flat(self)
        for name in CLUSTERING:
            if own[name] != defaults(AdaptConfig)[name]:
                raise ConfigError(f"{name}: needs --objective clustering; leave it out with vicreg")

    def num_adapted(self, depth: int) -> int:
        """Return the number of last blocks with adapters, of `depth` blocks; with --tune full all train."""
        if self.lora.blocks is not None:
            return self.lora.blocks
        return third(depth) if self.learns_by == "vicreg" and self.lora.tune == "lora" else depth

    @property
    def learns_by(self) -> str:
        """Objective of UpStep's steps, clustering or vicreg; of other methods their name."""
        return self.objective.loss if self.method == "upstep" else self.method

    def _check_gate(self) -> None:
        rule, layout = self.gate.rule, self.objective.layout
        statistic, unit = self.experimental.gate_statistic, self.experimental.gate_unit
        if self.method != "upstep" and rule == "views":
            raise ConfigError(f"gate: views compares UpStep's two views; choose another with {self.method}")
        if layout == "asymmetric" and rule == "views":
            raise ConfigError("gate: views compares two views, which --layout asymmetric does not have before the gate")
        compares = rule in ("prev", "ema", "median", "quantile") and layout == "symmetric"
        if statistic != "center" and not compares:
            raise ConfigError(
                f"gate_statistic: {statistic} needs --gate prev, ema, median or quantile, --layout symmetric"
            )
        if unit == "image" and (layout != "asymmetric" or rule not in ("quantile", "random")):
            raise ConfigError("gate_unit: image needs --layout asymmetric and --gate quantile or random")


def is_upstep(options: Mapping[str, Any]) -> bool:
    """Return whether options are of the method that is the default."""
    return bool(options.get("method", "upstep") == "upstep")


def third(depth: int) -> int:
    """Return a third of so many blocks, rounded up."""
    return -(-depth // 3)
