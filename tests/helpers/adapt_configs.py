"""Configurations of `adapt` that tests start from."""

from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.config.presets import PRESETS


def upstep_config(**flags: Any) -> AdaptConfig:
    """Return UpStep's own recipe, clustering and its gate, with `flags` over it."""
    config: AdaptConfig = from_flat(AdaptConfig, **(PRESETS["upstep"] | flags))
    return config
