"""Options of reading labeled images or clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
