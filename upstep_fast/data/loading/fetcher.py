"""Reads and decodes a few images of one batch, drawing others for the bad ones: the work of one thread at a time."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from upstep_fast.data.decode.gpu_jpeg import GpuReader
from upstep_fast.data.keyed_random import bits_array
from upstep_fast.data.loading.skipped import read_image, too_many
from upstep_fast.data.sources.source import Source

MAX_DRAWS = 100  # replacements tried for one image


@dataclass
class Chunk:
    """A part of a batch: images and their indices, and which were met that cannot be used."""

    epoch: int
    pieces: int  # chunks of this batch
    images: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    replaced: int = 0
    failed: str | None = None  # the run ends when this chunk's batch is asked for


class Fetcher:
    """What threads share: the source, what is known to be bad, and a cache. What it returns depends on none of these.

    min_side: a JPEG may be decoded at a fraction of its size as long as both sides keep this many pixels. gpu: decodes
    what it takes of a chunk; the images are on its device then.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        channels: int,
        min_side: int | None,
        max_bad_fraction: float,
        cache: int,
        gpu: GpuReader | None = None,
    ) -> None:
        self.source, self.seed, self.channels, self.min_side = source, seed, channels, min_side
        self.max_bad_fraction, self.gpu = max_bad_fraction, gpu
        self._bad: dict[int, str] = {}  # so that a bad file is read once
        self._cache = _Cache(cache)

    def chunk(self, epoch: int, indices: np.ndarray, pieces: int) -> Chunk:
        """The images at `indices`. A bad one is replaced by a draw from (seed, epoch, index)."""
        chunk = Chunk(epoch, pieces)
        by_gpu = self._by_gpu(indices.tolist())
        for wanted in indices.tolist():
            index = wanted
            for draw in range(MAX_DRAWS):
                image = self._image(index, by_gpu)
                if not isinstance(image, str):
                    break
                chunk.bad.append((index, image))
                index = int(bits_array(self.seed, epoch, wanted, draw)[0] % np.uint64(len(self.source)))
            else:
                name = self.source.name(wanted)
                chunk.failed = f"data: {MAX_DRAWS} images drawn in a row cannot be read, e.g. {name}"
                return chunk
            # this chunk alone has too many: no need to look further. Others' do not count: they may be of later batches
            names = {self.source.name(index) for index, _ in chunk.bad}
            if too_many(len(names), len(self.source), self.max_bad_fraction):
                chunk.failed = "data: too many images cannot be used"
                return chunk
            chunk.images.append(image)
            chunk.indices.append(index)
            chunk.replaced += index != wanted
        return chunk

    def _image(self, index: int, by_gpu: dict[int, Tensor | None]) -> Tensor | str:
        """The decoded image, or why there is none; by_gpu: what the GPU made of this chunk's images."""
        if (reason := self._bad.get(index)) is not None:
            return reason
        image = self._cache.get(index)
        if image is None and (image := (by_gpu if index in by_gpu else self._by_gpu([index])).get(index)) is not None:
            self._cache.add(index, image)
        if image is None:
            read = read_image(self.source, index, channels=self.channels, min_side=self.min_side)
            if isinstance(read, str):
                self._bad[index] = read
                return read
            image = read
            self._cache.add(index, image)
        return image

    def _by_gpu(self, indices: list[int]) -> dict[int, Tensor | None]:
        """What the GPU makes of the images that are not known already; None: the CPU is to decode it."""
        files = {}
        for index in indices if self.gpu else ():
            if index not in self._bad and self._cache.get(index) is None:
                with contextlib.suppress(OSError):  # the CPU's way says so
                    files[index] = self.source.read(index)
        return dict(zip(files, self.gpu.read(list(files.values())), strict=True)) if self.gpu and files else {}


class _Cache:
    """Decoded images up to a number of bytes; once full it stays as it is, so a large source costs no churn."""

    def __init__(self, limit: int) -> None:
        self._images: dict[int, Tensor] = {}
        self._free = limit
        self._lock = threading.Lock()

    def get(self, index: int) -> Tensor | None:
        return self._images.get(index)

    def add(self, index: int, image: Tensor) -> None:
        size = image.untyped_storage().nbytes()
        with self._lock:
            if size <= self._free and index not in self._images:
                self._images[index] = image
                self._free -= size
