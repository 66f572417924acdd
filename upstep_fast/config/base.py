"""Fields that several commands share, and the checks of their values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class BackboneConfig:
    """Which model, and how it is built."""

    model: str
    """Pretrained ViT: a timm name, local-dir:PATH, hf-hub:NAME, or a checkpoint file with --arch."""
    arch: str | None = dataclasses.field(default=None, kw_only=True)
    """timm's name of a checkpoint file's architecture; `upstep-fast models` lists them."""
    img_size: int | tuple[int, int] | None = dataclasses.field(default=None, kw_only=True)
    """Input in pixels: the side, or height and width; None: the model's own. Positions are interpolated."""
    in_chans: int | None = dataclasses.field(default=None, kw_only=True)
    """Channels of the images, 1 to 16; None: the model's own. The patch embedding is adapted as timm does."""
    mean: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True)
    """Mean of the channels on a 0..1 scale, one each or one for all; None: the model's own."""
    std: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True)
    """Standard deviation of the channels, likewise."""
    min_matched: float = dataclasses.field(default=0.99, kw_only=True)
    """Smallest share of the model's tensors that a checkpoint file must fill."""

    def __post_init__(self) -> None:
        """Check every field; raises ConfigError."""
        for side in (self.img_size,) if isinstance(self.img_size, int) else self.img_size or ():
            if side < 1:
                raise ConfigError(f"img_size: got {side}, must be at least 1")
        if self.in_chans is not None and not 1 <= self.in_chans <= 16:
            raise ConfigError(f"in_chans: got {self.in_chans}, must lie in 1 to 16")
        if any(value <= 0 for value in self.std or ()):
            raise ConfigError(f"std: got {' '.join(map(str, self.std or ()))}, every value must be above 0")
        _fraction(self, "min_matched")


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """Fields that every command with a model and images has."""

    data: tuple[str, ...]
    """Images: folders (searched recursively, no labels needed), .tar files, text lists, or hf:NAME."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "fp8"] = "auto"
    """auto: bf16 where the device is fast in it, fp16 with loss scaling on older GPUs, else fp32. fp8 (by choice only):
    frozen weights in fp8, the rest in bf16."""
    implementation: Literal["auto", "reference", "triton", "cuda"] = "auto"
    """Kernels to use; auto: the fastest that runs here."""
    num_workers: int | None = None
    """Threads that read and decode images; None: one a core, at most 16."""
    max_bad_fraction: float = 0.01
    """Unreadable images are skipped and listed; above this fraction the run stops (exit 3)."""
    seed: int = 0
    """Seed of the views, the order of images, the adapter's start, the head and the prototypes."""
    debug: bool = False
    """Show tracebacks instead of one-line errors."""


def _at_least(config: Any, name: str, low: float) -> None:
    value = getattr(config, name)
    if value is not None and not value >= low:
        raise ConfigError(f"{name}: got {value}, must be at least {low}")


def _positive(config: Any, name: str) -> None:
    value = getattr(config, name)
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}: got {value}, must be above 0 and finite")


def _fraction(config: Any, name: str) -> None:
    value = getattr(config, name)
    if value is not None and not 0 <= value <= 1:
        raise ConfigError(f"{name}: got {value}, must lie in 0 to 1")
