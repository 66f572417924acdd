"""Configuration of export, push, models, bench, report, doctor, completion and demo."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from upstep_fast.config.base import BackboneConfig, DebugConfig, DeviceConfig, at_least, check_seed
from upstep_fast.errors import ConfigError


@dataclass(frozen=True)
class ExportConfig(DebugConfig):
    """Write a model with its adapter in another tool's format, checked in that tool."""

    model: BackboneConfig
    format: Literal["timm", "hf", "peft", "dinov2", "onnx", "torch"] = "timm"
    """timm, hf (transformers): merged, safetensors; peft: the adapter; dinov2: Meta's names; onnx, torch: one file."""
    out: str = dataclasses.field(kw_only=True)
    """Folder to write."""
    adapter: str | None = None
    """Folder of a run of adapt, or of an adapter; names --model and its options. Default: the base model."""
    any_base: bool = False
    """Use the adapter on another base model than the one that it was trained on."""
    data: tuple[str, ...] = ()
    """Images on which the exported features are compared; none: photographs included in the package."""
    overwrite: bool = False
    """Replace an earlier export in a non-empty --out."""


@dataclass(frozen=True)
class PushConfig(DebugConfig):
    """Push the adapter of a run to the Hugging Face Hub: its files and its card, nothing else of the run."""

    run: str
    """Folder of a run of adapt, or of an adapter."""
    repo: str
    """Repository, OWNER/NAME or NAME; made if it is missing."""
    private: bool = False
    """Make a private repository. Default: what the owner's settings say, otherwise public."""


@dataclass(frozen=True)
class ModelsConfig(DebugConfig):
    """List the models that can be adapted."""

    pattern: str = "*"
    """Part of a name, or a pattern with * and ?."""


@dataclass(frozen=True)
class BenchConfig(DeviceConfig):
    """Time the engine against the eager reference and PEFT on this machine, forward and forward with backward."""

    model: str = "vit_base_patch16_224"
    """Model to time, as `adapt --model` takes it."""
    pretrained: bool = False
    """Load the pretrained weights; random weights take the same time."""
    img_size: int | None = None
    """Side of the square input in pixels. Default: the model's own."""
    batch_size: int = 16
    """Views per step."""
    lora_r: int = 16
    """Rank of the adapter, on the fused qkv as in PEFT."""
    runs: int = 10
    """Timed runs per variant; variants alternate."""
    compile: bool = False
    """Also time PEFT under torch.compile (minutes to compile)."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "fp8"] = "auto"
    """Precision, as for adapt."""
    json: str | None = None
    """File for the results."""
    plot: str | None = None
    """File for a plot of the results: .svg, .png or .pdf (needs matplotlib)."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        for name in ("img_size", "batch_size", "lora_r", "runs"):
            at_least(self, name, 1)


@dataclass(frozen=True)
class ReportConfig(DebugConfig):
    """Write the HTML report of a run again, or compare several runs on one page."""

    dirs: tuple[str, ...]
    """Folders of runs (--out of adapt). One: writes its report.html. Several: writes --out."""
    out: str = "comparison.html"
    """File for the comparison of several runs."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        if not self.dirs:
            raise ConfigError("dirs: name at least one folder of a run")
        if not self.out.endswith((".html", ".htm")):
            raise ConfigError(f"out: got {self.out}, must end in .html")


@dataclass(frozen=True)
class DoctorConfig(DeviceConfig):
    """List the implementations chosen on this machine, with reasons, and check every kernel against its reference."""

    json: bool = False
    """Print one JSON object instead of tables."""
    model: str | None = None
    """Also say what runs this model, and why: a name as `adapt --model` takes it."""
    arch: str | None = None
    """timm's name of a checkpoint file's architecture, with --model."""

    def __post_init__(self) -> None:
        """Check the fields. Raises ConfigError."""
        if self.arch is not None and self.model is None:
            raise ConfigError(f"arch: {self.arch} is the architecture of a checkpoint file; name the file with --model")


@dataclass(frozen=True)
class CompletionConfig(DebugConfig):
    """Print the script that completes commands and flags in a shell."""

    shell: Literal["bash", "zsh", "fish", "tcsh"] = "bash"
    """Shell to complete in."""


@dataclass(frozen=True)
class DemoConfig(DeviceConfig):
    """Adapt a small model to photographs of hand signs, without labels, and measure the change."""

    out: str = "upstep-demo"
    """Folder for the run."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    resume: bool = False
    """Continue a stopped demo in --out. Without it and --overwrite too, a stopped demo continues and a finished one is
    run again."""
    source: str | None = None
    """Labeled images of the model's original domain, to measure forgetting; the package includes none."""
    steps: int | None = None
    """Number of steps. Default: the demo's recipe."""
    seed: int = 0
    """Seed of the run, 0 to 4294967295."""

    def __post_init__(self) -> None:
        """Check every field. Raises ConfigError."""
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite: give one of them, not both")
        at_least(self, "steps", 1)
        check_seed(self.seed)
