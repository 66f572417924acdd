"""JPEGs decoded on the GPU: nvJPEG through torchvision's `decode_jpegs_cuda`, with `--decode cuda` only.

Pillow reads the header and decides on format, limit of pixels and orientation, as for the CPU. RGB files of full size
that have an end marker go to the GPU, a chunk at a time; the CPU decodes other files and those that nvJPEG refuses, by
`decode`. The choice depends on the file alone, or a run could not be repeated.

nvJPEG promises no error for a file whose data ends early (libjpeg's reader raises), and its pixels differ from
libjpeg's: it may accept an image that `decode` refuses. So it is never the default.
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

from upstep_fast.data.reading.orientation import orientation_of, upright
from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.data.reading.stored import MAX_PIXELS
from upstep_fast.errors import ConfigError

_RGB = 3  # ImageReadMode.RGB


class GpuReader:
    """Decoder of JPEGs on one device, for several threads.

    min_side: as `decode`; files that the CPU would decode at a fraction are left to it. `refused` counts the files that
    the GPU refused. Raises ConfigError where torchvision has no such decoder.
    """

    def __init__(self, device: torch.device, *, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
        if reason := unsupported_reason(device):
            raise ConfigError(f"decode: cuda cannot be used: {reason}; use --decode cpu")
        self.device, self.min_side, self.max_pixels = device, min_side, max_pixels
        self.refused = 0
        self._lock, self._local = threading.Lock(), threading.local()

    def read(self, files: Sequence[bytes | memoryview]) -> list[Tensor | None]:
        """Return the pixels of each file, uint8 [3, H, W] on the device, ready; None where the CPU has to decode it.

        Raises RuntimeError if the device has no memory.
        """
        headers = [self._header(data) for data in files]
        decoded: list[Tensor | None] = [None] * len(files)
        on_gpu = [i for i, header in enumerate(headers) if header]
        with self._stream():
            images: Sequence[Tensor | None]
            try:
                images = self._decode([files[i] for i in on_gpu])
            except RuntimeError as error:  # one bad file fails the call: one call per file
                if is_out_of_memory(error):  # the CPU's pixels would differ: the choice depends on the file alone
                    raise
                images = [self._decode_one(files[i]) for i in on_gpu]
            for i, image in zip(on_gpu, images, strict=True):
                (width, height), orientation = headers[i]  # type: ignore[misc]
                if image is not None and image.shape == (3, height, width):
                    decoded[i] = upright(image, orientation)
                else:
                    with self._lock:
                        self.refused += 1
        return decoded

    def _header(self, data: bytes | memoryview) -> tuple[tuple[int, int], int] | None:
        """Return size and orientation of a file that the GPU may decode; None for all other files."""
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
        except Exception:  # the CPU's decoder reports what is wrong
            return None

    def _decode_one(self, data: bytes | memoryview) -> Tensor | None:
        try:
            return self._decode([data])[0]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return None

    def _decode(self, files: Sequence[bytes | memoryview]) -> list[Tensor]:
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        return torch.ops.image.decode_jpegs_cuda(encoded, _RGB, self.device) if encoded else []

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """Run on a stream of this thread and wait for it at the end; the step's stream is not waited for."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._local.stream):
            yield
        self._local.stream.synchronize()


def decoder_name() -> str:
    """Return the decoder's name and version, which must not change when a run is resumed."""
    return f"nvJPEG of torchvision {importlib.metadata.version('torchvision')}"


def unsupported_reason(device: torch.device) -> str | None:
    """Return why the GPU's decoder cannot be used on `device`, else None."""
    if device.type != "cuda":
        return f"the device is {device}"
    try:
        importlib.import_module("torchvision.io")  # registers the op
    except Exception as error:
        return f"torchvision cannot be imported ({error})"
    return None if hasattr(torch.ops.image, "decode_jpegs_cuda") else "this torchvision has no decode_jpegs_cuda"
