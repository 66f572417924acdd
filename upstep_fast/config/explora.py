"""ExPLoRA's configuration: the flags it shares with UpStep, with its own defaults, and those of each objective."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.base import _at_least, _fraction, _positive
from upstep_fast.errors import ConfigError

# these say how UpStep clusters; given to ExPLoRA they would do nothing
_UPSTEPS_OWN = (
    *("preset", "head", "layout", "cvr", "cvr_weight", "prototype_init", "epsilon", "sharpen", "distil", "gate_unit"),
    *("strength", "adapter_ema", "queue", "base_targets", "gate_statistic", "tune", "lora_blocks", "strength_first"),
    "cvr_on",
)


@dataclass(frozen=True)
class ExploraConfig(AdaptConfig):
    """Adapt a pretrained ViT to unlabelled images with ExPLoRA: some whole blocks, LoRA on the others, all norms."""

    method: Literal["upstep", "explora"] = "explora"
    """How to adapt; each method has its own defaults."""
    objective: Literal["dinov2", "mae"] = "dinov2"
    """The self-supervised objective, best the one of the model's pretraining; each has its own flags and defaults."""
    lora_r: int = 64
    """Rank of each adapter."""
    lora_targets: tuple[str, ...] = ("q", "v")
    """Which matrices get an adapter: q k v (each its own), qkv (one for all three), proj fc1 fc2."""
    alpha: Literal["faithful", "customary"] = "faithful"
    """lora_alpha where that is not given: faithful is 1, as in the authors' code, customary is lora_r."""
    unfreeze: str = "last"
    """Blocks trained whole: first, last or numbers from 0, joined by commas (first,last)."""
    train_class_token: bool = True
    """Train the class token."""
    train_patch_embed: bool = False
    """Train the patch embedding, for images of another kind (more channels, other sensors)."""
    train_positions: bool = False
    """Train the position embeddings."""
    gate: Literal["none", "prev", "ema", "median", "quantile", "views", "random", "alternate"] = "none"
    """Rule that decides which steps do a backward pass; ExPLoRA itself has no gate."""

    def __post_init__(self) -> None:
        """Check every field; raises ConfigError."""
        super().__post_init__()
        defaults = {field.name: field.default for field in fields(AdaptConfig)}
        for name in _UPSTEPS_OWN:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name}: belongs to --method upstep; leave it out with explora")
        if self.gate == "views":
            raise ConfigError("gate: views compares UpStep's two views; choose another with explora")
        for part in self.unfreeze.split(","):
            if part.strip() not in ("first", "last") and not part.strip().isdecimal():
                raise ConfigError(
                    f"unfreeze: got {self.unfreeze!r}, wants first, last or numbers, as first,last or 0,11"
                )


