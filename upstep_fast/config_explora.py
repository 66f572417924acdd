"""ExPLoRA's configuration: the flags it shares with UpStep, with its own defaults, and those of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import AdaptConfig


@dataclass(frozen=True)
class ExploraConfig(AdaptConfig):
    """Adapt a pretrained ViT to unlabelled images with ExPLoRA: some whole blocks, LoRA on the others, all norms."""

    method: Literal["upstep", "explora"] = "explora"
    """How to adapt; each method has its own defaults."""
    objective: Literal["dinov2", "mae"] = "dinov2"
    """The self-supervised objective, best the one that the model was pretrained with."""
    unfreeze: str = "last"
    """Blocks trained whole: first, last or numbers from 0, joined by commas (first,last)."""
