"""Configuration of random views, and presets for kinds of images."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from upstep_fast.errors import ConfigError
from upstep_fast.kernels.views import INTERPOLATIONS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViewConfig:
    """Random changes of a view. Probabilities in 0..1; a factor is drawn from [max(0, 1 - value), 1 + value]."""

    size: tuple[int, int] | int = 224  # (H, W) of a view, pixels
    crop_scale: tuple[float, float] = (0.25, 1.0)  # area of the crop, as a fraction of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    interpolation: str = "bilinear"
    flip: float = 0.5
    vertical_flip: float = 0.0
    rotate90: float = 0.0  # probability of a rotation by 90, 180 or 270 degrees; 0.75 makes all four directions equal
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.0  # largest shift, a fraction of the color circle, at most 0.5
    gray: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view
    solarize: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Raise ConfigError naming the field, its value and what is allowed."""
        for name in ("flip", "vertical_flip", "rotate90", "gray", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, must lie in 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, must be at least 0")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"hue: got {self.hue}, must lie in 0 to 0.5")
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "crop_scale" and high > 1):
                raise ConfigError(
                    f"{name}: got {low} to {high}, must be above 0, in order{', at most 1' * (name[5] == 's')}"
                )
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation: got {self.interpolation!r}, must be {' or '.join(INTERPOLATIONS)}")
        if self.rotate90 and self.height != self.width:
            raise ConfigError(f"rotate90: needs square views, got {self.height} x {self.width}; set it to 0")

    @property
    def height(self) -> int:
        """Rows of a view."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def min_side(self) -> int:
        """Least height and width of an image, in pixels, for which no crop is smaller than the view.

        A JPEG of twice that size may be decoded at half of it (`decode(min_side=)`) without enlarging any crop.
        """
        narrow = min(self.crop_ratio[0], 1 / self.crop_ratio[1])
        return math.ceil(max(self.height, self.width) / math.sqrt(self.crop_scale[0] * narrow))

    @property
    def width(self) -> int:
        """Columns of a view."""
        return self.size if isinstance(self.size, int) else self.size[1]


_ANY_DIRECTION = {"vertical_flip": 0.5, "rotate90": 0.75}
PRESETS: dict[str, ViewConfig] = {
    "natural": ViewConfig(),
    # seen from above, no direction is up
    "overhead": ViewConfig(**_ANY_DIRECTION),  # type: ignore[arg-type]
    # stains carry meaning: small changes of color, never gray
    "microscopy": ViewConfig(**_ANY_DIRECTION, brightness=0.2, contrast=0.2, saturation=0.1, hue=0.02, gray=0.0),  # type: ignore[arg-type]
    # text has a direction and an aspect ratio
    "document": ViewConfig(
        crop_scale=(0.5, 1.0), crop_ratio=(0.9, 1.1), flip=0.0, brightness=0.2, contrast=0.2, blur=0.2
    ),
    "none": ViewConfig(
        crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, brightness=0.0, contrast=0.0, saturation=0.0, gray=0.0
    ),
}


def local_config(
    config: ViewConfig, size: tuple[int, int] | int, scale: tuple[float, float] = (0.05, 0.25)
) -> ViewConfig:
    """Return `config` for small local views: another size (pixels) and another range of crop areas.

    scale: area of the crop as a fraction of the image; the default, DINOv2's, ends where global crops begin (0.25).
    """
    return dataclasses.replace(config, size=size, crop_scale=scale)


def view_config(
    preset: str,
    *,
    size: tuple[int, int] | int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_min: float | None = None,
    crop_max: float | None = None,
    **overrides: Any,
) -> ViewConfig:
    """Return a preset's configuration at the model's input size (pixels), mean and std.

    crop_min, crop_max: bounds of `crop_scale`. overrides: other fields of ViewConfig. None keeps the preset's value.
    """
    config = PRESETS[preset]
    low, high = config.crop_scale
    scale = (low if crop_min is None else crop_min, high if crop_max is None else crop_max)
    set_fields = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(config, size=size, mean=mean, std=std, crop_scale=scale, **set_fields)
