"""A run that ends within a time, --budget: the number of steps that fit, and the blocks with adapters.

    N = (budget - elapsed - reserve) / s           steps at the start; s: seconds of a measured step
    reserve = END + seconds of a forward pass x (6 verdict images + 2 whitening images + 2 report images)

If fewer than FEW steps fit with adapters in all blocks, only the last third of the blocks has adapters, as in preset
fast. N is the run's number of steps like any other. While the run goes on, s is the mean of the last steps, and once
the end that fits differs by more than TOLERANCE of the steps, the rest of the schedule (learning rate to 0, and
all else that follows the steps) is stretched over the steps that fit now:

    position(t) = p + (t - t0) (N - p) / (end - t0)         from step t0 on, where the position was p
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upstep_fast.config.adapt import AdaptConfig, third
from upstep_fast.config.flat import replace_flat
from upstep_fast.config.resolve import MAX_PASSES, resolve
from upstep_fast.config.training import parse_seconds
from upstep_fast.errors import ConfigError
from upstep_fast.model import backbone as backbones
from upstep_fast.report.image_panels import MAX_IMAGES as REPORT_IMAGES
from upstep_fast.report.run_record import read_config
from upstep_fast.runtime import distributed, started
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.terminal import counted, format_duration
from upstep_fast.train import run_whitening, verdict
from upstep_fast.train.memory.fit import settle
from upstep_fast.train.memory.measure import CPU_IMAGES, one_step
from upstep_fast.train.out_of_memory import is_out_of_memory
from upstep_fast.train.state import Plan
from upstep_fast.train.validator import num_held_out

log = logging.getLogger("upstep_fast")

clock = time.monotonic
FEW, FEWEST = 80, 10  # steps: below which fewer blocks are trained, and below which there is no run
END = 2.0  # seconds of writing adapter and report
TOLERANCE = 0.02
RECENT = 20  # steps
EVERY = 10  # steps between two exchanges of the end under torchrun


@dataclass(frozen=True)
class After:
    """Images of verdict, whitening and report after the last step; batch and views an image of a step."""

    verdict: int
    whitening: int
    report: int
    batch: int
    views: int

    def steps(self, planned: int) -> float:
        """Return their forward passes, in those of a step, after so many steps, of which they are a part at most."""
        trained = planned * self.batch
        judged = min(verdict.PASSES * self.verdict, verdict.SHARE * trained * self.views)
        fitted = 2 * min(self.whitening, run_whitening.SHARE * trained)
        return (judged + fitted + 2 * self.report) / (self.batch * self.views)


@dataclass(frozen=True)
class Cost:
    """Measured seconds of a step and of its forward half, and what comes after the last step."""

    step: float
    forward: float
    after: After

    def steps(self, seconds: float) -> int:
        """Return the steps that fit in so many seconds together with what comes after them."""
        steps = seconds / self.step
        for _ in range(3):  # what comes after depends on their number, a little
            steps = (seconds - self.end(int(steps))) / self.step
        return max(0, int(steps))

    def end(self, steps: int, load: float = 1.0) -> float:
        """Return the seconds after so many steps. load: factor on the measured seconds."""
        return END + load * self.forward * self.after.steps(max(0, steps))


@dataclass
class Budget:
    """The time left of a run. ends: by `clock`; cost: as measured before; planned: steps."""

    ends: float
    cost: Cost
    planned: int
    times: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT + 1))
    rows: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT))

    def replan(self, plan: Plan, step: int, row: dict[str, Any]) -> Plan:
        """Return the plan after `step` steps; the one given if its end still fits. row: of the last step. Collective.

        The row may be completed later.
        """
        self.times.append(clock())
        self.rows.append(row)
        if distributed.size() > 1 and step % EVERY:
            return plan
        end = step + max(0, int(self._left() / self._seconds()))
        if distributed.size() > 1:
            end = distributed.gather(end)[0]
        return plan if abs(end - plan.end) <= TOLERANCE * plan.end else plan.ending(step, end)

    def _left(self) -> float:
        """Return the seconds left for steps; forward passes after them take as much longer as those of the steps."""
        measured = [row["forward_s"] for row in self.rows if row.get("forward_s")]
        load = statistics.median(measured) / self.cost.forward if measured else 1.0
        return self.ends - self.times[-1] - self.cost.end(self.planned, load)

    def _seconds(self) -> float:
        """Return the seconds of a step: the mean of the last ones, without the first of all."""
        if len(self.times) < 2:
            return self.cost.step
        return max(1e-9, (self.times[-1] - self.times[0]) / (len(self.times) - 1))


def plan(config: AdaptConfig, compute: Compute, num_images: int) -> tuple[AdaptConfig, Budget | None]:
    """Return the configuration with the steps and blocks that fit in --budget, in its place, and the time left.

    A resumed run keeps the steps and blocks that it had, and is not planned again. Collective. Raises ConfigError for
    a time in which FEWEST steps do not fit.
    """
    if config.optimization.budget is None:
        return config, None
    if config.output.resume and (recorded := _recorded(Path(config.output.out), config)):
        return replace_flat(config, budget=None, **recorded), None
    seconds, config = parse_seconds(config.optimization.budget), replace_flat(config, budget=None)
    began = started.began()
    cost, steps = _measure(config, compute, num_images, began + seconds)
    if steps < FEW and (blocks := _third(config)):
        config = replace_flat(config, lora_blocks=blocks)
        cost, steps = _measure(config, compute, num_images, began + seconds)
    if steps < FEWEST:
        need = clock() - began + cost.end(FEWEST) + FEWEST * cost.step
        raise ConfigError(
            f"budget: {format_duration(seconds)} leave time for {counted(steps, 'step')} of {cost.after.batch} images: "
            f"one takes {cost.step:.2g} s here; give at least {format_duration(1.2 * need)}, or a smaller --batch-size "
            "or model"
        )
    default = "the last third of the blocks" if config.learns_by == "vicreg" else "all blocks"
    where = default if config.lora.blocks is None else counted(config.lora.blocks, "block")
    log.info("budget: %s: %s with adapters in %s", format_duration(seconds), counted(steps, "step"), where)
    if (passes := steps * cost.after.batch / num_images) > MAX_PASSES:
        log.warning("budget: %.0f passes over %d images; a shorter run may be as good", passes, num_images)
    return replace_flat(config, steps=steps), Budget(began + seconds, cost, steps)


def _third(config: AdaptConfig) -> int | None:
    """Return a third of the model's blocks; None if it has no more, the user has chosen, or no adapters are trained."""
    if config.learns_by != "clustering" or config.lora.tune != "lora" or config.lora.blocks is not None:
        return None
    return third(len(backbones.load_from(config.model, pretrained=False).blocks))


