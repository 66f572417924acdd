"""A model's evaluation transform of single images, with its normalization, as the torch datasets of others call it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from upstep_fast.config.reading import AS_STORED, Reading
from upstep_fast.data.decode.in_memory import pixels_of
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.remote.address import is_address
from upstep_fast.data.sources.folders import Files
from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.pieces import only_picture
from upstep_fast.data.sources.remote_files import RemoteFiles
from upstep_fast.data.sources.source import Source
from upstep_fast.data.views.resize import eval_resize, normalize


@dataclass(frozen=True)
class EvalTransform:
    """Resize, crop and normalize one image: a path, a PIL image or an array [H, W, C] -> fp32 [C, *size].

    The result for a path is what `embed` gives the model. Objects can be pickled, for the workers of a DataLoader.
    """

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # per channel, on a 0..1 scale
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"  # center keeps the aspect ratio, squash does not
    reading: Reading = AS_STORED  # map of values to 8 bits, and bands

    def __call__(self, image: Any) -> Tensor:
        """Return the transformed image, fp32 [C, *size]. Raises BadImage, or DataError if a file cannot be read."""
        return self.of_pixels(self.pixels(image))

    def pixels(self, image: Any) -> Tensor:
        """Return an image before resizing, uint8 [C, H, W]. Raises as calling the transform does."""
        if not isinstance(image, (str, Path)):
            return pixels_of(image, len(self.mean), self.reading)
        name = os.fsencode(image)
        kind = RemoteFiles if is_address(name) else Files
        part = only_picture(kind("", Names.pack([name], component=None)), self.reading)
        source = Source((part,), reading=self.reading)
        return read_image(source, 0, channels=len(self.mean))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Transform pixels, uint8 [C, H, W] -> fp32 [C, *size]."""
        x = eval_resize(pixels, self.size, self.interpolation, self.crop_pct, self.crop_mode)
        return normalize(x.float() / 255, self.mean, self.std)
