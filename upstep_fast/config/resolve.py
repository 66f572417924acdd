"""Values of a configuration that depend on the data: length of the run, batch, prototypes and queue.

Without --steps and --epochs, for N images in batches of B:

    steps = max(10 N / B, min(400, 30 N / B))       10 passes over the data; few images: up to 400 steps or 30 passes
"""

from __future__ import annotations

from dataclasses import dataclass

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import flat, replace_flat
from upstep_fast.errors import ConfigError

MIN_PASSES, MIN_STEPS, MAX_PASSES = 10, 400, 30


@dataclass(frozen=True)
class Resolved:
    """A configuration with `steps` set, and what was reduced to the number of images."""

    config: AdaptConfig
    reduced: dict[str, tuple[int, int]]  # flag: (requested, possible)
    has_few_images: bool  # the number of steps is that of MAX_PASSES


def resolve(config: AdaptConfig, num_images: int, num_ranks: int = 1) -> Resolved:
    """Set the number of steps, and reduce batch, prototypes and queue to the number of images.

    DIET's prototypes are its classes: as many as images.
    Raises ConfigError for a batch that the ranks cannot share and for fewer than two images per rank.
    """
    run = config.optimization
    if run.batch_size % num_ranks:
        raise ConfigError(f"batch_size: {run.batch_size} images do not divide over {num_ranks} ranks; take a multiple")
    batch = min(run.batch_size, num_images) // num_ranks * num_ranks
    if batch < 2:
        raise ConfigError(f"data: {num_images} image found, adaptation needs at least {max(2, num_ranks)}")
    possible = {
        "batch_size": batch,
        "queue": min(config.experimental.queue, num_images),
    }
    if config.method != "diet" and config.objective.loss == "clustering":
        possible["prototypes"] = min(config.objective.prototypes, num_images)
    requested = flat(config)
    reduced = {name: (requested[name], value) for name, value in possible.items() if value != requested[name]}
    if config.method == "diet":  # a class for each image
        possible["prototypes"] = num_images
    steps = _num_steps(run.steps, run.epochs, num_images, batch)
    has_few_images = run.steps is None and run.epochs is None and steps < MIN_STEPS
    return Resolved(replace_flat(config, **possible, steps=steps, epochs=None), reduced, has_few_images)


def _num_steps(steps: int | None, epochs: float | None, num_images: int, batch: int) -> int:
    if steps is not None:
        return steps
    if epochs is not None:
        return max(1, round(epochs * num_images / batch))
    return max(MIN_PASSES * (num_images // batch), min(MIN_STEPS, MAX_PASSES * num_images // batch))