def _measure(config: AdaptConfig, compute: Compute, num_images: int, ends: float) -> tuple[Cost, int]:
    """Return the cost of this run's steps, from two after a first one, and the steps that fit until `ends`.

    Both are the first rank's. Collective, as the steps are. Raises ConfigError where they do not fit into memory.
    """
    config = resolve(replace_flat(config, steps=1), num_images, distributed.size()).config
    batch = config.optimization.batch_size // distributed.size()
    on_cpu = compute.device.type == "cpu"
    images = max(2, min(batch, CPU_IMAGES)) if on_cpu else batch
    if not on_cpu:  # where a whole batch may need another level than fast
        config = settle(config, compute)
    elif config.memory.level == "auto":
        config = replace_flat(config, memory="fast")
    take_step, seconds = one_step(replace_flat(config, batch_size=images), compute)
    try:
        take_step()
        start = clock()
        take_step()
        take_step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"budget: no memory for a step of {images} images; lower --batch-size") from error
    step, forward = clock() - start, sum(seconds[2::2])
    step, forward = distributed.gather([each / 2 * batch / images for each in (step, forward)])[0]
    cost = Cost(step, forward, _after(config, num_images))
    return cost, distributed.gather(cost.steps(ends - clock()))[0]


def _after(config: AdaptConfig, num_images: int) -> After:
    judged = config.validation.verdict
    return After(
        verdict=num_held_out(num_images) if judged == "auto" else 0 if judged == "off" else judged,
        whitening=0 if config.output.whitening == "off" else min(run_whitening.MOST, num_images),
        report=min(REPORT_IMAGES, num_images) if config.output.report_images else 0,
        batch=config.optimization.batch_size,
        views=1 + (config.method == "upstep" and config.objective.layout == "symmetric"),
    )


def _recorded(out: Path, config: AdaptConfig) -> dict[str, Any] | None:
    """Return the steps of the run in `out`, and its blocks if the user has chosen none; None if there is no run."""
    try:
        recorded = read_config(out)
    except ConfigError:
        return None
    chosen = config.lora.blocks
    return {"steps": recorded.get("steps"), "lora_blocks": recorded.get("lora_blocks") if chosen is None else chosen}
