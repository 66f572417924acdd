"""Strength of the written adapter: the factor on each block's update, given or chosen on held-out images.

strength of block l of L:  first + l / (L - 1) (last - first)        first: --strength-first, last: --strength
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.model import peft_format
from upstep_fast.runtime import distributed

CANDIDATES = (0.25, 0.5, 0.75, 1.0)

log = logging.getLogger("upstep_fast")

Gain = Callable[[float, float], float]  # (first, last) -> predicted gain on held-out images, in points


def at_strength(files: Mapping[str, bytes], first: float, last: float, depth: int) -> dict[str, bytes]:
    """Return an adapter's files at these strengths of the first and the last of the model's `depth` blocks."""
    if (first, last) == (1.0, 1.0):
        return dict(files)
    return peft_format.scaled(files, peft_format.strength_by_depth(first, last, depth))


def at_given_strength(files: Mapping[str, bytes], config: AdaptConfig, depth: int) -> dict[str, bytes]:
    """Return an adapter's files at the strength of the configuration; at full strength if that is chosen at the end."""
    last, first = config.validation.strength, config.experimental.strength_first
    if isinstance(last, str) or isinstance(first, str):
        return dict(files)
    return at_strength(files, last if first is None else first, last, depth)


def is_chosen_at_end(config: AdaptConfig) -> bool:
    """Return whether --strength or --strength-first is auto."""
    return "auto" in (config.validation.strength, config.experimental.strength_first)


def choose_strength(config: AdaptConfig, gain: Gain | None) -> tuple[float, float]:
    """Return the strengths of the first and the last block.

    auto: the candidates with the largest gain, first one for all blocks, then another for the first block. Collective
    if one of them is auto. gain: None without a validation, where auto stands for 1.
    """
    last, first = config.validation.strength, config.experimental.strength_first
    if last != "auto" and first != "auto":
        return last if first is None else first, last
    if gain is None:
        return 1.0, 1.0
    distributed.gather(None)  # the other ranks read the adapter that rank 0 has written
    candidates = CANDIDATES if last == "auto" else (float(last),)
    if isinstance(first, (float, int)):
        chosen = first, max(candidates, key=lambda last: gain(first, last))
    else:
        strength = max(candidates, key=lambda strength: gain(strength, strength))
        firsts = [strength] if first is None else sorted({0.0, *CANDIDATES, strength})
        chosen = (max(firsts, key=lambda first: gain(first, strength)) if len(firsts) > 1 else strength), strength
    log.info("judge: strength %g in the first block, %g in the last has the largest predicted gain", *chosen)
    return chosen
