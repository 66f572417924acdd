"""What a user may say: one frozen dataclass a command."""

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.base import BackboneConfig, ModelConfig
from upstep_fast.config.evaluate import EmbedConfig, EvalConfig

__all__ = ["AdaptConfig", "BackboneConfig", "EmbedConfig", "EvalConfig", "ModelConfig"]
