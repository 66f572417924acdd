"""The configuration: one frozen dataclass a command, one field = one flag = one line of help."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upstep_fast.errors import ConfigError

# these act on adapters, or want the base model's weights to stand still
_NOT_WITH_FULL = (
    *("lora_r", "lora_alpha", "lora_targets", "lora_blocks", "distil", "base_targets", "strength"),
    *("strength_first", "shard_weights"),
)
LORA_TARGETS = ("q", "k", "v", "qkv", "proj", "fc1", "fc2")


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
        """Checks every field; raises ConfigError."""
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
        """Checks every field. Raises ConfigError naming the field, its value and what is allowed."""
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


@dataclass(frozen=True)
class EvalConfig(ModelConfig):
    """Measure a model, or a model with an adapter, on labelled images: k-NN and linear probe, in percent."""

    adapter: str | None = None
    """Folder of an adapter (out/adapter); without it only the base model is measured."""
    source: str | None = None
    """Labelled images of the domain the model came from, to measure forgetting."""
    k: int = 20
    """Neighbours of the k-NN classifier."""
    json: str | None = None
    """File for the figures."""
    batch_size: int = 256
    """Images a forward pass."""

    def __post_init__(self) -> None:
        """Checks every field; raises ConfigError."""
        super().__post_init__()
        _at_least(self, "k", 1)
        _at_least(self, "batch_size", 1)
        _fraction(self, "max_bad_fraction")


@dataclass(frozen=True)
class EmbedConfig(ModelConfig):
    """Write the features of images, with their paths, to a file."""

    out: str = dataclasses.field(kw_only=True)
    """File to write: .npy (paths beside it in .txt), .safetensors or .parquet."""
    adapter: str | None = None
    """Folder of an adapter (out/adapter)."""
    ensemble: bool = False
    """Concatenate the base model's and the adapted features, each of unit length."""
    fit_whitening: str | None = None
    """Put whitened features beside the others, which tells images of a new domain better apart; fitted to these images
    and written to this file, for --whitening."""
    whitening: str | None = None
    """The same with the whitening in this file, as --fit-whitening wrote it: for images to be compared with those."""
    batch_size: int = 256
    """Images a forward pass."""
    overwrite: bool = False
    """Replace --out if it exists."""

    def __post_init__(self) -> None:
        """Checks every field; raises ConfigError."""
        super().__post_init__()
        _at_least(self, "batch_size", 1)
        _fraction(self, "max_bad_fraction")
        if self.ensemble and self.adapter is None:
            raise ConfigError("ensemble: needs --adapter; without one there is nothing to join the base features with")
        if self.fit_whitening is not None and self.whitening is not None:
            raise ConfigError("whitening and fit_whitening: give one of them, not both")


@dataclass(frozen=True)
class ExportConfig(BackboneConfig):
    """Write a model with its adapter in another tool's format, checked in that tool."""

    format: Literal["timm", "hf", "peft", "dinov2", "onnx", "torch"] = "timm"
    """timm, hf (transformers): merged, safetensors; peft: the adapter; dinov2: Meta's names; onnx, torch: one file."""
    out: str = dataclasses.field(kw_only=True)
    """Folder to write."""
    adapter: str | None = None
    """Folder of an adapter (out/adapter); without it the base model is exported."""
    data: tuple[str, ...] = ()
    """Images on which the exported features are compared; without them some photographs of this package."""
    overwrite: bool = False
    """Replace an earlier export in a non-empty --out."""
    debug: bool = False
    """Show tracebacks instead of one-line errors."""


@dataclass(frozen=True)
class ModelsConfig:
    """List the models that can be adapted."""

    pattern: str = "*"
    """Part of a name, or a pattern with * and ?."""
    debug: bool = False
    """Show tracebacks instead of one-line errors."""


