"""Host memory of decoded images: estimated from the headers of some images before a run starts.

needed = held x batch x m + min(ahead, 3 x batch x m) + min(cache, N x m) + min(decoding, threads x d)

m        mean bytes of a decoded image, at the fraction of its size that the views allow
d        bytes that decoding the largest of them takes
held     batches beyond those that wait: in use, being put together, on a GPU also two whose views are made
ahead, cache, decoding   the loader's and the decoder's limits (data/loading/loader.py, data/reading/budget.py)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from upstep_fast.data.decode.size import image_size
from upstep_fast.data.loading import loader
from upstep_fast.data.loading.prefetch import DEPTH
from upstep_fast.data.reading import budget
from upstep_fast.data.sources.part import Item
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import ConfigError
from upstep_fast.runtime.machine import format_bytes

SAMPLE = 32  # images whose headers are read


@dataclass(frozen=True)
class ImageMemory:
    """Estimate for one rank."""

    mean: int  # bytes of a decoded image
    needed: int  # bytes
    batch: int  # images per step

    def __str__(self) -> str:
        return f"decoded images {format_bytes(self.needed)} of host memory"


def estimate(
    source: Source, *, channels: int, min_side: int | None, batch: int, num_workers: int, device: torch.device
) -> ImageMemory:
    """Return the host memory of a rank's decoded images. batch: of this rank."""
    decoded, decoding = [0], [0]
    for index in np.linspace(0, len(source) - 1, min(SAMPLE, len(source)), dtype=int).tolist():
        with contextlib.suppress(OSError):  # the loader reports it
            if (size := _image_size(source.item(index))) is not None:
                pixels = size[0] * size[1]
                decoded.append(channels * pixels // budget.reduction(*size, min_side) ** 2)
                decoding.append(max(budget.BYTES_PER_PIXEL, 4 * channels) * pixels)
    mean = sum(decoded) // max(1, len(decoded) - 1)
    held = 2 + (1 + DEPTH if device.type == "cuda" else 0)
    waiting = min(loader.MAX_AHEAD_BYTES, loader.AHEAD * batch * mean)
    cache = min(loader.CACHE_BYTES, len(source) * mean)
    one = max(decoding)
    at_once = max(one, min(budget.LIMIT, max(1, num_workers) * one))
    return ImageMemory(mean, held * batch * mean + waiting + cache + at_once, batch)


def _image_size(item: Item) -> tuple[int, int] | None:
    """Return (height, width) of an image at full size; None if its header does not tell."""
    if item.layout is not None:
        return item.piece.window[2:] if item.piece.window else (item.layout.size("Y"), item.layout.size("X"))
    return image_size(item.file)  # type: ignore[arg-type]  # bytes, as it is a photograph


def check(images: ImageMemory, free_by_rank: Sequence[int | None], local_ranks: int) -> None:
    """Raise ConfigError, naming the cure, if the decoded images of a machine's ranks are above its free memory."""
    needed = images.needed * local_ranks
    free = min((value for value in free_by_rank if value is not None), default=None)
    if free is not None and needed > free:
        raise ConfigError(
            f"memory: decoded images need about {format_bytes(needed)} of host memory ({format_bytes(images.mean)} "
            f"an image, {images.batch} a step{f', {local_ranks} ranks' if local_ranks > 1 else ''}), "
            f"{format_bytes(free)} are free; lower --batch-size or --num-workers, or scale the images down; "
            "--no-memory-check starts anyway"
        )
