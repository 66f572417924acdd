"""Batches of a run: the loader of its images, which makes the method's views as well."""

from __future__ import annotations

from collections.abc import Iterator

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.loading.loader import Loader
from upstep_fast.data.sources.source import Source
from upstep_fast.data.views.types import Views
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.machine import num_workers
from upstep_fast.train.state import RunState

INITIAL_IMAGES = 4096  # seen once, for k-means prototypes, the base model's center and the queue unless that is longer


def make_loader(config: AdaptConfig, source: Source, state: RunState, compute: Compute) -> Loader:
    """Return the loader of this rank's batches and their views, from `state.step` on.

    Unreadable images are recorded in `state.skipped`.
    """
    return Loader(
        source,
        batch_size=config.optimization.batch_size,
        rank=distributed.rank(),
        world_size=distributed.size(),
        seed=config.runtime.seed,
        num_workers=num_workers(config.data.num_workers),
        max_bad_fraction=config.data.max_bad_fraction,
        skipped=state.skipped,
        start_step=state.step,
        channels=state.method.vit.patch_embed.proj.in_channels,
        min_side=state.method.min_side,
        make_views=lambda batch: state.method.views(batch, compute.device),
        device=compute.device,
        decode=config.data.decode,
    )


def initial_views(config: AdaptConfig, source: Source, state: RunState, compute: Compute) -> Iterator[Views]:
    """Yield the views of the first batches, for `Method.initialize_from_data`."""
    num_images = min(len(source), max(INITIAL_IMAGES, config.experimental.queue))
    with make_loader(config, source, state, compute) as loader:
        for _, batch in zip(range(-(-num_images // config.optimization.batch_size)), loader, strict=False):
            yield batch.views
