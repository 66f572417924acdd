"""Batches of labeled images or clips on the device: random views in random order, or evaluation views in order."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upstep_fast.data.labeled.clips import Clips, load_clips, training_clips
from upstep_fast.data.labeled.reader import ReaderOptions
from upstep_fast.data.labeled.splits import Labeled
from upstep_fast.data.loading.loader import Loader, load_images
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.data.views.make_views import random_views
from upstep_fast.data.views.resize import normalize
from upstep_fast.runtime.progress import track


@dataclass(frozen=True)
class Reader:
    """Reader of normalized fp32 images [B, C, H, W] or clips [B, T, C, H, W]."""

    options: ReaderOptions
    skipped: SkippedImages = field(default_factory=SkippedImages)  # collects what could not be read

    def training(self, data: Labeled, step: int) -> Generator[tuple[Tensor, Tensor]]:
        """Yield batches (x, y [B] int64) from step `step` on, without end; a pure function of (seed, step).

        Raises DataError when more than `max_bad_fraction` are bad.
        """
        options = self.options
        if isinstance(data.source, Clips):
            for clips, indices, epoch in training_clips(data.source, options, self.skipped, step):
                x = self._prepared([frame for clip in clips for frame in clip], epoch, indices)
                yield x.unflatten(0, (len(clips), -1)), data.y[indices].to(options.device)
            return
        loader = Loader(
            data.source,
            min_side=options.min_side,
            transform=options.resized if options.views is None else None,
            batch_size=options.batch_size,
            seed=options.seed,
            num_workers=options.num_workers,
            max_bad_fraction=options.max_bad_fraction,
            skipped=self.skipped,
            start_step=step,
            channels=len(options.mean),
        )
        with loader:
            for batch in loader:
                x = self._prepared(batch.images, batch.epoch, batch.indices)
                yield x, data.y[batch.indices].to(options.device)

    def in_order(self, data: Labeled) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every readable image or clip once, by the evaluation transform: (indices [B] int64, x).

        Raises DataError when more than `max_bad_fraction` are bad.
        """
        with track("finetune: features", len(data.y)) as task:
            for indices, x in self._in_order(data):
                yield indices, x
                task.advance(len(indices))

    def _in_order(self, data: Labeled) -> Iterator[tuple[Tensor, Tensor]]:
        options = self.options
        if isinstance(data.source, Clips):
            for indices, clips in load_clips(data.source, options, self.skipped):
                x = self._stacked([frame for clip in clips for frame in clip])
                yield indices, x.unflatten(0, (len(clips), -1))
            return
        for indices, images in load_images(
            data.source,
            size=options.size,
            interpolation=options.interpolation,
            crop_pct=options.crop_pct,
            crop_mode=options.crop_mode,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            max_bad_fraction=options.max_bad_fraction,
            skipped=self.skipped,
            channels=len(options.mean),
        ):
            yield indices, self._normalized(images)

    def _prepared(self, images: list[Tensor], epoch: int, indices: Tensor) -> Tensor:
        """Return the training views of B images, or of B clips of T frames; the frames of a clip share their changes.

        images: B, or B T with a clip's frames in a row; indices: [B] int64. Returns [B, C, H, W] or [B T, C, H, W].
        """
        options = self.options
        if options.views is None:
            return self._stacked(images)
        each = indices.repeat_interleave(len(images) // len(indices))
        key = {"seed": options.seed, "epoch": epoch, "indices": each}
        return random_views(images, options.views, **key, views=1, device=options.device)[0]  # type: ignore[arg-type]

    def _stacked(self, images: list[Tensor]) -> Tensor:
        """Return images that `options.resized` has brought to one size as [B, C, H, W], normalized."""
        return self._normalized(torch.stack(images))

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.options.mean, self.options.std, self.options.device)
