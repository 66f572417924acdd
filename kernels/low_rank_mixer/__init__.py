"""Low-rank mixers of LoSA."""

from .op import low_rank_mixer, low_rank_mixer_reference

__all__ = ["low_rank_mixer", "low_rank_mixer_reference"]
