"""Configuration: one frozen dataclass per command, made of groups that commands share."""

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.base import BackboneConfig, ModelConfig
from upstep_fast.config.evaluate import EmbedConfig, EvalConfig
from upstep_fast.config.tools import (
    BenchConfig,
    CompletionConfig,
    DemoConfig,
    DoctorConfig,
    ExportConfig,
    ModelsConfig,
    ReportConfig,
)

__all__ = [
    "AdaptConfig",
    "BackboneConfig",
    "BenchConfig",
    "CompletionConfig",
    "DemoConfig",
    "DoctorConfig",
    "EmbedConfig",
    "EvalConfig",
    "ExportConfig",
    "ModelConfig",
    "ModelsConfig",
    "ReportConfig",
]
