"""The order of images, read and decoded ahead of time by threads; the same again after a resume.

Epoch e visits the images in the order of splitmix64(seed, e, index): a permutation that no state is kept for, so the
batch of step t is a pure function of (seed, t), and going to any step costs one sort. A bad image is replaced by
a draw from (seed, epoch, index), never by its neighbour, which would count some images twice; it is counted and listed.

Threads, not processes: decoders release the GIL, pixels need no copy, and there is no worker to be killed.
"""

from __future__ import annotations

import contextlib
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
from upstep_fast.data.loading.skipped import check_bad, read_image, write_skipped
from upstep_fast.data.sources.source import DataError, Source
from upstep_fast.data.views.resize import eval_resize
from upstep_fast.errors import ConfigError
from upstep_fast.runtime.machine import default_workers

log = logging.getLogger(__name__)
CACHE_BYTES = 256 << 20  # decoded images kept in memory
AHEAD = 3  # batches in flight


@dataclass(frozen=True)
class Batch:
    """Decoded images of one step; tensors are shared with a cache, so do not write into them."""

    images: list[Tensor]  # B of uint8 [C, H, W], of any sizes; on the CPU but for those that a GPU decoded
    indices: Tensor  # [B] int64, where each image stands in the source (a replacement has its own index)
    epoch: int
    replaced: int  # how many images of this batch stand in for bad ones
    views: Any = None  # what the loader's `make_views` made of it, for the current stream


class Loader:
    """Batches of a source, epoch after epoch, without end.

    batch_size: images a step over all ranks; rank r of world_size gets the r-th slice of the same global batch.
    num_workers: decoding threads; 0 decodes in `next`. drop_last: an epoch's last, smaller batch is left out.
    min_side: JPEGs may be decoded at a fraction of their size as long as both sides keep this many pixels
    (ViewConfig.min_side); None: never.
    make_views, device: makes `Batch.views` of each batch; on a CUDA device ahead of time, on its own stream.
    decode: "cuda" gives JPEGs to the GPU's reader (gpu_jpeg.py), which needs a CUDA device: their images lie there.
    max_bad_fraction: DataError as soon as more than this part of the source has proved unreadable.

    `data_wait` is the time in seconds that the last `next` spent waiting; `skipped` maps bad images to reasons.
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
        start_step: int = 0,
        drop_last: bool = True,
        shuffle: bool = True,
        min_side: int | None = None,
        channels: int = 3,
        make_views: Callable[[Batch], Any] | None = None,
        device: torch.device | None = None,
        decode: str = "cpu",
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: got {batch_size}, must be a positive multiple of world_size {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, must lie in 0 to {world_size - 1}")
        if drop_last and batch_size > len(source):
            raise ValueError(
                f"batch_size: {batch_size} is above the {len(source)} images; lower it or use drop_last=False"
            )
        if not drop_last and world_size > 1:
            raise ValueError("drop_last: ranks need batches of one size; use drop_last=True with several ranks")
        if decode == "cuda" and channels != 3:
            raise ConfigError(f"decode: cuda gives RGB, the model takes {channels} channels; use --decode cpu")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.steps_per_epoch = len(source) // batch_size if drop_last else -(-len(source) // batch_size)
        self.max_bad_fraction = max_bad_fraction
        self.skipped: dict[str, str] = {}
        self.data_wait = 0.0
        self._make_views, self._device = make_views, device
        self._fetcher = Fetcher(
            source,
            seed=seed,
            channels=channels,
            min_side=min_side,
            max_bad_fraction=max_bad_fraction,
            cache=CACHE_BYTES,
            gpu=GpuReader(device or torch.device("cpu"), min_side=min_side) if decode == "cuda" else None,
        )
        self._order: tuple[int, np.ndarray] | None = None
        self._num_workers = num_workers
        self._batches: Generator[Ready[list[Chunk]]] | None = None
        self._closed = False
        self.seek(start_step)

    def seek(self, step: int) -> None:
        """The next batch will be that of `step`."""
        if step < 0:
            raise ValueError(f"step: got {step}, must be at least 0")
        self._stop()
        self.step = step

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch and this rank's images of a step, before any replacement."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self.source), self.seed, epoch, self.shuffle)
        own = self.batch_size // self.world_size
        start = at * self.batch_size + self.rank * own
        return epoch, self._order[1][start : start + own]

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("loader: it is closed; make another")
        began = time.perf_counter()
        if self._batches is None:
            self._batches = self._run(self.step)
        ready = next(self._batches)
        self.data_wait = time.perf_counter() - began
        self._count(ready.item)
        batch = _join(ready.item, ready.take())
        self.step += 1
        return batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what they are decoding is finished first."""
        self._stop()
        self._closed = True
        if (gpu := self._fetcher.gpu) and gpu.refused:
            log.info("decode: the GPU refused %d JPEGs, the CPU decoded them", gpu.refused)
            gpu.refused = 0

    def write_skipped(self, path: str | Path) -> None:
        """Write name,reason of every image left out so far, those that could not even be listed included."""
        write_skipped(path, [*self.source.problems, *self.skipped.items()])

    def _run(self, step: int) -> Generator[Ready[list[Chunk]]]:
        def jobs() -> Iterator[tuple[int, np.ndarray, int]]:
            at = step
            while True:
                epoch, indices = self.indices(at)
                pieces = np.array_split(indices, min(len(indices), max(1, 4 * self._num_workers)))
                yield from ((epoch, piece, len(pieces)) for piece in pieces)
                at += 1

        def batches() -> Generator[list[Chunk]]:
            in_flight = AHEAD * max(1, 4 * self._num_workers)
            done = ordered_map(lambda job: self._fetcher.chunk(*job), jobs(), self._num_workers, in_flight)
            with contextlib.closing(done):
                for first in done:
                    yield [first] + [next(done) for _ in range(first.pieces - 1)]

        return prefetch(batches(), self._make, self._device)

    def _make(self, chunks: list[Chunk]) -> Any:
        if self._make_views is None or any(chunk.failed for chunk in chunks):
            return None
        return self._make_views(_join(chunks))

    def _count(self, chunks: list[Chunk]) -> None:
        """Note the bad images of a batch when it is handed over, not when it is decoded: so resumes count alike."""
        for chunk in chunks:
            for index, reason in chunk.bad:
                self.skipped[self.source.name(index)] = reason
        check_bad(self.skipped, len(self.source), self.max_bad_fraction)
        if failed := next((chunk.failed for chunk in chunks if chunk.failed), None):
            raise DataError(failed)

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


