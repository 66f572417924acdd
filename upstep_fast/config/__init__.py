"""What a user may say: one frozen dataclass a command."""

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
