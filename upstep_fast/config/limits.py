"""Numbers that no configuration may hold: infinities, and sizes with which a run would never end or even start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from upstep_fast.errors import ConfigError

_SIZE, _COUNT = 2**15, 10**6
# largest values by flag, far above what anybody has used
LARGEST: dict[str, float] = {
    **dict.fromkeys(("img_size", "local_size", "head_hidden", "decoder_width"), _SIZE),
    **dict.fromkeys(("batch_size", "prototypes", "queue", "accumulate", "epochs", "runs", "world_size"), _COUNT),
    **dict.fromkeys(("keep_checkpoints", "verify_resume", "max_skips", "rank_timeout", "k"), _COUNT),
    **dict.fromkeys(("head_dim", "lora_r", "losa_rank", "losa_token_rank", "decoder_lora_r", "frames"), 4096),
    **dict.fromkeys(("decoder_depth", "decoder_heads", "local_views", "num_workers", "sinkhorn_iterations"), 1000),
    "steps": 10**9,
}


def check_numbers(flags: Mapping[str, Any]) -> None:
    """Raise ConfigError naming the first of `flags` that is not finite or above its limit."""
    for name, given in flags.items():
        for value in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}: got {value}, must be a finite number")
            if isinstance(value, (int, float)) and abs(value) > LARGEST.get(name, math.inf):
                raise ConfigError(f"{name}: got {value}, must be at most {LARGEST[name]}")
