"""The configuration of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from upstep_fast.config.base import ModelConfig, OutputConfig, RuntimeConfig, at_least, below, fraction, positive
from upstep_fast.config.flat import flag
from upstep_fast.config.training import checked_trackers
from upstep_fast.config.views import BasicViewsConfig, LoraConfig
from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class FinetuneOutputConfig(OutputConfig):
    """The folder of a run and what is logged."""

    log_to: tuple[str, ...] = ()
    """Also send every number of metrics.jsonl to tensorboard (events in --out), wandb or mlflow, one or several."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        super().__post_init__()
        object.__setattr__(self, "log_to", checked_trackers(self.log_to))


@dataclass(frozen=True)
class FinetuneOptimizationConfig:
    """Length of a run, batch and optimizer."""

    epochs: int = 30
    """Largest number of epochs."""
    patience: int = 8
    """Epochs without a better held-out accuracy after which the run stops; 0: never. The best epoch's weights are
    kept."""
    held_out: float = 0.1
    """Fraction of each class of train/ held out to choose the best epoch; 0: none, and the last epoch is kept."""
    batch_size: int = 64
    """Images or clips per step; reduced to the number of images if there are fewer."""
    lr: float | None = None
    """Peak learning rate, reached after the warm-up. Default: losa 3e-3, lora 6e-3, linear 1e-2, full 2e-4."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay: factor from one layer to the one before; 1: off."""
    warmup: float = 0.05
    """Length of the warm-up: below 1 a fraction of the steps, from 1 on a number of steps."""
    weight_decay: float = 0.01
    """AdamW's weight decay of matrices."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "epochs", 1)
        at_least(self, "batch_size", 2)
        for name in ("patience", "warmup", "weight_decay", "clip"):
            at_least(self, name, 0)
        for name in ("lr", "layer_decay"):
            positive(self, name)
        fraction(self, "layer_decay")
        below(self, "held_out", 0.9)

    @property
    def peak_lr(self) -> float:
        """Learning rate of a resolved configuration. Raises ValueError while `lr` stands for the method's default."""
        if self.lr is None:
            raise ValueError("lr: not resolved yet; its default depends on the method")
        return self.lr


@dataclass(frozen=True)
class RegularizationConfig:
    """Regularization of supervised training."""

    label_smoothing: float = 0.1
    """Label smoothing: fraction of the target spread over all classes."""
    mixup: float = 0.0
    """Mixup alpha; 0: off."""
    cutmix: float = 0.0
    """CutMix alpha; 0: off. If both are on, each batch draws one."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block; for lora and full."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for name in ("mixup", "cutmix"):
            at_least(self, name, 0)
        below(self, "label_smoothing", 1)
        below(self, "drop_path", 1)


@dataclass(frozen=True)
class LosaConfig:
    """LoSA, the side network beside a frozen backbone."""

    rank: int = field(default=16, metadata=flag("losa_rank"))
    """Rank of channel mixing."""
    token_rank: int | None = field(default=None, metadata=flag("losa_token_rank"))
    """Rank of token mixing; 0: off. Default: --losa-rank."""
    combine: Literal["sum", "replace", "gated"] = field(default="sum", metadata=flag("losa_combine"))
    """Combination of an adaptor's output with the backbone's activations."""
    order: Literal["channel", "token"] = field(default="channel", metadata=flag("losa_order"))
    """Axis that is mixed first."""
    every: int = field(default=1, metadata=flag("losa_every"))
    """Put an adaptor beside every k-th block, counted from the last."""
    learn_scale: bool = field(default=False, metadata=flag("losa_learn_scale"))
    """Learn a scale for each adaptor's output, initially 1."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        at_least(self, "rank", 1)
        at_least(self, "every", 1)
        at_least(self, "token_rank", 0)


@dataclass(frozen=True)
class FinetuneConfig(ModelConfig):
    """Train a classifier on labeled images: CLASS/image, or train/CLASS/image and test/CLASS/image, or clips."""

    output: FinetuneOutputConfig
    method: Literal["losa", "lora", "linear", "full"] = "losa"
    """Trained weights: a side network (losa), LoRA in the backbone, a linear layer on its features, or all."""
    adapter: str | None = None
    """Folder of a run of adapt, or of an adapter, that is merged into the model first."""
    any_base: bool = False
    """Use the adapter on another base model than the one that it was trained on."""
    json: str | None = None
    """File for the results: top-1 and balanced accuracy on test/, trainable parameters, seconds, peak bytes."""
    test_fraction: float = 0.2
    """Fraction of each class held out for testing, by --seed, of images without a test part; 0: they are refused."""
    cache: Literal["off", "memory", "disk"] = "off"
    """Where to cache frozen activations, computed once; for losa and linear with --preset-views none."""
    frames: int | None = None
    """Frames per clip, for clips: train/CLASS/CLIP/frame or train/CLASS/clip.mp4. Default: images."""
    optimization: FinetuneOptimizationConfig = FinetuneOptimizationConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    views: BasicViewsConfig = BasicViewsConfig()
    losa: LosaConfig = LosaConfig()
    lora: LoraConfig = LoraConfig(targets=("q", "v"))
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        """Check what concerns several groups. Raises ConfigError naming the field, its value and what is allowed."""
        at_least(self, "frames", 2)
        below(self, "test_fraction", 1)
        if self.regularization.drop_path and self.method in ("losa", "linear"):
            raise ConfigError(f"drop_path: the backbone of {self.method} does not train; leave it at 0")
        if self.cache == "off":
            return
        if self.method in ("lora", "full"):
            raise ConfigError(f"cache: {self.method} changes the backbone, so nothing can be kept; leave it off")
        if self.views.preset != "none" or self.regularization.mixup or self.regularization.cutmix:
            raise ConfigError("cache: needs the same images every epoch: --preset-views none, no mixup, no cutmix")
