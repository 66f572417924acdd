"""Reading and decoding a part of a batch, with replacements for bad images: one thread's unit of work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from upstep_fast.data.decode.gpu_jpeg import GpuReader
from upstep_fast.data.keyed_random import bits_array
from upstep_fast.data.loading.skipped_images import read_image, too_many
from upstep_fast.data.reading.retries import with_retries
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import BadImage

MAX_DRAWS = 100  # replacements tried for one image


@dataclass
class Chunk:
    """Part of a batch: decoded images with their indices, and bad images."""

    epoch: int
    num_chunks: int  # of this batch
    images: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)  # index, reason
    replaced: int = 0
    error: str | None = None  # raised as DataError when this chunk's batch is taken

    @property
    def num_bytes(self) -> int:
        """Host memory of the images."""
        return sum(image.untyped_storage().nbytes() for image in self.images if image.device.type == "cpu")


class Fetcher:
    """Reader of images for several threads, with a shared cache of decoded and of bad ones, which changes no result.

    min_side: images are decoded at a fraction of their size as long as both sides keep this many pixels. transform:
    applied to every image, in the threads. gpu: decodes the JPEGs that it supports; their images are then on its
    device.
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
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.source, self.seed, self.channels, self.min_side = source, seed, channels, min_side
        self.max_bad_fraction, self.transform = max_bad_fraction, transform
        self.gpu = gpu if gpu and source.reading.keeps_photographs else None
        self._bad: dict[int, str] = {}  # index -> reason, so that a bad file is read once
        self._cache = _Cache(cache)

    def chunk(self, epoch: int, indices: np.ndarray, num_chunks: int) -> Chunk:
        """Return the images at `indices`; a bad one is replaced by a draw from (seed, epoch, index)."""
        chunk = Chunk(epoch, num_chunks)
        gpu_images = self._decode_on_gpu(indices.tolist())
        for position in indices.tolist():
            replacement = self._first_readable(epoch, position, gpu_images, chunk)
            if replacement is None:
                chunk.error = (
                    f"data: {MAX_DRAWS} images drawn in a row cannot be read, e.g. {self.source.name(position)}"
                )
                return chunk
            # this chunk alone has too many: no need to look further. Others' do not count: they may be of later batches
            names = {self.source.name(index) for index, _ in chunk.bad}
            if too_many(len(names), len(self.source), self.max_bad_fraction):
                chunk.error = "data: too many images cannot be used"
                return chunk
            index, image = replacement
            chunk.images.append(image)
            chunk.indices.append(index)
            chunk.replaced += index != position
        return chunk

    def _first_readable(
        self, epoch: int, position: int, gpu_images: dict[int, Tensor | None], chunk: Chunk
    ) -> tuple[int, Tensor] | None:
        """Return the image at `position` or the first readable one drawn in its place; bad ones go to `chunk.bad`."""
        index = position
        for draw in range(MAX_DRAWS):
            try:
                return index, self._image(index, gpu_images)
            except BadImage as error:
                chunk.bad.append((index, error.reason))
            index = int(bits_array(self.seed, epoch, position, draw)[0] % np.uint64(len(self.source)))
        return None

    def _image(self, index: int, gpu_images: dict[int, Tensor | None]) -> Tensor:
        """Return the decoded image. gpu_images: this chunk's images as the GPU decoded them. Raises BadImage."""
        if (reason := self._bad.get(index)) is not None:
            raise BadImage(reason)
        image = self._cache.get(index)
        if image is None:
            image = (gpu_images if index in gpu_images else self._decode_on_gpu([index])).get(index)
            if image is None:
                try:
                    image = read_image(self.source, index, channels=self.channels, min_side=self.min_side)
                except BadImage as error:
                    self._bad[index] = error.reason
                    raise
            if (transform := self.transform) is not None:
                decoded = image
                image = with_retries(lambda: transform(decoded), lambda: self.source.name(index))
            self._cache.add(index, image)
        return image

    def _decode_on_gpu(self, indices: list[int]) -> dict[int, Tensor | None]:
        """Return the GPU's images of those that are neither cached nor bad; None where the CPU has to decode."""
        files: dict[int, bytes | memoryview] = {}
        for index in indices if self.gpu else ():
            if index not in self._bad and self._cache.get(index) is None:
                with contextlib.suppress(OSError):  # the CPU's attempt reports it
                    item = self.source.item(index)
                    if item.kind is None and not isinstance(item.file, str):
                        files[index] = item.file
        if (gpu := self.gpu) is None or not files:
            return {}
        decoded = with_retries(lambda: gpu.read(list(files.values())), lambda: self.source.name(indices[0]))
        return dict(zip(files, decoded, strict=True))


class _Cache:
    """Decoded images up to `limit` bytes; once full it does not change, so that a large source causes no churn."""

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
