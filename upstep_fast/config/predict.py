"""The configuration of predict."""

from __future__ import annotations

from dataclasses import dataclass, field

from upstep_fast.config.base import DataConfig, RuntimeConfig, at_least
from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class PredictConfig:
    """Classify images by a fine-tuned model; where they have labels, measure it on those it has not learned from."""

    run: str
    """Folder of a run (--out of finetune)."""
    data: DataConfig
    out: str = field(kw_only=True)
    """CSV file to write: path, class, probability. With labels also OUT-classes.csv and OUT-confusion.csv beside it."""
    top: int | None = None
    """Add the column top: this many likeliest classes with their probabilities, as JSON."""
    model: str | None = None
    """New place of the base model, if it was moved since the training."""
    batch_size: int = 64
    """Images per forward pass."""
    overwrite: bool = False
    """Replace --out if it exists."""
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "top", 1)
        at_least(self, "batch_size", 1)
        if not self.out.lower().endswith(".csv"):
            raise ConfigError(f"out: got {self.out}, must end in .csv")
