"""Groups of fields that several commands share, and the checks of their values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from upstep_fast.config.flat import flag, flag_of
from upstep_fast.config.reading import NONE, Intensity, Reading, check_axes, parse_bands, parse_intensity, parse_tiles
from upstep_fast.errors import ConfigError

DEMO = "demo"  # name of the small model included in the package, whatever folder of that name there is


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained model and how it is built."""

    name: str = field(metadata=flag("model"))
    """Pretrained ViT: a timm name, local-dir:PATH, hf-hub:NAME, a checkpoint file with --arch, or demo (included)."""
    arch: str | None = None
    """timm's name of a checkpoint file's architecture; `upstep-fast models` lists them."""
    img_size: int | tuple[int, int] | None = None
    """Input in pixels: the side, or height and width. Default: the model's own. Positions are interpolated."""
    in_chans: int | None = None
    """Channels of the images, 1 to 16. Default: the model's own. The patch embedding is adapted as in timm."""
    mean: tuple[float, ...] | None = None
    """Mean of the channels on a 0..1 scale, one per channel or one for all. Default: the model's own."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the channels on a 0..1 scale, one per channel or one for all. Default: the model's own."""
    min_matched: float = 0.99
    """Smallest fraction of the model's tensors that a checkpoint file must fill."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for side in (self.img_size,) if isinstance(self.img_size, int) else self.img_size or ():
            if side < 1:
                raise ConfigError(f"img_size: got {side}, must be at least 1")
        if self.in_chans is not None and not 1 <= self.in_chans <= 16:
            raise ConfigError(f"in_chans: got {self.in_chans}, must lie in 1 to 16")
        if any(value <= 0 for value in self.std or ()):
            raise ConfigError(f"std: got {' '.join(map(str, self.std or ()))}, every value must be above 0")
        fraction(self, "min_matched")


@dataclass(frozen=True)
class DataConfig:
    """The images and how they are read."""

    paths: tuple[str, ...] = field(metadata=flag("data"))
    """Images: folders (searched recursively, no labels needed), .tar files, text lists, hf:NAME, or addresses (s3://...)."""
    image_column: str | None = None
    """Column of the images in a CSV or an hf: data set; in a tar, their suffix after the key (left.jpg)."""
    label_column: str | None = None
    """Column of the classes in a CSV or an hf: data set; in a tar, their suffix after the key. Default: cls."""
    num_workers: int | None = None
    """Threads that read and decode images. Default: one per core, at most 16."""
    max_bad_fraction: float = 0.01
    """Unreadable images are skipped and listed; above this fraction the run stops (exit 3)."""
    intensity: str | None = None
    """Brightness of values beyond 8 bits: auto, full, percentile:LO,HI, window:CENTER,WIDTH or range:LO,HI. Default:
    that of the run, else auto."""
    bands: str | None = None
    """Numbers of the bands to read, from 1 on, in this order: 3,2,1; none: all. Default: those of the run, else all."""
    slice: Literal["auto", "middle", "all", "max"] | None = None
    """Slices, frames and times of a file that are images; max: the brightest values; auto: all, of animations the
    first. Default: that of the run, else auto."""
    axes: str | None = None
    """Meaning of a file's axes where it does not say: TZYX; none: as the file says. Default: that of the run."""
    tiles: str | None = None
    """Read large images in tiles of this side in pixels, with a stride: 224 or 224:112; none: whole pictures. Default:
    those of the run, else none."""
    level: int | Literal["none"] | None = None
    """Level of a pyramid to read, 0: full size; or none. Default: that of the run."""
    mpp: float | Literal["none"] | None = None
    """Micrometers per pixel to read a slide at; or none. Default: that of the run."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "num_workers", 0)
        fraction(self, "max_bad_fraction")
        if self.level != NONE:
            at_least(self, "level", 0)
        if self.mpp != NONE:
            positive(self, "mpp")
        if not {None, NONE} & {self.level, self.mpp}:
            raise ConfigError("level and mpp: give one of them, not both")
        reading_of(self)


def reading_of(config: DataConfig) -> Reading:
    """Return how the images that a command's configuration names are read. Raises ConfigError."""
    names = ("bands", "axes", "tiles", "level", "mpp")
    given = {name: None if (value := getattr(config, name)) == NONE else value for name in names}
    check_axes(given["axes"])
    tile, stride = parse_tiles(given["tiles"])
    return Reading(
        intensity=Intensity() if config.intensity is None else parse_intensity(config.intensity),
        axes=given["axes"],
        slices=config.slice or "auto",
        bands=parse_bands(given["bands"]),
        tile=tile,
        stride=stride,
        level=given["level"],
        mpp=given["mpp"],
    )


@dataclass(frozen=True)
class DebugConfig:
    """Errors in full or in one line."""

    debug: bool = field(default=False, kw_only=True)
    """Show tracebacks instead of one-line errors."""


@dataclass(frozen=True)
class DeviceConfig(DebugConfig):
    """The device to compute on."""

    device: str = field(default="auto", kw_only=True)
    """auto, cpu, cuda, cuda:N or mps (Apple). auto: the CUDA GPU if there is one."""


@dataclass(frozen=True)
class RuntimeConfig(DeviceConfig):
    """The device, its precision and kernels, and the seed."""

    precision: Literal["auto", "fp32", "fp16", "bf16", "fp8"] = "auto"
    """auto: bf16 where the device is fast in it, fp16 with loss scaling on older GPUs, else fp32. fp8 (never chosen by
    auto): frozen weights in fp8, all else in bf16."""
    implementation: Literal["auto", "reference", "triton", "cuda"] = "auto"
    """Kernels to use; auto: the fastest that runs on this machine."""
    seed: int = 0
    """Seed of views, image order and initial weights (adapter, head, prototypes), 0 to 4294967295."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        check_seed(self.seed)


@dataclass(frozen=True)
class OutputConfig:
    """The folder of a run."""

    out: str
    """Folder for results, metrics and configuration."""
    overwrite: bool = False
    """Replace an earlier run in a non-empty --out."""
    resume: bool = False
    """Continue from the newest checkpoint in --out; start from the beginning if there is none."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite: give one of them, not both")


@dataclass(frozen=True)
class ModelConfig:
    """Groups of every command with a model and images."""

    model: BackboneConfig
    data: DataConfig


def at_least(config: Any, name: str, low: float) -> None:
    """Raise ConfigError if field `name` is below `low`; None passes."""
    value = getattr(config, name)
    if value is not None and not value >= low:
        raise ConfigError(f"{flag_of(type(config), name)}: got {value}, must be at least {low}")


def positive(config: Any, name: str) -> None:
    """Raise ConfigError if field `name` is not above 0 and finite; None passes."""
    value = getattr(config, name)
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{flag_of(type(config), name)}: got {value}, must be above 0 and finite")


def fraction(config: Any, name: str) -> None:
    """Raise ConfigError if field `name` lies outside 0 to 1; None passes."""
    value = getattr(config, name)
    if value is not None and not 0 <= value <= 1:
        raise ConfigError(f"{flag_of(type(config), name)}: got {value}, must lie in 0 to 1")


def check_seed(seed: int) -> None:
    """Raise ConfigError if numpy and torch cannot both start a generator from `seed`."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: got {seed}, must lie in 0 to {2**32 - 1}")


def below(config: Any, name: str, high: float) -> None:
    """Raise ConfigError if field `name` is below 0 or not below `high`."""
    value = getattr(config, name)
    if not 0 <= value < high:
        raise ConfigError(f"{flag_of(type(config), name)}: got {value}, must lie in 0 to below {high}")
