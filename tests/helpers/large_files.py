"""Large pictures made in code: pyramids as slides' writers lay them out, and sparse files."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

tifffile = __import__("pytest").importorskip("tifffile", reason="install upstep_fast[microscopy]")
APERIO = "Aperio Image Library v11.2.1\r\n{0}x{1} [0,0 {0}x{1}] (256x256){2} JPEG/RGB Q=90|AppMag = 20|MPP = 0.4990"


def picture(height: int, width: int) -> np.ndarray:
    """Return a smooth picture, uint8 [height, width, 3], whose pixels tell their place."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17) + np.cos(y / 23), np.sin((x + y) / 29), np.cos((x - 2 * y) / 37)]
    return np.stack([np.rint(127 + 60 * wave) for wave in waves], -1).astype(np.uint8)


def halved(image: np.ndarray, times: int) -> np.ndarray:
    """Return a picture at 1/2^times of its size, the mean over blocks."""
    return np.asarray(Image.fromarray(image).reduce(2**times)) if times else image


def write_pyramid(path: Path, image: np.ndarray, form: str, levels: int = 3, **options) -> list[np.ndarray]:
    """Write `image` [H, W, 3] with levels of 1/1, 1/2, 1/4 ... as form "subifds", "pages" or "aperio"; return them."""
    options = {"tile": (64, 64), "photometric": "rgb", "metadata": None, **options}
    pictures = [halved(image, k) for k in range(levels)]
    with tifffile.TiffWriter(path, bigtiff=form != "aperio") as file:
        if form == "aperio":
            size = image.shape[1::-1]
            for k, level in enumerate(pictures):
                arrow = f" -> {level.shape[1]}x{level.shape[0]}" if k else ""
                file.write(level, description=APERIO.format(*size, arrow), subfiletype=0, **options)
                if k == 0:
                    thumb = image[::8, ::8].copy()
                    file.write(thumb, description="Aperio thumbnail", metadata=None, photometric="rgb", rowsperstrip=16)
            return pictures
        file.write(pictures[0], subifds=levels - 1 if form == "subifds" else 0, **options)
        for level in pictures[1:]:
            file.write(level, subfiletype=1, **options)
    return pictures


def write_sparse(path: Path, side: int, stored: dict[tuple[int, int], np.ndarray], **options) -> None:
    """Write a picture of `side` x `side` pixels of which only these tiles of 256 x 256 are stored."""
    across = -(-side // 256)
    places = (divmod(k, across) for k in range(across**2))
    tiles = (zlib.compress(stored[place].tobytes()) if place in stored else b"" for place in places)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        layout = {"shape": (side, side, 3), "dtype": np.uint8, "tile": (256, 256), "photometric": "rgb"}
        file.write(tiles, compression="zlib", metadata=None, **layout, **options)
