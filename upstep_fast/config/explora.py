"""ExPLoRA's configuration: groups shared with UpStep, with other defaults, and those of each objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.base import at_least, fraction, positive
from upstep_fast.config.flat import flag, paths
from upstep_fast.config.objective import ExperimentalConfig, GateConfig, ObjectiveConfig
from upstep_fast.config.training import OptimizationConfig
from upstep_fast.config.views import AdaptLoraConfig, ViewsConfig
from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class TrainableConfig:
    """Weights that ExPLoRA trains, and by which objective."""

    objective: Literal["dinov2", "mae"] = "dinov2"
    """Self-supervised objective, best the one of the model's pretraining; each has its own options and defaults."""
    alpha: Literal["faithful", "customary"] = "faithful"
    """Default of --lora-alpha: faithful is 1, as in the authors' code; customary is lora_r."""
    unfreeze: str = "last"
    """Fully trained blocks: first, last or numbers from 0, joined by commas (first,last)."""
    train_class_token: bool = True
    """Train the class token."""
    train_patch_embed: bool = False
    """Train the patch embedding, for other kinds of images (more channels, other sensors)."""
    train_positions: bool = False
    """Train the position embeddings."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for part in self.unfreeze.split(","):
            if part.strip() not in ("first", "last") and not part.strip().isdecimal():
                raise ConfigError(
                    f"unfreeze: got {self.unfreeze!r}, wants first, last or numbers, as first,last or 0,11"
                )


@dataclass(frozen=True)
class ExploraConfig(AdaptConfig):
    """Adapt a pretrained ViT to unlabeled images with ExPLoRA: some blocks and all norms, LoRA on the rest."""

    unused: ClassVar[tuple[str, ...]] = (
        *("preset", "head", "layout", "cvr", "cvr_weight", "prototype_init", "epsilon", "sharpen", "distil"),
        *("strength", "tune", "lora_blocks", "from_", "view_uses", *paths(ExperimentalConfig)),
    )

    method: Literal["upstep", "explora", "diet"] = "explora"
    """Adaptation method; each has its own defaults."""
    explora: TrainableConfig = TrainableConfig()
    lora: AdaptLoraConfig = AdaptLoraConfig(r=64, targets=("q", "v"))
    gate: GateConfig = GateConfig(rule="none")


@dataclass(frozen=True)
class Dinov2ObjectiveConfig:
    """DINOv2's objective: DINO, iBOT and KoLeo losses, and the teacher."""

    separate_heads: bool = False
    """Use a separate head for patches instead of one head for class tokens and patches."""
    freeze_last_layer: float = 0.03
    """Time for which the prototypes are frozen at the start: below 1 a fraction of the steps, from 1 on steps."""
    weight_decay_end: float = 0.4
    """AdamW's weight decay at the end; a cosine from --weight-decay leads there."""

    mask_probability: float = 0.5
    """Fraction of the global crops in which patches are masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest fraction of masked patches in such a crop."""
    ibot_weight: float = 1.0
    """Weight of the iBOT loss on masked patches; 0: off."""
    koleo_weight: float = 0.1
    """Weight of the KoLeo regularizer, which spreads features; 0: off."""

    centring: Literal["sinkhorn", "softmax"] = "sinkhorn"
    """Centering of the teacher's targets: Sinkhorn-Knopp or softmax with a running center."""
    teacher_temperature: float = 0.07
    """Temperature of the targets after the warm-up."""
    teacher_temperature_start: float = 0.04
    """Temperature of the targets at the start."""
    teacher_warmup: float = 0.3
    """Length of the temperature's warm-up: below 1 a fraction of the steps, from 1 on a number of steps."""
    momentum: float = 0.992
    """Teacher's EMA momentum at the start; it rises to 1 by a cosine."""
    ema: Literal["factors", "products"] = "factors"
    """Averaged by the teacher: the adapters' factors, or weights with the adapters merged."""
    save: Literal["teacher", "student"] = "teacher"
    """Weights in the adapter folder; --ema products has no factors to save and needs student."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for name in ("mask_probability", "momentum"):
            fraction(self, name)
        for name in ("weight_decay_end", "freeze_last_layer", "ibot_weight", "koleo_weight", "teacher_warmup"):
            at_least(self, name, 0)
        for name in ("teacher_temperature", "teacher_temperature_start"):
            positive(self, name)
        if self.ema == "products" and self.save == "teacher":
            raise ConfigError("ema: products leaves the teacher no factors to save; add --save student")
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ConfigError(f"mask_ratio: got {low} to {high}, must lie between 0 and 1, in order")


@dataclass(frozen=True)
class Dinov2Config(ExploraConfig):
    """ExPLoRA with DINOv2's objective: a student learns from its moving average on crops of two sizes."""

    optimization: OptimizationConfig = OptimizationConfig(warmup=0.1, weight_decay=0.04, clip=3.0)
    objective: ObjectiveConfig = ObjectiveConfig(head_hidden=2048, head_dim=256, prototypes=65536)
    views: ViewsConfig = ViewsConfig(crop_min=0.32, local_views=8)
    dinov2: Dinov2ObjectiveConfig = Dinov2ObjectiveConfig()


@dataclass(frozen=True)
class MaeObjectiveConfig:
    """MAE's objective: masking and the decoder."""

    masked: float = field(default=0.75, metadata=flag("hidden"))
    """Fraction of masked patches."""
    norm_pixels: bool = True
    """Predict pixels normalized by their patch's mean and variance."""
    decoder: str | None = None
    """Checkpoint file of a pretrained MAE with its decoder. Default: a new decoder, trained and then discarded."""
    decoder_lora_r: int = 8
    """Rank of the adapters on q and v of a pretrained decoder."""
    decoder_width: int = 512
    """Width of a new decoder."""
    decoder_depth: int = 8
    """Blocks of a new decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for name in ("decoder_lora_r", "decoder_width", "decoder_depth", "decoder_heads"):
            at_least(self, name, 1)
        if not 0 < self.masked < 1:
            raise ConfigError(f"hidden: got {self.masked}, must lie between 0 and 1")
        if self.decoder_width % (4 * self.decoder_heads) and self.decoder is None:
            raise ConfigError(
                f"decoder_width: got {self.decoder_width}, must be a multiple of 4 decoder_heads ({self.decoder_heads})"
            )


@dataclass(frozen=True)
class MaeConfig(ExploraConfig):
    """ExPLoRA with MAE's objective: the pixels of masked patches are predicted from the visible ones."""

    explora: TrainableConfig = TrainableConfig(objective="mae")
    optimization: OptimizationConfig = OptimizationConfig(clip=0.0)
    objective: ObjectiveConfig = ObjectiveConfig(prototypes=2)  # not used by MAE
    views: ViewsConfig = ViewsConfig(crop_min=0.2, brightness=0.0, contrast=0.0, saturation=0.0, gray=0.0)
    mae: MaeObjectiveConfig = MaeObjectiveConfig()

    def __post_init__(self) -> None:
        """Check what concerns several groups. Raises ConfigError."""
        super().__post_init__()
        if self.views.local_views or self.views.local_size:
            raise ConfigError("local_views: --objective mae has no crops of two sizes; leave it out")
