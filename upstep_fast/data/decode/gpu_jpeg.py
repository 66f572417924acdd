"""JPEGs decoded by the GPU: nvJPEG through torchvision's `decode_jpegs_cuda`. By choice (`--decode cuda`) only.

Header first: format, limit of pixels and orientation are Pillow's, as everywhere. RGB files of full size whose end
marker is there go to the GPU, a chunk at a time; the others, and what nvJPEG refuses, are decoded by the CPU, as
`decode` does. Which one reads a file depends on the file alone, or a run could not be repeated.

nvJPEG promises no error for a file whose data ends early (libjpeg's reader raises), and its pixels are not libjpeg's:
it may take for an image what `decode` refuses. So it is never chosen by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import threading
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from upstep_fast.data.decode.image import MAX_PIXELS, orientation_of, upright
from upstep_fast.errors import ConfigError

_RGB = 3  # ImageReadMode.RGB


class GpuReader:
    """Decodes on one device, for several threads.

    min_side: as `decode`; files that the CPU would decode at a fraction are left to it. `refused` counts the files that
    the GPU was given and refused. Raises ConfigError where torchvision has no such reader.
    """

    def __init__(self, device: torch.device, *, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
        if why_not := missing(device):
            raise ConfigError(f"decode: cuda cannot be used: {why_not}; use --decode cpu")
        self.device, self.min_side, self.max_pixels = device, min_side, max_pixels
        self.refused = 0
        self._lock, self._own = threading.Lock(), threading.local()

    def read(self, files: Sequence[bytes | memoryview]) -> list[Tensor | None]:
        """Pixels of each file, uint8 [3, H, W] on the device, complete; None: the CPU is to decode it."""
        headers = [self._header(data) for data in files]
        found: list[Tensor | None] = [None] * len(files)
        chosen = [i for i, header in enumerate(headers) if header]
        with self._stream():
            images: Sequence[Tensor | None]
            try:
                images = self._decode([files[i] for i in chosen])
            except RuntimeError:  # of one of them, and none comes back: each by itself
                images = [self._alone(files[i]) for i in chosen]
            for i, image in zip(chosen, images, strict=True):
                (width, height), orientation = headers[i]  # type: ignore[misc]
                if image is not None and image.shape == (3, height, width):
                    found[i] = upright(image, orientation)
                else:
                    with self._lock:
                        self.refused += 1
        return found

    def _header(self, data: bytes | memoryview) -> tuple[tuple[int, int], int] | None:
        """Size and orientation of a file that the GPU may have; None: the CPU's, whatever is the matter with it."""
        if bytes(data[:2]) != b"\xff\xd8" or b"\xff\xd9" not in bytes(data):
            return None
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                width, height = size = image.size
                if image.format != "JPEG" or image.mode != "RGB" or width * height > self.max_pixels:
                    return None
                if self.min_side:
                    image.draft(image.mode, (self.min_side, self.min_side))
                return (size, orientation_of(image)) if image.size == size else None
        except Exception:  # the CPU's reader says what is wrong
            return None

    def _alone(self, data: bytes | memoryview) -> Tensor | None:
        try:
            return self._decode([data])[0]
        except RuntimeError:
            return None

    def _decode(self, files: Sequence[bytes | memoryview]) -> list[Tensor]:
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        return torch.ops.image.decode_jpegs_cuda(encoded, _RGB, self.device) if encoded else []

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream of this thread's own, waited for at the end: the step's stream is never."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._own.stream):
            yield
        self._own.stream.synchronize()


def name() -> str:
    """Who decodes, for what must be the same when a run goes on."""
    return f"nvJPEG of torchvision {importlib.metadata.version('torchvision')}"


def missing(device: torch.device) -> str | None:
    """Why the GPU's reader cannot be used on `device`, or None."""
    if device.type != "cuda":
        return f"the device is {device}"
    try:
        importlib.import_module("torchvision.io")  # registers the op
    except Exception as error:
        return f"torchvision cannot be imported ({error})"
    return None if hasattr(torch.ops.image, "decode_jpegs_cuda") else "this torchvision has no decode_jpegs_cuda"
