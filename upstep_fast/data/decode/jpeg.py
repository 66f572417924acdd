"""JPEGs decoded by torchvision: libjpeg-turbo without Pillow's copies of the pixels.

Pillow opens the file, checks its header and reads the orientation. Where torchvision raises, Pillow decodes and its
verdict counts. Images that both accept have equal pixels (tests/data/test_jpeg.py, also on damaged files).
"""

from __future__ import annotations

import functools
import importlib
import io
import logging
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

log = logging.getLogger(__name__)
MODES = {"RGB": 3, "L": 1}  # CMYK is left to Pillow, which handles Adobe's inverted values
_AS_STORED = 0  # ImageReadMode.UNCHANGED


@functools.cache
def reader() -> Callable[[Tensor], Tensor] | None:
    """Return torchvision's `decode_jpeg`, encoded uint8 [bytes] -> uint8 [C, H, W]; None where it has none.

    torchvision 0.29 deprecates its decoders in favor of TorchCodec, which is no dependency of this package. So the op
    is called directly, without a warning per image; where a later torchvision has none, Pillow decodes.
    """
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    try:
        importlib.import_module("torchvision.io")  # registers the op
        read = functools.partial(torch.ops.image.decode_jpeg, mode=_AS_STORED, apply_exif_orientation=False)
        read(_as_tensor(file.getvalue()))
    except Exception as error:  # no package, no library, no op, another signature
        log.info(
            "decode: JPEGs are decoded by Pillow, torchvision's decoder is not available (%s)",
            str(error).partition("\n")[0][:120],
        )
        return None
    return read


def pixels(data: bytes | memoryview, image: Image.Image) -> Tensor | None:
    """Decode a JPEG that Pillow has opened: uint8 [1 or 3, H, W]; None where Pillow has to decode it."""
    if image.format != "JPEG" or image.mode not in MODES or (read := reader()) is None:
        return None
    try:
        x = read(_as_tensor(data))
    except RuntimeError:  # truncated, or broken otherwise
        return None
    return x if x.shape == (MODES[image.mode], image.height, image.width) else None


def _as_tensor(data: bytes | memoryview) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns about memory that is not writable