def load_images(
    source: Source,
    indices: Sequence[int] | None = None,
    *,
    size: int | tuple[int, int],
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    batch_size: int = 256,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.01,
    skipped: dict[str, str] | None = None,
    channels: int = 3,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The readable images in order, as timm's evaluation transform makes them, not yet normalized.

    indices: which images; None: all. size: pixels, a side or (H, W). num_workers: threads; None: one a core, at
    most 16. skipped: gets name -> reason of the bad ones. Yields ([B] int64 indices, [B, C, H, W] fp32 in 0..1);
    batches that are wholly bad are left out. Raises DataError above max_bad_fraction.
    """
    wanted = range(len(source)) if indices is None else [int(i) for i in indices]
    skipped = {} if skipped is None else skipped
    workers = default_workers() if num_workers is None else num_workers
    height, width = (size, size) if isinstance(size, int) else size

    def read(index: int) -> tuple[int, Tensor | str]:
        image = read_image(source, index, channels=channels)
        return index, image if isinstance(image, str) else eval_resize(image, (height, width), interpolation, crop_pct)

    kept: list[int] = []
    images: list[Tensor] = []
    done = ordered_map(read, wanted, workers, 2 * batch_size)
    try:
        for position, (index, image) in enumerate(done, 1):
            if isinstance(image, str):
                skipped[source.name(index)] = image
                check_bad(skipped, len(wanted), max_bad_fraction)
            else:
                kept.append(index)
                images.append(image)
            if images and (len(images) == batch_size or position == len(wanted)):
                yield torch.tensor(kept), torch.stack(images).float() / 255
                kept, images = [], []
    finally:
        done.close()


def permutation(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order of an epoch, [n] int64: indices sorted by splitmix64(seed, epoch, index)."""
    if not shuffle:
        return np.arange(n)
    return np.argsort(bits_array(seed, epoch, np.arange(n, dtype=np.uint64)), kind="stable")
