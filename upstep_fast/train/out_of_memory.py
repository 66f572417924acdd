"""Out of memory in a step: detected on every rank, then smaller micro-batches (GradCache) or an error with a cure."""

from __future__ import annotations

import logging

import torch

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.views.types import Views
from upstep_fast.errors import RunFailedError
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute
from upstep_fast.train.state import RunState

log = logging.getLogger("upstep_fast")


class OutOfMemoryError(Exception):
    """Signal that a rank is out of memory, raised on all ranks; the state is unchanged."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host had no memory left; torch has no exception class for the host's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def halve_microbatch(state: RunState, views: Views, config: AdaptConfig, compute: Compute) -> None:
    """Double the number of micro-batches. Collective.

    Raises RunFailedError without --auto-batch, or where a micro-batch is a single view already.
    """
    method = state.method
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
    if not config.memory.auto_batch or method.num_microbatches > views.num_images:
        raise RunFailedError(explanation(state, views, config, compute))
    method.num_microbatches *= 2
    log.warning(
        "step %d: out of memory; from now on each step runs in %d micro-batches",
        state.step,
        method.num_microbatches,
    )


def explanation(state: RunState, views: Views, config: AdaptConfig, compute: Compute) -> str:
    """Return the error message: what did not fit, and the cure."""
    taken = ""
    if compute.device.type == "cuda":
        total = torch.cuda.get_device_properties(compute.device).total_memory
        taken = (
            f" ({torch.cuda.max_memory_allocated(compute.device) / 2**30:.1f} of {total / 2**30:.1f} GiB were taken)"
        )
    over = f" over {distributed.size()} ranks" if distributed.size() > 1 else ""
    parts = f" in {state.method.num_microbatches} micro-batches" if state.method.num_microbatches > 1 else ""
    cures = [
        "add --auto-batch (micro-batches, equal result)" if not config.memory.auto_batch else "",
        "take --memory lean" if config.memory.level != "lean" else "",
        "lower --batch-size",
    ]
    return (
        f"step {state.step}: out of memory on {compute.device}{taken} with {config.optimization.batch_size} images of "
        f"{views.height} x {views.width}{over}{parts} and --memory {config.memory.level}; "
        f"{' or '.join(c for c in cures if c)}; no step was applied in part"
    )
