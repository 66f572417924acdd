"""Small pictures of images by their number, read in the run's way, with a bounded cache on disk."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from upstep_fast.data.decode.thumbnail import encode_thumbnail
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.sources.source import Source

SIDE, LARGE_SIDE = 160, 720  # pixels
QUALITY = 75
CACHE_BYTES = 256 << 20


def encoded(image: Tensor, side: int) -> bytes:
    """Return a WebP of at most `side` pixels of an image, uint8 [C, H, W]; of its first channel unless C is 3."""
    return encode_thumbnail(image, side, QUALITY, Image.Resampling.LANCZOS)


@dataclass(eq=False)
class Thumbnails:
    """Thumbnails of a source's images. folder: the cache, for this source only; None: no cache. Thread-safe."""

    source: Source
    channels: int
    folder: Path | None = None
    limit: int = CACHE_BYTES
    _sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)  # of the cached files, least recent first
    _total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Make the folder, and list what an earlier process left in it."""
        if self.folder is None:
            return
        try:
            os.makedirs(self.folder, exist_ok=True)
            files = [(entry.name, entry.stat()) for entry in os.scandir(self.folder) if entry.name.endswith(".webp")]
        except OSError:
            self.folder = None
            return
        for name, status in sorted(files, key=lambda file: file[1].st_mtime):
            self._sizes[name] = status.st_size
        self._total = sum(self._sizes.values())
        self._evict()

    def small(self, index: int) -> bytes:
        """Return the thumbnail of an image, WebP. Raises BadImage or OSError."""
        name = f"{index}.webp"
        if self.folder is not None and name in self._sizes:
            with contextlib.suppress(OSError):
                data = (self.folder / name).read_bytes()
                with self._lock:
                    if name in self._sizes:
                        self._sizes.move_to_end(name)
                return data
        data = encoded(read_image(self.source, index, channels=self.channels, min_side=SIDE), SIDE)
        self._keep(name, data)
        return data

    def large(self, index: int) -> bytes:
        """Return a larger picture of an image, WebP, not cached. Raises BadImage or OSError."""
        return encoded(read_image(self.source, index, channels=self.channels, min_side=LARGE_SIDE), LARGE_SIDE)

    def _keep(self, name: str, data: bytes) -> None:
        if self.folder is None:
            return
        temporary = self.folder / f".{os.getpid()}-{threading.get_ident()}-{name}"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, self.folder / name)  # not forced to disk: it can be made again
        except OSError:  # a full disk: without a cache
            self.folder = None
            return
        with self._lock:
            self._total += len(data) - self._sizes.pop(name, 0)
            self._sizes[name] = len(data)
            self._evict()

    def _evict(self) -> None:
        """Remove the files that were not used for longest until the limit holds."""
        while self._total > self.limit and self._sizes and self.folder is not None:
            name, size = self._sizes.popitem(last=False)
            self._total -= size
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
