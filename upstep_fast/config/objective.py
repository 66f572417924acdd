"""Configuration of what UpStep learns: its objective, its gate, and experimental parts of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from upstep_fast.config.base import at_least, fraction, positive
from upstep_fast.config.flat import flag
from upstep_fast.errors import ConfigError

Rule = Literal["none", "prev", "ema", "median", "quantile", "views", "random", "alternate"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Clustering (SwAV) or VICReg, center-vector regularization (CVR) and distillation."""

    loss: Literal["clustering", "vicreg"] = field(default="clustering", metadata=flag("objective"))
    """What is learned besides the penalty on the center: clustering against prototypes, or variance, invariance and
    covariance of the embeddings (vicreg)."""
    layout: Literal["symmetric", "asymmetric"] = "symmetric"
    """symmetric: both views learn. asymmetric: one view makes targets without gradient, the other one learns."""
    head: Literal["mlp", "linear", "none"] = "mlp"
    """Projection head, discarded after training: mlp or none. Experimental: linear."""
    head_hidden: int = 1024
    """Width of the MLP head's hidden layer."""
    head_dim: int = 128
    """Dimension of the embeddings that are clustered."""
    prototypes: int = 300
    """Number of prototypes (cluster centers); reduced to the number of images if there are fewer. With --method diet:
    number of classes, which adapt sets to that of the images."""
    prototype_init: Literal["random", "orthogonal", "kmeans", "learned"] = "random"
    """random: fixed, centered random directions; kmeans: k-means of the initial embeddings. Experimental: orthogonal,
    learned."""
    temperature: float = 0.1
    """Temperature of the predicted assignments."""
    epsilon: float = 0.05
    """Entropy regularization of the Sinkhorn targets; smaller is harder."""
    sinkhorn_iterations: int = 3
    """Sinkhorn-Knopp iterations that balance the targets; a smaller epsilon needs more."""
    sharpen: float = 1.0
    """Exponent of the targets; above 1 they are harder."""
    cvr: Literal["off", "sq", "norm", "anchor", "hinge", "ema"] = "sq"
    """Penalty on the batch's center vector: sq (its squared norm), anchor (its distance from the base model's center)
    or off. Experimental: norm, hinge, ema."""
    cvr_weight: float = 1.0
    """Weight of the center-vector penalty."""
    distil: Literal["off", "feature", "relational"] = "off"
    """Distillation from the base model: feature (cosine distance) or relational (similarities within the batch)."""
    distil_weight: float = 0.3
    """Weight of the distillation loss."""
    distil_temperature: float = 0.1
    """Temperature of relational distillation's similarities."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for name in ("head_hidden", "head_dim", "sinkhorn_iterations"):
            at_least(self, name, 1)
        at_least(self, "prototypes", 2)
        for name in ("temperature", "epsilon", "distil_temperature", "sharpen"):
            positive(self, name)
        if self.epsilon < 0.01:
            raise ConfigError(f"epsilon: got {self.epsilon}, must be at least 0.01 (below it fp32 targets break down)")
        for name in ("cvr_weight", "distil_weight"):
            at_least(self, name, 0)


@dataclass(frozen=True)
class GateConfig:
    """The rule that decides which steps update the adapter."""

    rule: Rule = field(default="quantile", metadata=flag("gate"))
    """Rule that decides which steps do a backward pass: none (all), or, known ahead so that a skipped step costs
    nothing, random or alternate. Experimental, as none has beaten random: quantile (UpStep's), ema, prev, median,
    views."""
    update_when: Literal["low", "high"] = "low"
    """Train on steps whose center length is lower (or higher) than the gate's reference."""
    rate: float = field(default=0.5, metadata=flag("gate_rate"))
    """Fraction of steps that update, for quantile, random and alternate."""
    beta: float = field(default=0.9, metadata=flag("gate_beta"))
    """Decay of the ema rule's reference."""
    max_skips: int = 16
    """Largest number of skipped steps in a row."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "max_skips", 1)
        for name in ("rate", "beta"):
            fraction(self, name)


@dataclass(frozen=True)
class ExperimentalConfig:
    """Parts of UpStep that have brought no gain in our measurements (bench/results/quality.md)."""

    queue: int = 0
    """Length of SwAV's feature queue, for small batches; 0: off."""
    base_targets: float = 0.0
    """Fraction of the run, from its start, in which targets of the base model are blended in; 0: off."""
    adapter_ema: float = 0.0
    """Save an exponential moving average of the adapter (decay; 0 = off)."""
    gate_statistic: Literal["center", "loss", "disagreement"] = "center"
    """Statistic that the gate compares: center length, clustering loss, or distance between an image's two views."""
    gate_unit: Literal["step", "image"] = "step"
    """Unit that the gate skips: steps, or images of each batch (layout asymmetric; gate quantile or random)."""
    cvr_on: Literal["head", "features"] = "head"
    """Mean that CVR penalizes: of the head's unit embeddings, or of the backbone's unit features (cvr sq or norm)."""
    strength_first: float | Literal["auto"] | None = None
    """Strength of the first block's adapter, interpolated linearly to --strength at the last block. Default:
    --strength for all blocks."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        if not 0 <= self.adapter_ema < 1:
            raise ConfigError(f"adapter_ema: got {self.adapter_ema}, must be at least 0 and below 1")
        at_least(self, "queue", 0)
        fraction(self, "base_targets")
        if self.strength_first != "auto":
            at_least(self, "strength_first", 0)
