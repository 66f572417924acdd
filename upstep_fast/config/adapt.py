"""The configuration: one frozen dataclass a command, one field = one flag = one line of help."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from typing import Literal

from upstep_fast.config.base import ModelConfig, _at_least, _fraction, _positive
from upstep_fast.errors import ConfigError

# these act on adapters, or want the base model's weights to stand still
_NOT_WITH_FULL = (
    *("lora_r", "lora_alpha", "lora_targets", "lora_blocks", "distil", "base_targets", "strength"),
    *("strength_first", "shard_weights"),
)
LORA_TARGETS = ("q", "k", "v", "qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class AdaptConfig(ModelConfig):
    """Adapt a pretrained ViT to unlabelled images; writes an adapter in PEFT's format.

    These are UpStep's flags; `upstep-fast adapt --method explora --help` shows ExPLoRA's.
    """

    out: str = dataclasses.field(kw_only=True)
    """Folder for the adapter, metrics and configuration."""
    overwrite: bool = False
    """Replace an earlier run in a non-empty --out."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; start from the beginning if there is none."""
    checkpoint_every: int | str = 200
    """Steps between two checkpoints, or minutes (10min); a signal and the last step write one too."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, at least 2, so that one is left if the other is damaged."""
    verify_resume: int = 0
    """After the first checkpoint: repeat so many steps from it and compare bit for bit; exit 1 if they differ."""
    method: Literal["upstep", "explora"] = "upstep"
    """How to adapt; each method has its own defaults."""
    preset: Literal["gentle", "balanced", "strong"] | None = None
    """How much to change the model: forget least, between, or gain most; single flags override it."""

    # length and batch
    batch_size: int = 256
    """Images a step, over all devices; a smaller data set reduces it."""
    steps: int | None = None
    """Steps to run (skipped ones count); None: see --epochs."""
    epochs: float | None = None
    """Passes over the images instead of --steps; with neither, 10 epochs but at least 400 steps."""
    accumulate: int = 1
    """Open steps that make one update, each with a gate decision and targets of its own; --steps counts them all."""
    auto_batch: bool = False
    """When memory runs out, go on in smaller passes over the batch: the same result, open steps compute twice."""

    # many processes
    shard_weights: bool = False
    """Under torchrun: spread the frozen weights over the GPUs (FSDP2) for models too large for one; slower."""
    rank_timeout: float = 15.0
    """Seconds that one process waits for another, after the first step, until all end."""

    # adapter
    lora_r: int = 8
    """Rank of each adapter."""
    lora_alpha: float | None = None
    """Scale of the adapter is lora_alpha / lora_r; None: lora_r, a scale of 1."""
    lora_targets: tuple[str, ...] = ("q", "k", "v")
    """Which matrices get an adapter: q k v (each its own), qkv (one for all three), proj fc1 fc2."""
    lora_blocks: int | None = None
    """Adapters on so many of the last blocks only; None: on all."""
    tune: Literal["lora", "full"] = "lora"
    """lora: adapters learn, the model stands still. full: every weight learns, without adapters (for comparison)."""

    # optimisation
    lr: float = 1e-3
    """Peak learning rate of the adapter and the head, reached after the warm-up."""
    warmup: float = 0.05
    """Warm-up: a fraction of the steps below 1, a number of steps from 1 on."""
    weight_decay: float = 0.0
    """AdamW's weight decay on the head; adapters have none."""
    clip: float = 1.0
    """Largest norm of the adapters' gradient; 0: no clipping."""
    adapter_ema: float = 0.0
    """Memory of a running mean of the adapter over the updates, written in place of the last one; 0: none."""
    layout: Literal["symmetric", "asymmetric"] = "symmetric"
    """symmetric: both views learn. asymmetric: one view makes targets without gradient, the other learns."""

    memory: Literal["fast", "balanced", "lean", "auto"] = "fast"
    """What the engine keeps for backward: all it needs (fast), all but qkv, or each block's input alone (lean).
    auto: the fastest of these that fits in the memory that is free."""
    memory_check: bool = True
    """Refuse to start what cannot fit in the memory that is free; --no-memory-check starts it all the same."""
    cuda_graphs: bool = False
    """Replay the backbone's forward and backward as CUDA graphs, where launches take longer than their work: small
    batches and models. The same result."""

    # clustering
    head: Literal["mlp", "linear", "none"] = "mlp"
    """Projection head, discarded after training."""
    head_hidden: int = 1024
    """Width of the MLP head's hidden layer."""
    head_dim: int = 128
    """Width of the space in which images are clustered."""
    prototypes: int = 300
    """Number of fixed cluster centres; a smaller data set reduces it."""
    prototype_init: Literal["random", "orthogonal", "kmeans", "learned"] = "random"
    """Centred random directions, orthogonal ones, k-means of the start's embeddings, or learned ones."""
    temperature: float = 0.1
    """Temperature of the predicted assignments."""
    epsilon: float = 0.05
    """Entropy regularisation of the Sinkhorn targets; smaller is harder."""
    sinkhorn_iterations: int = 3
    """Rounds of Sinkhorn-Knopp that balance the targets; a smaller epsilon needs more."""
    sharpen: float = 1.0
    """Power that the targets are raised to; above 1 they are harder."""
    queue: int = 0
    """Embeddings of earlier images that the targets are balanced over as well, for small batches; 0: none."""
    base_targets: float = 0.0
    """Part of the steps, from the first, in which targets of the base model's features are mixed in; 0: never."""

    # centre-vector regularisation
    cvr: Literal["off", "sq", "norm", "anchor", "hinge", "ema"] = "sq"
    """Penalty on the centre vector: its square, its norm, its distance from the base model's, a hinge, an average."""
    cvr_weight: float = 1.0
    """Weight of that penalty."""
    cvr_on: Literal["head", "features"] = "head"
    """Whose mean is penalised: the head's unit embeddings, or the backbone's unit features (cvr sq or norm)."""

    # staying close to the base model
    distil: Literal["off", "feature", "relational"] = "off"
    """Penalty on the distance from the base model: of features (cosine), or of who resembles whom in the batch."""
    distil_weight: float = 0.3
    """Weight of that penalty."""
    distil_temperature: float = 0.1
    """Temperature of the relational form's similarities."""

    # gate
    gate: Literal["none", "prev", "ema", "median", "quantile", "views", "random", "alternate"] = "quantile"
    """Rule that decides which steps do a backward pass; quantile leaves --gate-rate of them open."""
    update_when: Literal["low", "high"] = "low"
    """Update when the centre's magnitude is below (low) or above (high) the rule's reference."""
    gate_statistic: Literal["center", "loss", "disagreement"] = "center"
    """What prev, ema, median and quantile compare: the centre's magnitude, the clustering loss, or how far apart an
    image's two views lie."""
    gate_rate: float = 0.5
    """Fraction of steps to leave open, for quantile, random and alternate."""
    gate_beta: float = 0.9
    """Memory of the ema rule's reference."""
    max_skips: int = 16
    """After this many skipped steps in a row the next is open."""
    gate_unit: Literal["step", "image"] = "step"
    """What the gate skips: whole steps, or images of each batch (layout asymmetric; gate quantile or random)."""

    # views
    local_views: int = 0
    """Small local views of an image beside the two global ones, which learn against the targets of these."""
    local_size: int | None = None
    """Side of a local view in pixels; None: 7/16 of the input, in whole patches."""
    preset_views: Literal["natural", "overhead", "microscopy", "document", "none"] = "natural"
    """Which random changes make two views of an image; single ones below override the preset."""
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
    crop_ratio: tuple[float, float] | None = None
    """Narrowest and widest shape of a random crop, width over height."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter that resizes the crops, antialiased."""
    vertical_flip: float | None = None
    """Probability of an up-down flip."""
    rotate90: float | None = None
    """Probability of a turn by 90, 180 or 270 degrees; .75 makes all four directions equally likely."""
    brightness: float | None = None
    """Brightness is multiplied by 1 - this to 1 + this; 0: left as it is."""
    contrast: float | None = None
    """The same for the contrast."""
    saturation: float | None = None
    """The same for the saturation."""
    hue: float | None = None
    """Largest turn of the hue, as a part of the circle, 0 to 0.5."""
    solarize: float | None = None
    """Probability of inverting the bright half of the levels."""

    # images
    mean_std: Literal["given", "auto"] = "given"
    """auto: --mean and --std are measured on a sample of the images; given: these flags, or the model's own."""
    decode: Literal["cpu", "cuda"] = "cpu"
    """cuda: JPEGs are decoded by the GPU (nvJPEG); other pixels than the CPU's, and cut files may pass for whole."""
    triage: bool = False
    """Look at all images first: leave out copies and blank ones, list near copies and odd ones in skipped.csv."""

    # judged without labels
    judge_every: int = 0
    """Steps between looks at held-out images (a tenth, at most 256); the best adapter is kept, or none; 0: never."""
    judge_patience: int = 4
    """Looks in a row without a better one that end the run early; 0: never."""
    strength: float | Literal["auto"] = 1.0
    """Scale of the adapter that is written, against the trained one; auto: the best by --judge-every's predictor."""
    strength_first: float | Literal["auto"] | None = None
    """The same for the first block, and in a line from there to the last, which has --strength; None: for all alike."""

    log_every: int = 10
    """Steps between two lines on the console when it is not a terminal."""
    tensorboard: bool = False
    """Write TensorBoard events to --out as well."""
    report_images: bool = True
    """Look at 512 images with the base and the adapted model at the end, for the pictures in report.html."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError naming the field, its value and what is allowed."""
        super().__post_init__()
        for name in ("batch_size", "lora_r", "lora_blocks", "head_hidden", "head_dim", "log_every", "max_skips"):
            _at_least(self, name, 1)
        _at_least(self, "accumulate", 1)
        every(self.checkpoint_every)
        _at_least(self, "verify_resume", 0)
        _at_least(self, "keep_checkpoints", 2)
        _positive(self, "rank_timeout")
        _at_least(self, "prototypes", 2)
        _at_least(self, "sinkhorn_iterations", 1)
        _at_least(self, "batch_size", 2)
        for name in ("steps", "num_workers"):
            _at_least(self, name, 0 if name == "num_workers" else 1)
        for name in ("lr", "temperature", "epsilon", "distil_temperature", "sharpen", "local_size"):
            _positive(self, name)
        if not 0 <= self.adapter_ema < 1:
            raise ConfigError(f"adapter_ema: got {self.adapter_ema}, must be at least 0 and below 1")
        if self.epsilon < 0.01:
            raise ConfigError(f"epsilon: got {self.epsilon}, must be at least 0.01 (below it fp32 targets break down)")
        for name in ("epochs", "lora_alpha"):
            _positive(self, name)
        for name in ("judge_every", "judge_patience", "warmup", "weight_decay", "clip", "cvr_weight", "distil_weight"):
            _at_least(self, name, 0)
        for name in ("queue", "local_views"):
            _at_least(self, name, 0)
        fractions = ("base_targets", "gate_rate", "gate_beta", "max_bad_fraction", "crop_min", "crop_max")
        for name in (*fractions, "flip", "blur", "grey", "vertical_flip", "rotate90", "solarize"):
            _fraction(self, name)
        for name in ("brightness", "contrast", "saturation", "hue"):
            _at_least(self, name, 0)
        if self.hue is not None and self.hue > 0.5:
            raise ConfigError(f"hue: got {self.hue}, must lie in 0 to 0.5")
        if self.crop_ratio is not None and not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ConfigError(
                f"crop_ratio: got {self.crop_ratio[0]} to {self.crop_ratio[1]}, must be above 0, in order"
            )
        if self.mean_std == "auto" and (self.mean or self.std):
            raise ConfigError("mean_std: auto measures mean and std; do not give --mean or --std as well")
        if self.shard_weights and self.auto_batch:
            raise ConfigError("shard_weights and auto_batch: give one of them, not both")
        for name in ("shard_weights", "auto_batch", "cuda_graphs"):
            if getattr(self, name) and self.method != "upstep":
                raise ConfigError(f"{name}: --method {self.method} cannot; leave it out")
        for name in ("auto_batch", "shard_weights", "local_views"):
            if self.cuda_graphs and getattr(self, name):
                raise ConfigError(f"cuda_graphs and {name}: give one of them, not both")
        if self.cuda_graphs and self.implementation == "reference":
            raise ConfigError("cuda_graphs: only the engine is captured; leave out --implementation reference")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("tensorboard: it is not installed; pip install 'upstep_fast[report]'")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite: give one of them, not both")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("steps and epochs: give one of them, not both")
        unknown = [t for t in self.lora_targets if t not in LORA_TARGETS]
        if unknown or not self.lora_targets:
            raise ConfigError(
                f"lora_targets: got {' '.join(self.lora_targets) or 'nothing'}, choose from {' '.join(LORA_TARGETS)}"
            )
        if len(set(self.lora_targets)) != len(self.lora_targets):
            raise ConfigError(f"lora_targets: {' '.join(self.lora_targets)} names one matrix twice")
        if "qkv" in self.lora_targets and {"q", "k", "v"} & set(self.lora_targets):
            raise ConfigError("lora_targets: qkv is one adapter over q, k and v; do not name q, k or v beside it")
        if self.layout == "asymmetric" and self.gate == "views":
            raise ConfigError("gate: views compares two views, which --layout asymmetric does not have before the gate")
        compares = self.gate in ("prev", "ema", "median", "quantile") and self.layout == "symmetric"
        if self.gate_statistic != "center" and not compares:
            raise ConfigError(
                f"gate_statistic: {self.gate_statistic} needs --gate prev, ema, median or quantile, --layout symmetric"
            )
        if self.cvr_on == "features" and self.cvr not in ("sq", "norm"):
            raise ConfigError(f"cvr_on: features needs --cvr sq or norm, got {self.cvr}")
        if self.tune == "full" and self.method == "upstep":
            defaults = {field.name: field.default for field in dataclasses.fields(AdaptConfig)}
            for name in _NOT_WITH_FULL:
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(f"{name}: needs --tune lora; leave it out with full")
        for name in ("strength", "strength_first"):
            if getattr(self, name) == "auto" and not self.judge_every:
                raise ConfigError(f"{name}: auto needs --judge-every, which holds out images to judge it on")
        if self.strength_first not in (None, "auto"):
            _at_least(self, "strength_first", 0)
        if self.strength != "auto":
            _positive(self, "strength")
        if self.gate_unit == "image" and (self.layout != "asymmetric" or self.gate not in ("quantile", "random")):
            raise ConfigError("gate_unit: image needs --layout asymmetric and --gate quantile or random")
        if self.crop_min is not None and self.crop_max is not None and self.crop_min > self.crop_max:
            raise ConfigError(f"crop_min: {self.crop_min} is above crop_max {self.crop_max}")


def every(value: int | str) -> tuple[int, float]:
    """What checkpoint_every says: steps, and seconds; the one that is not meant is 0. Raises ConfigError."""
    text = str(value).strip()
    number, is_minutes = text.removesuffix("min"), text.endswith("min")
    try:
        found = (0, 60 * float(number)) if is_minutes else (int(number), 0.0)
    except ValueError:
        found = (0, 0.0)
    if not 0 < sum(found) < math.inf:
        raise ConfigError(f"checkpoint_every: got {text!r}, must be steps (200) or minutes (10min), above 0")
    return found
