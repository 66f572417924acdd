"""DIET's configuration: groups shared with UpStep, with other defaults, and those of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import paths
from upstep_fast.config.objective import ExperimentalConfig, GateConfig, ObjectiveConfig
from upstep_fast.config.training import OptimizationConfig
from upstep_fast.config.views import ViewsConfig
from upstep_fast.errors import ConfigError

_SHARED = ("layout", "prototypes")  # of ObjectiveConfig; `config.resolve` sets one class for each image


@dataclass(frozen=True)
class DietLossConfig:
    """DIET's loss: cross-entropy of a linear classifier over the images."""

    label_smoothing: float = 0.3
    """Label smoothing of the cross-entropy, as in DIET-CP's code; DIET, which trains from scratch, has 0.8."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing: got {self.label_smoothing}, must be at least 0 and below 1")


@dataclass(frozen=True)
class DietConfig(AdaptConfig):
    """Adapt a pretrained ViT to unlabeled images with DIET: LoRA learns to tell every image from all others."""

    unused: ClassVar[tuple[str, ...]] = (
        *("preset", "view_uses", "local_views", "local_size", *paths(ExperimentalConfig)),
        *(name for name, path in paths(AdaptConfig).items() if path[0] == "objective" and name not in _SHARED),
    )

    method: Literal["upstep", "explora", "diet"] = "diet"
    """Adaptation method; each has its own defaults."""
    optimization: OptimizationConfig = OptimizationConfig(weight_decay=0.05)
    # prototypes: classes that `plan` counts, which sees no images
    objective: ObjectiveConfig = ObjectiveConfig(head="none", cvr="off", prototype_init="learned", prototypes=1000)
    gate: GateConfig = GateConfig(rule="none")
    views: ViewsConfig = ViewsConfig()
    diet: DietLossConfig = DietLossConfig()
