"""The configuration of supervised fine-tuning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from upstep_fast.config.adapt import LORA_TARGETS
from upstep_fast.config.base import ModelConfig, _at_least, _fraction, _positive
from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class FinetuneConfig(ModelConfig):
    """Train a classifier on labelled images: train/CLASS/image and test/CLASS/image, or clips of frames or video."""

    out: str = dataclasses.field(kw_only=True)
    """Folder for the model, metrics and configuration."""
    overwrite: bool = False
    """Replace an earlier run in a non-empty --out."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; start from the beginning if there is none."""
    method: Literal["losa", "lora", "linear", "full"] = "losa"
    """What is trained: a side network, LoRA in the backbone, a linear layer on its features, or all of it."""
    adapter: str | None = None
    """Folder of an adapter (OUT/adapter of adapt) that is merged into the model first."""
    json: str | None = None
    """File for the figures: top-1 and balanced accuracy on test/, trainable parameters, seconds, peak bytes."""

    # length and optimisation
    epochs: int = 30
    """Most passes over the training images."""
    patience: int = 8
    """Stop after this many epochs without a better held-out accuracy; 0: never. The best epoch's weights are kept."""
    held_out: float = 0.1
    """Fraction of each class of train/ that only chooses the epoch; 0: none, and the last epoch is kept."""
    batch_size: int = 64
    """Images or clips a step; a smaller data set reduces it."""
    lr: float | None = None
    """Peak learning rate, reached after the warm-up; None: losa 3e-3, lora 6e-3, linear 1e-2, full 2e-4."""
    layer_decay: float = 1.0
    """Learning rate of a layer as a fraction of the next one's; 1: all the same."""
    warmup: float = 0.05
    """Warm-up: a fraction of the steps below 1, a number of steps from 1 on."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on matrices."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""

    # regularisation
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    mixup: float = 0.0
    """Alpha of mixup, blends of two images; 0: none."""
    cutmix: float = 0.0
    """Alpha of cutmix, a box of one image in another; 0: none. With both, each batch draws one."""
    drop_path: float = 0.0
    """Largest rate of stochastic depth, at the last block; for lora and full."""

    # views
    preset_views: Literal["natural", "overhead", "microscopy", "document", "none"] = "natural"
    """Random changes of the training images; none: they are prepared as the test images are."""
    crop_min: float | None = None
    """Smallest area of a random crop, as a fraction of the image."""
    crop_max: float | None = None
    """Largest area of a random crop."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    blur: float | None = None
    """Probability of a Gaussian blur."""
    grey: float | None = None
    """Probability of dropping the colour."""
    cache: Literal["off", "memory", "disk"] = "off"
    """Where to keep frozen activations, computed once; for losa and linear with --preset-views none."""
    frames: int | None = None
    """Frames of a clip, for clips: train/CLASS/CLIP/frame or train/CLASS/clip.mp4; None: images."""

    # the side network
    losa_rank: int = 16
    """Rank of the mixing of channels."""
    losa_token_rank: int | None = None
    """Rank of the mixing of tokens; None: that of the channels; 0: tokens are not mixed."""
    losa_combine: Literal["sum", "replace", "gated"] = "sum"
    """How an adaptor joins the backbone's activations and the side network's."""
    losa_order: Literal["channel", "token"] = "channel"
    """Which axis is mixed first."""
    losa_every: int = 1
    """Put an adaptor beside every k-th block, counted from the last."""
    losa_learn_scale: bool = False
    """Learn a factor for each adaptor's change, 1 at the start."""

    # LoRA
    lora_r: int = 8
    """Rank of each adapter."""
    lora_alpha: float | None = None
    """Scale of the adapter is lora_alpha / lora_r; None: lora_r, a scale of 1."""
    lora_targets: tuple[str, ...] = ("q", "v")
    """Which matrices get an adapter: q k v (each its own), qkv (one for all three), proj fc1 fc2."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError naming the field, its value and what is allowed."""
        super().__post_init__()
        for name in ("epochs", "losa_rank", "losa_every", "lora_r"):
            _at_least(self, name, 1)
        _at_least(self, "batch_size", 2)
        _at_least(self, "frames", 2)
        for name in ("num_workers", "patience", "warmup", "weight_decay", "clip", "mixup", "cutmix", "losa_token_rank"):
            _at_least(self, name, 0)
        for name in ("lr", "lora_alpha", "layer_decay"):
            _positive(self, name)
        for name in ("layer_decay", "max_bad_fraction", "flip", "blur", "grey", "crop_min", "crop_max"):
            _fraction(self, name)
        for name, high in (("label_smoothing", 1), ("drop_path", 1), ("held_out", 0.9)):
            if not 0 <= getattr(self, name) < high:
                raise ConfigError(f"{name}: got {getattr(self, name)}, must lie in 0 to below {high}")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite: give one of them, not both")
        if self.crop_min is not None and self.crop_max is not None and self.crop_min > self.crop_max:
            raise ConfigError(f"crop_min: {self.crop_min} is above crop_max {self.crop_max}")
        unknown = [t for t in self.lora_targets if t not in LORA_TARGETS]
        if unknown or not self.lora_targets:
            raise ConfigError(
                f"lora_targets: got {' '.join(self.lora_targets) or 'nothing'}, choose from {' '.join(LORA_TARGETS)}"
            )
        if "qkv" in self.lora_targets and {"q", "k", "v"} & set(self.lora_targets):
            raise ConfigError("lora_targets: qkv is one adapter over q, k and v; do not name q, k or v beside it")
        if self.drop_path and self.method in ("losa", "linear"):
            raise ConfigError(f"drop_path: the backbone of {self.method} does not train; leave it at 0")
        if self.cache != "off":
            if self.method in ("lora", "full"):
                raise ConfigError(f"cache: {self.method} changes the backbone, so nothing can be kept; leave it off")
            if self.preset_views != "none" or self.mixup or self.cutmix:
                raise ConfigError("cache: needs the same images every epoch: --preset-views none, no mixup, no cutmix")
