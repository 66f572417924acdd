"""What a user may say: one frozen dataclass a command."""

from upstep_fast.config.adapt import AdaptConfig, BackboneConfig, EmbedConfig, EvalConfig, ModelConfig

__all__ = ["AdaptConfig", "BackboneConfig", "EmbedConfig", "EvalConfig", "ModelConfig"]
