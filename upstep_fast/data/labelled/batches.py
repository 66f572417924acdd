"""Labelled images or clips as batches on the device: in random order with random views, or in order without."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upstep_fast.data.labelled.clips import Clips, load_clips, training_clips
from upstep_fast.data.labelled.splits import Labelled
from upstep_fast.data.loading.loader import Loader, load_images
from upstep_fast.data.views.resize import eval_resize, normalize
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.data.views.views import random_views


@dataclass(frozen=True)
class Reader:
    """How images or clips become what the model sees: normalized fp32 [B, C, H, W], or [B, T, C, H, W]."""

    size: tuple[int, int]  # of the model's input, pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str  # of the evaluation transform
    crop_pct: float
    views: ViewConfig | None  # random views for training; None: as for evaluation
    batch_size: int
    seed: int
    num_workers: int
    max_bad_fraction: float
    device: torch.device
    frames: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)  # name -> reason of what could not be read

    def training(self, data: Labelled, step: int) -> Generator[tuple[Tensor, Tensor]]:
        """Batches (x, y [B]) from step `step` on, without end; a pure function of (seed, step)."""
        if isinstance(data.source, Clips):
            for clips, indices, epoch in training_clips(data.source, self, step):
                x = self._prepared([frame for clip in clips for frame in clip], epoch, indices)
                yield x.unflatten(0, (len(clips), -1)), data.y[indices].to(self.device)
            return
        loader = Loader(
            data.source,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            max_bad_fraction=self.max_bad_fraction,
            start_step=step,
            channels=len(self.mean),
        )
        loader.skipped = self.skipped
        with loader:
            for batch in loader:
                yield self._prepared(batch.images, batch.epoch, batch.indices), data.y[batch.indices].to(self.device)

    def in_order(self, data: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
        """Every readable image or clip once, as for evaluation: (indices [B], x)."""
        if isinstance(data.source, Clips):
            for indices, clips in load_clips(data.source, self):
                x = self._as_evaluated([frame for clip in clips for frame in clip])
                yield indices, x.unflatten(0, (len(clips), -1))
            return
        for indices, images in load_images(
            data.source,
            size=self.size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            max_bad_fraction=self.max_bad_fraction,
            skipped=self.skipped,
            channels=len(self.mean),
        ):
            yield indices, self._normalized(images)

    def _prepared(self, images: list[Tensor], epoch: int, indices: Tensor) -> Tensor:
        """images: one an index, or T frames of each, one after the other, which get the same changes."""
        if self.views is None:
            return self._as_evaluated(images)
        each = indices.repeat_interleave(len(images) // len(indices))
        return random_views(images, self.views, seed=self.seed, epoch=epoch, indices=each, views=1, device=self.device)[
            0
        ]

    def _as_evaluated(self, images: list[Tensor]) -> Tensor:
        resized = [eval_resize(image, self.size, self.interpolation, self.crop_pct) for image in images]
        return self._normalized(torch.stack(resized).float() / 255)

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images.to(self.device), self.mean, self.std)
