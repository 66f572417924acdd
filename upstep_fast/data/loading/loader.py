"""Batches of decoded images in a random order that a resumed run repeats, read ahead by threads.

Epoch e visits the images in the order of splitmix64(seed, e, index): a permutation that no state is kept for, so the
batch of step t is a pure function of (seed, t), and seeking any step costs one sort. A bad image is replaced by
a draw from (seed, epoch, index), never by its neighbor, which would count some images twice; it is counted and listed.

Threads, not processes: decoders release the GIL, pixels need no copy, and there is no worker to be killed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.decode.gpu_jpeg import GpuReader
from upstep_fast.data.keyed_random import bits_array
from upstep_fast.data.loading.fetcher import Chunk, Fetcher
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.loading.prefetch import Ready, prefetch
from upstep_fast.data.loading.skipped_images import SkippedImages, map_readable, read_image, write_skipped
from upstep_fast.data.sources.source import Source
from upstep_fast.data.views.resize import eval_resize
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.runtime import machine

log = logging.getLogger(__name__)
CACHE_BYTES = 256 << 20  # decoded images kept in memory
AHEAD = 3  # batches in flight
MAX_AHEAD_BYTES = 1 << 30  # decoded images that wait for their batch; fewer batches are in flight if they are larger


@dataclass(frozen=True)
class Batch:
    """Decoded images of one step; the tensors are shared with a cache and must not be written to."""

    images: list[Tensor]  # B of uint8 [C, H, W], of any sizes; on the CPU but for those that a GPU decoded
    indices: Tensor  # [B] int64, position of each image in the source (a replacement has its own index)
    epoch: int
    replaced: int  # number of images of this batch that replace bad ones
    views: Any = None  # result of the loader's `make_views`, ready on the current stream


class Loader:
    """Endless iterator over batches of a source, epoch after epoch.

    batch_size: images per step over all ranks; rank r of world_size gets the r-th slice of the global batch.
    num_workers: decoding threads; 0 decodes in `next`. drop_last: leave out an epoch's last, smaller batch.
    min_side: images are decoded at a fraction of their size as long as both sides keep this many pixels
    (ViewConfig.min_side); None: never. transform: applied to every decoded image, in the threads.
    make_views, device: computes `Batch.views` of each batch; on a CUDA device ahead of time, on a stream of its own.
    decode: "cuda" decodes JPEGs on the GPU (gpu_jpeg.py), which needs a CUDA device; their images stay there.
    skipped: collects the bad images, those of earlier calls included. max_bad_fraction: `next` raises DataError once
    they are more than this fraction of the source.

    `data_wait` is the time in seconds that the last `next` spent waiting. Raises ValueError or ConfigError, naming
    the argument.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 0.01,
        skipped: SkippedImages | None = None,
        start_step: int = 0,
        drop_last: bool = True,
        shuffle: bool = True,
        min_side: int | None = None,
        channels: int = 3,
        transform: Callable[[Tensor], Tensor] | None = None,
        make_views: Callable[[Batch], Any] | None = None,
        device: torch.device | None = None,
        decode: str = "cpu",
    ) -> None:
        _check_batches(len(source), batch_size, rank, world_size, drop_last)
        if decode == "cuda" and channels != 3:
            raise ConfigError(f"decode: cuda gives RGB, the model takes {channels} channels; use --decode cpu")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.steps_per_epoch = len(source) // batch_size if drop_last else -(-len(source) // batch_size)
        self.max_bad_fraction = max_bad_fraction
        self.skipped = SkippedImages() if skipped is None else skipped
        self.data_wait = 0.0
        self._make_views, self._device = make_views, device
        gpu = GpuReader(device or torch.device("cpu"), min_side=min_side) if decode == "cuda" else None
        limits: dict[str, Any] = {"min_side": min_side, "max_bad_fraction": max_bad_fraction, "cache": CACHE_BYTES}
        self._fetcher = Fetcher(source, seed=seed, channels=channels, gpu=gpu, transform=transform, **limits)
        self._order: tuple[int, np.ndarray] | None = None
        self._num_workers = num_workers
        self._batches: Generator[Ready[list[Chunk]]] | None = None
        self._closed = False
        self.seek(start_step)

    def seek(self, step: int) -> None:
        """Make `step` the next batch. Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step: got {step}, must be at least 0")
        self._stop()
        self.step = step

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """Return the epoch and this rank's indices [B] of a step, before any replacement."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self.source), self.seed, epoch, self.shuffle)
        local = self.batch_size // self.world_size
        start = at * self.batch_size + self.rank * local
        return epoch, self._order[1][start : start + local]

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        return self.take()

    def take(self, *, with_views: bool = True) -> Batch:
        """Return the next batch; without views they are not computed on a CPU (a GPU computes them ahead)."""
        if self._closed:
            raise ValueError("loader: closed; make another")
        began = time.perf_counter()
        if self._batches is None:
            self._batches = self._batches_from(self.step)
        ready = next(self._batches)
        self.data_wait = time.perf_counter() - began
        self._record_bad_images(ready.item)
        batch = _join(ready.item, ready.wait() if with_views or ready.event else None)
        self.step += 1
        return batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads after the images that they are decoding."""
        self._stop()
        self._closed = True
        if (gpu := self._fetcher.gpu) and gpu.refused:
            log.info("decode: the GPU refused %d JPEGs, the CPU decoded them", gpu.refused)
            gpu.refused = 0

    def write_skipped(self, path: str | Path) -> None:
        """Write name,reason of every image skipped so far, those that could not be listed included. Raises OSError."""
        write_skipped(path, [*self.source.problems, *self.skipped.items()])

    def _batches_from(self, step: int) -> Generator[Ready[list[Chunk]]]:
        def jobs() -> Iterator[tuple[int, np.ndarray, int]]:
            at = step
            while True:
                epoch, indices = self.indices(at)
                parts = np.array_split(indices, min(len(indices), max(1, 4 * self._num_workers)))
                yield from ((epoch, part, len(parts)) for part in parts)
                at += 1

        def batches() -> Generator[list[Chunk]]:
            in_flight = AHEAD * max(1, 4 * self._num_workers)
            chunks = ordered_map(
                lambda job: self._fetcher.chunk(*job),
                jobs(),
                self._num_workers,
                in_flight,
                lambda chunk: chunk.num_bytes,
                MAX_AHEAD_BYTES,
            )
            with contextlib.closing(chunks):
                for first in chunks:
                    yield [first] + [next(chunks) for _ in range(first.num_chunks - 1)]

        return prefetch(batches(), self._views_of, self._device)

    def _views_of(self, chunks: list[Chunk]) -> Any:
        if self._make_views is None or any(chunk.error for chunk in chunks):
            return None
        return self._make_views(_join(chunks))

    def _record_bad_images(self, chunks: list[Chunk]) -> None:
        """Record the bad images of a batch that is taken, not merely decoded: a resumed run then has equal counts."""
        for chunk in chunks:
            for index, reason in chunk.bad:
                self.skipped[self.source.name(index)] = reason
        self.skipped.check(len(self.source), self.max_bad_fraction)
        if error := next((chunk.error for chunk in chunks if chunk.error), None):
            raise DataError(error)

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None


def _join(chunks: list[Chunk], views: Any = None) -> Batch:
    return Batch(
        images=[image for chunk in chunks for image in chunk.images],
        indices=torch.tensor([index for chunk in chunks for index in chunk.indices], dtype=torch.int64),
        epoch=chunks[0].epoch,
        replaced=sum(chunk.replaced for chunk in chunks),
        views=views,
    )


def _check_batches(num_images: int, batch_size: int, rank: int, world_size: int, drop_last: bool) -> None:
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size: got {batch_size}, must be a positive multiple of world_size {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank}, must lie in 0 to {world_size - 1}")
    if drop_last and batch_size > num_images:
        raise ValueError(f"batch_size: {batch_size} is above the {num_images} images; lower it or use drop_last=False")
    if not drop_last and world_size > 1:
        raise ValueError("drop_last: ranks need batches of one size; use drop_last=True with several ranks")


def load_images(
    source: Source,
    indices: Sequence[int] | None = None,
    *,
    size: int | tuple[int, int],
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    batch_size: int = 256,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
    skipped: SkippedImages | None = None,
    channels: int = 3,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the readable images in order, by timm's evaluation transform without its normalization.

    indices: positions in the source; None: all. size: pixels, a side or (H, W). num_workers: threads; None: one per
    core, at most 16. skipped: collects the bad images. Yields ([B] int64 indices, [B, C, H, W] uint8). Raises
    DataError when more than `max_bad_fraction` are bad.
    """
    positions = range(len(source)) if indices is None else [int(i) for i in indices]
    height, width = (size, size) if isinstance(size, int) else size

    def read(index: int) -> Tensor:
        image = read_image(source, index, channels=channels)
        return eval_resize(image, (height, width), interpolation, crop_pct, crop_mode)

    readable = map_readable(
        read,
        source,
        positions,
        SkippedImages() if skipped is None else skipped,
        num_workers=machine.num_workers(num_workers),
        ahead=2 * batch_size,
        max_bad_fraction=max_bad_fraction,
    )
    with contextlib.closing(readable):
        while batch := list(itertools.islice(readable, batch_size)):
            yield torch.tensor([index for index, _ in batch]), torch.stack([x for _, x in batch])


def permutation(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return the order of an epoch, [n] int64: indices sorted by splitmix64(seed, epoch, index)."""
    if not shuffle:
        return np.arange(n)
    return np.argsort(bits_array(seed, epoch, np.arange(n, dtype=np.uint64)), kind="stable")
