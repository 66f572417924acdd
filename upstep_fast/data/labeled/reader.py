"""Options of reading labeled images or clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upstep_fast.data.views.resize import eval_resize
from upstep_fast.data.views.view_config import ViewConfig


@dataclass(frozen=True)
class ReaderOptions:
    """Options that turn images or clips into batches of a model's input."""

    size: tuple[int, int]  # of the model's input, pixels
    mean: tuple[float, ...]  # one per channel, on a 0..1 scale
    std: tuple[float, ...]
    interpolation: str  # of the evaluation transform
    crop_pct: float
    views: ViewConfig | None  # random views for training; None: the evaluation transform
    batch_size: int
    seed: int
    num_workers: int  # threads
    max_bad_fraction: float
    device: torch.device
    crop_mode: str = "center"  # of the evaluation transform: center or squash
    frames: int | None = None  # per clip; None: images

    @property
    def min_side(self) -> int | None:
        """Pixels that the random views need of an image's sides; None for the evaluation transform."""
        return None if self.views is None else self.views.min_side

    def resized(self, image: Tensor) -> Tensor:
        """Apply the evaluation transform without its normalization: uint8 [C, H, W] -> [C, *size]."""
        return eval_resize(image, self.size, self.interpolation, self.crop_pct, self.crop_mode)