@dataclass(frozen=True)
class Dinov2Config(ExploraConfig):
    """ExPLoRA with DINOv2's objective: a student follows its own moving average on crops of two sizes."""

    lr: float = 1e-3
    """Peak learning rate of all that trains, as it is; the recipe's 1e-3 is for 1024 images a step."""
    warmup: float = 0.1
    """Warm-up: a fraction of the steps below 1, a number of steps from 1 on."""
    weight_decay: float = 0.04
    """AdamW's weight decay at the start; norms, biases and tokens have none."""
    weight_decay_end: float = 0.4
    """The same at the end; a cosine between them."""
    clip: float = 3.0
    """Largest norm of the gradient of the backbone, and of each head; 0: no clipping."""
    crop_min: float | None = 0.32
    """Smallest area of a global crop, as a fraction of the image; local crops lie below it."""

    head_hidden: int = 2048
    """Width of the heads' hidden layers."""
    head_dim: int = 256
    """Width of the heads' bottleneck, where prototypes are compared."""
    prototypes: int = 65536
    """Number of prototypes of each head; a smaller data set reduces it."""
    separate_heads: bool = False
    """A head of its own for patches; else one serves class tokens and patches."""
    freeze_last_layer: float = 0.03
    """How long the prototypes stand still at the start: a fraction of the steps below 1, a number of steps from 1."""

    local_views: int = 8
    """Local crops of an image beside the two global ones."""
    mask_probability: float = 0.5
    """Share of the global crops in which patches are masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of masked patches in such a crop."""
    ibot_weight: float = 1.0
    """Weight of the masked patches' loss; 0: none."""
    koleo_weight: float = 0.1
    """Weight of the penalty on features that lie close to one another; 0: none."""

    centring: Literal["sinkhorn", "softmax"] = "sinkhorn"
    """How the teacher's targets are balanced over the prototypes."""
    teacher_temperature: float = 0.07
    """Temperature of the targets after the warm-up."""
    teacher_temperature_start: float = 0.04
    """The same at the start."""
    teacher_warmup: float = 0.3
    """Length of that warm-up: a fraction of the steps below 1, a number of steps from 1 on."""
    momentum: float = 0.992
    """Share of the teacher that stays at a step, at the start; it rises to 1 by a cosine."""
    ema: Literal["factors", "products"] = "factors"
    """What the teacher averages: the adapters' factors, or the weights with their products added."""
    save: Literal["teacher", "student"] = "teacher"
    """Whose weights the adapter folder holds; an average of products has no factors, so it wants student."""

    def __post_init__(self) -> None:
        """Check every field; raises ConfigError."""
        super().__post_init__()
        for name in ("mask_probability", "momentum"):
            _fraction(self, name)
        for name in ("weight_decay_end", "freeze_last_layer", "ibot_weight", "koleo_weight"):
            _at_least(self, name, 0)
        _at_least(self, "teacher_warmup", 0)
        for name in ("teacher_temperature", "teacher_temperature_start"):
            _positive(self, name)
        if self.ema == "products" and self.save == "teacher":
            raise ConfigError("ema: products leaves the teacher no factors to save; add --save student")
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ConfigError(f"mask_ratio: got {low} to {high}, must lie between 0 and 1, in order")


@dataclass(frozen=True)
class MaeConfig(ExploraConfig):
    """ExPLoRA with MAE's objective: the pixels of hidden patches are predicted from the others."""

    objective: Literal["dinov2", "mae"] = "mae"
    """The self-supervised objective, best the one of the model's pretraining; each has its own flags and defaults."""
    lr: float = 1e-3
    """Peak learning rate of all that trains, as it is; the recipe's 1.8e-3 is for 1024 images a step."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    crop_min: float | None = 0.2
    """Smallest area of a crop, as a fraction of the image."""
    brightness: float | None = 0.0
    """Brightness is multiplied by 1 - this to 1 + this; 0: left as it is."""
    contrast: float | None = 0.0
    """The same for the contrast."""
    saturation: float | None = 0.0
    """The same for the saturation."""
    grey: float | None = 0.0
    """Probability of dropping the colour."""
    prototypes: int = 2
    """Not used by MAE."""

    hidden: float = 0.75
    """Share of the patches that the encoder does not see."""
    norm_pixels: bool = True
    """Predict pixels normalised by their patch's own mean and variance."""
    decoder: str | None = None
    """Checkpoint file of a pretrained MAE with its decoder; None: a fresh one, trained whole, discarded later."""
    decoder_lora_r: int = 8
    """Rank of the adapters on q and v of a pretrained decoder."""
    decoder_width: int = 512
    """Width of a fresh decoder."""
    decoder_depth: int = 8
    """Blocks of a fresh decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""

    def __post_init__(self) -> None:
        """Check every field; raises ConfigError."""
        super().__post_init__()
        for name in ("decoder_lora_r", "decoder_width", "decoder_depth", "decoder_heads"):
            _at_least(self, name, 1)
        if self.local_views or self.local_size:
            raise ConfigError("local_views: --objective mae has no crops of two sizes; leave it out")
        if not 0 < self.hidden < 1:
            raise ConfigError(f"hidden: got {self.hidden}, must lie between 0 and 1")
        if self.decoder_width % (4 * self.decoder_heads) and self.decoder is None:
            raise ConfigError(
                f"decoder_width: got {self.decoder_width}, must be a multiple of 4 decoder_heads ({self.decoder_heads})"
            )
