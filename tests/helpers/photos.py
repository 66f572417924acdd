"""Small generated photographs."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def blurred_noise(generator: torch.Generator, side: int, tint: tuple[float, float, float] | None = None) -> Image.Image:
    """Return a square RGB picture of smooth random colors; tint: mixed in at 40 %."""
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    if tint is not None:
        coarse = coarse * 0.6 + torch.tensor(tint).view(1, 3, 1, 1) * 0.4
    pixels = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic")[0].clamp(0, 1)
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def save_photos(folder: Path, count: int) -> Path:
    """Write `count` pictures of 40 x 40 pixels, 00.png, 01.png, ..., the same at every call; return `folder`."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        blurred_noise(generator, 40).save(folder / f"{i:02}.png")
    return folder
