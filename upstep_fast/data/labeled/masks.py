"""Masks: an image of class numbers for each image, of its size, at the same place in another folder or archive.

photos/a/1.jpg  ->  masks/a/1.png     gray or palette, 1 to 16 bits; 255: pixels that are not counted
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upstep_fast.data.decode.image import one_reason
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading.stored import MAX_PIXELS
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.errors import BadImage, DataError

MAX_CLASS = 254


@dataclass(frozen=True)
class Masked:
    """Images and their masks."""

    source: Source
    masks: Source
    positions: tuple[int, ...]  # in `masks`, of each image

    def read(self, index: int, channels: int) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 [channels, H, W], and its mask, uint8 [H, W].

        Raises BadImage for the image, and DataError for a mask that cannot be read or has another size.
        """
        image = read_image(self.source, index, channels=channels)
        position = self.positions[index]
        name = self.masks.name(position)
        try:
            mask = decode_mask(self.masks.read(position))
        except (BadImage, OSError) as error:
            reason = error.reason if isinstance(error, BadImage) else error.strerror
            raise DataError(f"masks: {name}: {reason}; repair it") from error
        if mask.shape != image.shape[1:]:
            sizes = [f"{width} x {height}" for height, width in (mask.shape, image.shape[1:])]
            raise DataError(f"masks: {name} is {sizes[0]} pixels, {self.source.name(index)} is {sizes[1]}, upright")
        return image, mask


def pair(source: Source, paths: Sequence[str], masks: Source, where: str) -> Masked:
    """Return images with their masks. paths: of `source`; where: path of `masks`. Raises DataError if one has none."""
    positions = {_key(masks.name(i), [where]): i for i in range(len(masks))}
    names = [source.name(i) for i in range(len(source))]
    missing = [name for name in names if _key(name, paths) not in positions]
    if missing:
        expected = f"{_key(missing[0], paths)}.png"
        raise DataError(
            f"masks: {len(missing)} of {len(names)} images have none in {where}; the first, {missing[0]}, needs "
            f"{expected} there"
        )
    return Masked(source, masks, tuple(positions[_key(name, paths)] for name in names))


def open_masks(path: str) -> Source:
    """Return the masks at a path of --masks. Raises DataError."""
    try:
        return open_source(path)
    except DataError as error:
        raise DataError(f"masks: {str(error).removeprefix('data: ')}") from error


def decode_mask(data: bytes) -> Tensor:
    """Return the class numbers in an image file, uint8 [H, W]. Raises BadImage."""
    with one_reason(data, ""):
        image = Image.open(io.BytesIO(data), formats=("PNG", "TIFF", "BMP", "GIF"))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width} x {height} pixels, above the limit of {MAX_PIXELS}")
        values = np.array(image)
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise BadImage("has colors; save masks with class numbers as gray or palette PNGs")
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > MAX_CLASS + 1:
        raise BadImage(f"has class {values.max()}; classes are 0 to {MAX_CLASS}, 255 is not counted")
    return torch.from_numpy(values.astype(np.uint8))


def _key(name: str, paths: Sequence[str]) -> str:
    """Return an image's place below its path, without the suffix."""
    for path in paths:
        folder = str(path).rstrip("/") + "/"
        if name.startswith(folder):
            name = name.removeprefix(folder)
            break
    return str(PurePosixPath(name).with_suffix(""))
