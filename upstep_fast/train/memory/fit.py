"""Choice of the memory level and the batch that fit, before a run starts.

    needed = 1.1 x counted peak           the count is within 10 % of the real peak (tests/train/test_memory.py)

The first of fast, balanced and lean that fits keeps the batch; if lean does not fit, the batch is reduced.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import flatten_tables
from upstep_fast.config.flat import replace_flat
from upstep_fast.data.loading.loader import CACHE_BYTES
from upstep_fast.engine.block import Memory
from upstep_fast.errors import ConfigError, UpstepError
from upstep_fast.input_files import read_toml
from upstep_fast.runtime import distributed, machine
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.machine import format_bytes
from upstep_fast.runtime.run_folder import CONFIG
from upstep_fast.train.memory import count as step_memory
from upstep_fast.train.memory import images
from upstep_fast.train.memory.count import StepMemory
from upstep_fast.train.memory.images import ImageMemory

log = logging.getLogger("upstep_fast")

LEVELS: tuple[Memory, ...] = get_args(Memory)  # from the fastest to the smallest
MARGIN = 1.1


@dataclass(frozen=True)
class Choice:
    """Memory level and number of images per step and device, with the memory they take."""

    memory: Memory
    batch_size: int
    step: StepMemory

    @property
    def needed(self) -> int:
        """Free bytes that the run needs, margin included."""
        return round(MARGIN * self.step.peak) + self.step.waiting


Chooser = Callable[[Memory, int], Choice]  # (level, batch) -> counted choice


def chooser(config: AdaptConfig, compute: Compute, on: str | None = None) -> Chooser:
    """Return a function that counts this run at a level and a batch; each pair is counted once. on: see `count`."""
    counted: dict[tuple[Memory, int], Choice] = {}

    def choose(memory: Memory, batch: int) -> Choice:
        if (memory, batch) not in counted:
            step = step_memory.count(replace_flat(config, memory=memory, batch_size=batch), compute, on=on)
            counted[memory, batch] = Choice(memory, batch, step)
        return counted[memory, batch]

    return choose


def fit(choose: Chooser, batch: int, limit: int | None) -> Choice:
    """Return the fastest level at which `batch` fits in `limit` bytes, or the largest batch that fits the last level.

    limit: None if unknown, which returns the first level. The batch is within an eighth of the largest. Raises
    ConfigError if not even two images fit.
    """
    if limit is None:
        return choose(LEVELS[0], batch)
    for level in LEVELS:
        if (choice := choose(level, batch)).needed <= limit:
            return choice
    fits, too_large = choose(LEVELS[-1], 2), batch
    if fits.needed > limit:
        raise ConfigError(
            f"memory: two images at level {LEVELS[-1]} need {format_bytes(fits.needed)}, "
            f"{format_bytes(max(0, limit))} are free; take a smaller model or --img-size"
        )
    while too_large - fits.batch_size > max(1, fits.batch_size // 8):
        middle = (fits.batch_size + too_large) // 2
        # a multiple of eight: kernels are faster
        middle = middle - middle % 8 if middle - middle % 8 > fits.batch_size else middle
        choice = choose(LEVELS[-1], middle)
        fits, too_large = (choice, too_large) if choice.needed <= limit else (fits, middle)
    return fits


def settle(config: AdaptConfig, compute: Compute, decoded: ImageMemory | None = None) -> AdaptConfig:
    """Return the configuration with `memory` "auto" replaced by a level. Collective.

    decoded: estimate of this rank's decoded images; None: not checked. Raises ConfigError, naming the
    level and the batch that would fit, if the run does not fit.
    """
    is_checked = config.memory.check and not config.memory.auto_batch
    if not is_checked and config.memory.level != "auto":
        return config
    if config.output.resume and config.memory.level == "auto" and (level := _level_of(Path(config.output.out))):
        config = replace_flat(config, memory=level)
    first = LEVELS[0] if config.memory.level == "auto" else config.memory.level
    # all ranks decide by the least free memory
    world_size, free_by_rank = distributed.size(), distributed.gather(machine.free_bytes(compute.device))
    free = min(free_by_rank, key=lambda value: math.inf if value is None else value)
    if free is None:
        log.warning("memory: the free memory is unknown here, so it is not checked")
        return replace_flat(config, memory=first)
    if decoded is not None:
        images.check(decoded, distributed.gather(machine.free_bytes(torch.device("cpu"))), distributed.local_size())
    limit = free - _host_bytes(compute, decoded)
    batch = max(2, config.optimization.batch_size // world_size)
    choose = chooser(config, compute)
    try:
        choice = choose(first, batch)
        if choice.needed > limit:
            choice = _replacement(config, choose, choice, limit, world_size)
    except UpstepError:
        raise
    except Exception as error:  # a model that cannot be counted may still run
        log.warning("memory: not checked (%s: %s)", type(error).__name__, str(error).split("\n")[0])
        return replace_flat(config, memory=first)
    peak = format_bytes(choice.step.peak) + (f" at most, {decoded}" if decoded else " at most")
    log.info("memory: level %s, %s, %s free", choice.memory, peak, format_bytes(free))
    return replace_flat(config, memory=choice.memory)


def _host_bytes(compute: Compute, decoded: ImageMemory | None) -> int:
    """Return what the loader's images take of the step's memory: on a CPU and an Apple GPU they share it."""
    if compute.device.type == "cuda":
        return 0
    return max(CACHE_BYTES, decoded.needed if decoded else 0)


def _replacement(config: AdaptConfig, choose: Chooser, choice: Choice, limit: int, world_size: int) -> Choice:
    """Return what replaces a choice that does not fit. Raises ConfigError if the user must decide."""
    try:
        best: Choice | None = fit(choose, choice.batch_size, limit)
    except ConfigError:
        best = None
    if config.memory.level == "auto" and best is not None and best.batch_size == choice.batch_size:
        return best
    if not config.memory.check or config.memory.auto_batch:
        return choose(LEVELS[-1], choice.batch_size)
    cure = "not even two images would: take a smaller model or --img-size"
    if best is not None:
        cure = f"--memory {best.memory} --batch-size {best.batch_size * world_size} would"
    sizes = f"they need {format_bytes(choice.needed)}, {format_bytes(max(0, limit))} are free"
    raise ConfigError(
        f"memory: {config.optimization.batch_size} images per step at level {choice.memory} do not fit: {sizes}; "
        f"{cure}; --no-memory-check starts anyway"
    )


def _level_of(out: Path) -> Any:
    """Return the level of the run in `out`, None if there is none."""
    try:
        level = flatten_tables(read_toml(out / CONFIG, "config"), AdaptConfig).get("memory")
    except ConfigError:
        return None
    return level if level in LEVELS else None