@dataclass(frozen=True)
class BenchConfig:
    """Time the engine against the eager reference and PEFT on this machine, forward and forward with backward."""

    model: str = "vit_base_patch16_224"
    """Model to time: a timm name or local-dir:PATH."""
    pretrained: bool = False
    """Load the weights; random ones take the same time."""
    img_size: int | None = None
    """Side of the square input in pixels; None: the model's own."""
    batch_size: int = 16
    """Views a step."""
    lora_r: int = 16
    """Rank of the adapter, on the fused qkv as PEFT puts it."""
    runs: int = 10
    """Timed runs of each variant; they alternate."""
    compile: bool = False
    """Also time PEFT under torch.compile (minutes to compile)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "fp8"] = "auto"
    """As for adapt."""
    json: str | None = None
    """File for the figures."""
    plot: str | None = None
    """File for a picture of them: .svg, .png or .pdf (needs matplotlib)."""
    debug: bool = False
    """Show tracebacks instead of one-line errors."""

    def __post_init__(self) -> None:
        """Checks every field; raises ConfigError."""
        for name in ("batch_size", "lora_r", "runs"):
            _at_least(self, name, 1)


@dataclass(frozen=True)
class ReportConfig:
    """Write the HTML report of a run again, or compare several runs on one page."""

    dirs: tuple[str, ...]
    """Folders of runs (--out of adapt). One: writes its report.html. Several: writes --out."""
    out: str = "comparison.html"
    """File for the comparison of several runs."""
    debug: bool = False
    """Show tracebacks instead of one-line errors."""

    def __post_init__(self) -> None:
        """Checks every field; raises ConfigError."""
        if not self.dirs:
            raise ConfigError("dirs: name at least one folder of a run")
        if not self.out.endswith((".html", ".htm")):
            raise ConfigError(f"out: got {self.out}, must end in .html")


@dataclass(frozen=True)
class DoctorConfig:
    """Say what runs on this machine and why, and check every kernel against its reference."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print one JSON object instead of tables."""
    debug: bool = False
    """Show tracebacks instead of one-line errors."""


@dataclass(frozen=True)
class CompletionConfig:
    """Print the script that completes commands and flags in a shell."""

    shell: Literal["bash", "zsh", "fish", "tcsh"] = "bash"
    """Shell to complete in."""
    debug: bool = False
    """Show tracebacks instead of one-line errors."""


@dataclass(frozen=True)
class DemoConfig:
    """Adapt a small model to photographs of hand signs, without their labels, and show what that brought."""

    out: str = "upstep-demo"
    """Folder for the run."""
    overwrite: bool = False
    """Replace an earlier demo in --out."""
    source: str | None = None
    """Labelled images of the domain the model came from, to show forgetting; none are shipped."""
    steps: int | None = None
    """Steps to run; None: the demo's own recipe."""
    seed: int = 0
    """Seed of the run."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    debug: bool = False
    """Show tracebacks instead of one-line errors."""


def read_toml(path: str | Path, config_class: type) -> dict[str, Any]:
    """The fields in a TOML file. Raises ConfigError on a missing or broken file and on unknown keys."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not valid TOML: {error}") from error
    config_class = of_method(config_class, values.get("method"), values.get("objective"))
    return {known_field(key, config_class, f"config {path}"): value for key, value in values.items()}


def of_method(config_class: type, method: Any, objective: Any = None) -> type:
    """The class with the defaults and flags of a method of `adapt`; `config_class` itself where there is no other."""
    if config_class is AdaptConfig and method == "explora":
        from upstep_fast.config.explora import Dinov2Config, MaeConfig

        return MaeConfig if objective == "mae" else Dinov2Config
    return config_class


def from_options(config_class: type, options: dict[str, Any], where: str) -> Any:
    """The configuration from a Python call's keywords; paths may be Path, and `data` one of them or several.

    Raises ConfigError for unknown keywords and for missing ones of model, data and out.
    """
    for name in options:
        known_field(name, config_class, where)
    if missing := [name for name in ("model", "data", "out") if name not in options]:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    data = options["data"]
    paths = [data] if isinstance(data, (str, Path)) else data
    # a TOML file's lists are the tuples of the fields
    fields = {
        name: str(v) if isinstance(v, Path) else tuple(v) if isinstance(v, list) else v for name, v in options.items()
    }
    return config_class(**fields | {"data": tuple(str(path) for path in paths)})


def known_field(key: str, config_class: type, where: str) -> str:
    """`key` with dashes as underscores, if it is a field. Raises ConfigError with the nearest name otherwise."""
    names = [f.name for f in dataclasses.fields(config_class)]
    name = key.replace("-", "_")
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(names)}"
    raise ConfigError(f"{where}: unknown key {key!r}{hint}")


def to_toml(config: Any) -> str:
    """The resolved configuration as flat TOML; fields that are None are left out."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            lines.append(f"{field.name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


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
