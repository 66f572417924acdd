"""Configuration of random views and of LoRA, for adapt and finetune."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from upstep_fast.config.base import at_least, fraction, positive
from upstep_fast.config.flat import flag
from upstep_fast.errors import ConfigError

_NOT_OVERRIDES = ("preset", "uses", "local_views", "local_size")
LORA_TARGETS = ("q", "k", "v", "qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class BasicViewsConfig:
    """A preset of random changes, and the changes that adapt and finetune can set one by one."""

    preset: Literal["natural", "overhead", "microscopy", "document", "none"] = field(
        default="natural", metadata=flag("preset_views")
    )
    """Preset of random changes to each image; the options below override its values."""
    crop_min: float | None = None
    """Smallest area of a random crop, as a fraction of the image. Default: the preset's."""
    crop_max: float | None = None
    """Largest area of a random crop, as a fraction of the image. Default: the preset's."""
    flip: float | None = None
    """Probability of a horizontal flip. Default: the preset's."""
    blur: float | None = None
    """Probability of a Gaussian blur. Default: the preset's."""
    gray: float | None = None
    """Probability of conversion to grayscale. Default: the preset's."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for name in ("crop_min", "crop_max", "flip", "blur", "gray"):
            fraction(self, name)
        if self.crop_min is not None and self.crop_max is not None and self.crop_min > self.crop_max:
            raise ConfigError(f"crop_min: {self.crop_min} is above crop_max {self.crop_max}")

    def overrides(self) -> dict[str, Any]:
        """Return {field: value} of the random changes; None keeps the preset's value."""
        return {name: value for name, value in vars(self).items() if name not in _NOT_OVERRIDES}


@dataclass(frozen=True)
class ViewsConfig(BasicViewsConfig):
    """Random changes that make the views of an image."""

    crop_ratio: tuple[float, float] | None = None
    """Narrowest and widest shape of a random crop, width over height. Default: the preset's."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter that resizes the crops, antialiased. Default: the preset's."""
    vertical_flip: float | None = None
    """Probability of a vertical flip. Default: the preset's."""
    rotate90: float | None = None
    """Probability of a rotation by 90, 180 or 270 degrees; 0.75 makes all four directions equally likely.
    Default: the preset's."""
    brightness: float | None = None
    """Strength of brightness jitter: the factor is drawn from 1 - s to 1 + s; 0: off. Default: the preset's."""
    contrast: float | None = None
    """Strength of contrast jitter: the factor is drawn from 1 - s to 1 + s; 0: off. Default: the preset's."""
    saturation: float | None = None
    """Strength of saturation jitter: the factor is drawn from 1 - s to 1 + s; 0: off. Default: the preset's."""
    hue: float | None = None
    """Largest shift of the hue as a fraction of the color circle, 0 to 0.5. Default: the preset's."""
    solarize: float | None = None
    """Probability of solarization (inverts the bright half of the levels). Default: the preset's."""
    uses: int = field(default=1, metadata=flag("view_uses"))
    """Epochs in which each random view of an image serves, 1 or an even number; blocks without adapters see it once.
    1: new views in every epoch."""
    local_views: int = 0
    """Number of extra small crops; they learn from the two large crops' targets. With --method upstep: experimental."""
    local_size: int | None = None
    """Side of a small crop in pixels. Default: 7/16 of the input, in whole patches."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        for name in ("vertical_flip", "rotate90", "solarize"):
            fraction(self, name)
        for name in ("brightness", "contrast", "saturation", "hue", "local_views"):
            at_least(self, name, 0)
        if self.uses != 1 and (self.uses < 1 or self.uses % 2):
            raise ConfigError(f"view_uses: got {self.uses}, must be 1 or an even number above 0")
        positive(self, "local_size")
        if self.hue is not None and self.hue > 0.5:
            raise ConfigError(f"hue: got {self.hue}, must lie in 0 to 0.5")
        if self.crop_ratio is not None and not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            low, high = self.crop_ratio
            raise ConfigError(f"crop_ratio: got {low} to {high}, must be above 0, in order")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of a model's matrices."""

    r: int = field(default=8, metadata=flag("lora_r"))
    """Rank of each adapter."""
    alpha: float | None = field(default=None, metadata=flag("lora_alpha"))
    """Numerator of the adapter's scale, lora_alpha / lora_r. Default: lora_r, a scale of 1."""
    targets: tuple[str, ...] = field(default=("q", "k", "v"), metadata=flag("lora_targets"))
    """Matrices with an adapter: q k v (one each), qkv (one for all three), proj fc1 fc2."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "r", 1)
        positive(self, "alpha")
        unknown = [t for t in self.targets if t not in LORA_TARGETS]
        if unknown or not self.targets:
            got = " ".join(self.targets) or "nothing"
            raise ConfigError(f"lora_targets: got {got}, choose from {' '.join(LORA_TARGETS)}")
        if len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"lora_targets: {' '.join(self.targets)} names one matrix twice")
        if "qkv" in self.targets and {"q", "k", "v"} & set(self.targets):
            raise ConfigError("lora_targets: qkv is one adapter over q, k and v; do not name q, k or v beside it")


@dataclass(frozen=True)
class AdaptLoraConfig(LoraConfig):
    """Low-rank adapters, or full training in their place."""

    blocks: int | None = field(default=None, metadata=flag("lora_blocks"))
    """Number of last blocks with adapters. Default: the last third with --objective vicreg, else all blocks."""
    tune: Literal["lora", "full"] = "lora"
    """lora: train adapters, the model is frozen. full: train every weight, no adapters (for comparison)."""
    start: str | None = field(default=None, metadata=flag("from_"))
    """Run or adapter to start from: its folder, which names --model, its options and --lora-*. Head and prototypes
    start anew. Default: a fresh adapter."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        at_least(self, "blocks", 1)
