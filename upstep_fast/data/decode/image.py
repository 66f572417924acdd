"""Decoding of images to uint8 [C, H, W], upright, sRGB values as stored; every bad image is detected here.

    gray, palette, 1 bit        expanded to RGB
    alpha, transparent color   composited on white; a TIFF's unassociated alpha is left out (tiff.py)
    CMYK, YCbCr, LAB            converted by Pillow; ICC profiles are not applied
    16 bits a channel           by --intensity (reading/intensity.py); without a measured range the high byte
    animated                    the first frame
    orientation                 of EXIF or TIFF, applied; a broken EXIF block is ignored
    .npy, TIFF of other bands   [H, W], [H, W, C] or [C, H, W] (arrays.py, tiff.py)
Large images are decoded at a fraction of their size where the views need no more, and the memory of images that are
being decoded is bounded (budget.py).
Refused, with a reason: pixels above `max_pixels` (from the header, before anything is decoded), truncated files, PNGs
whose checksums are wrong, JPEGs that end early, unknown formats, and signed, 32-bit and floating-point pixels where
no range is given or measured.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from upstep_fast.config.reading import AS_STORED, Reading
from upstep_fast.data.decode import jpeg, png
from upstep_fast.data.decode.arrays import NPY
from upstep_fast.data.decode.tiff import TiffPlan, decode_tiff_bands, plan_tiff, say_alpha_left_out
from upstep_fast.data.decode.tiff_values import has_nodata
from upstep_fast.data.decode.values import bands_of, plan_values
from upstep_fast.data.formats import kinds
from upstep_fast.data.formats.photographs import FORMATS  # and TIFF, by tiff.py
from upstep_fast.data.reading import axes
from upstep_fast.data.reading.budget import BYTES_PER_COEFFICIENT, BYTES_PER_PIXEL, BYTES_PER_VALUE, decoding, reduction
from upstep_fast.data.reading.intensity import chosen_bands, gray_of, to_bytes, to_pixels
from upstep_fast.data.reading.orientation import orientation_of, upright
from upstep_fast.data.reading.out_of_memory import error_of_library
from upstep_fast.data.reading.stored import MAX_PIXELS, Stored
from upstep_fast.data.reading.tiff_header import TIFF
from upstep_fast.errors import BadImage


def decode(
    data: bytes | memoryview,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    min_side: int | None = None,
    name: str = "",
    reading: Reading = AS_STORED,
) -> Tensor:
    """Decode an image to uint8 [channels, H, W].

    channels: 3: RGB, 1: gray, 4: RGBA as stored; any number for .npy and TIFF. min_side: the image is decoded at
    1/2, 1/4, 1/8 ... of its size as long as both sides keep this many pixels. name: for the error's text. reading: the
    map of values to 8 bits, and the bands. Raises BadImage, or MemoryError, which says nothing about the image.
    """
    with one_reason(data, name):
        return _decode(data, channels, max_pixels, min_side, reading)


def read_stored(
    data: bytes | memoryview, *, channels: int = 3, reading: Reading = AS_STORED, photographs: bool = True
) -> Stored | None:
    """Return an image's values before their map, as bands that make `channels`, or as all where the user chose some.

    photographs: return the pixels of images of 8 bits and less as values, too; otherwise None. Raises as `decode`.
    """
    with one_reason(data, ""):
        if (kind := kinds.kind_of_content(data)) is not None:
            return _only_picture(kind, data, MAX_PIXELS, reading)
        if (values := plan_values(data, channels, MAX_PIXELS, reading)) is not None:
            with decoding.hold(values.num_bytes):
                return values.read()
        return _photograph_values(data, channels, MAX_PIXELS, None, reading) if photographs else None


@contextlib.contextmanager
def one_reason(data: bytes | memoryview, name: str) -> Iterator[None]:
    """Raise what any decoder raises inside as BadImage, or as MemoryError, which says nothing about the image."""
    try:
        yield
    except BadImage as error:
        raise BadImage(error.reason, name) from None
    except UnidentifiedImageError:
        if bytes(data[:4]) in TIFF:
            raise BadImage("a TIFF that Pillow does not read; convert it to 8-bit RGB or to .npy", name) from None
        raise BadImage(f"not an image in a known format ({_looks_like(bytes(data[:64]))})", name) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        raise error_of_library(error, "cannot be decoded", name) from error


def _decode(data: bytes | memoryview, channels: int, max_pixels: int, min_side: int | None, reading: Reading) -> Tensor:
    if not data:
        raise BadImage("the file is empty")
    if (kind := kinds.kind_of_content(data)) is not None:
        return shrunk(pixels_of_values(_only_picture(kind, data, max_pixels, reading), reading, channels), min_side)
    wanted = reading.intensity.ranges or reading.bands or bytes(data[:6]) == NPY or has_nodata(data)
    values = plan_values(data, channels, max_pixels, reading) if wanted else None
    if values is not None:
        with decoding.hold(values.num_bytes):
            return shrunk(pixels_of_values(values.read(), reading, channels), min_side)
    if reading.keeps_photographs:
        return _decode_photograph(data, channels, max_pixels, min_side)
    return pixels_of_values(_photograph_values(data, channels, max_pixels, min_side, reading), reading, channels)


def _photograph_values(
    data: bytes | memoryview, channels: int, max_pixels: int, min_side: int | None, reading: Reading
) -> Stored:
    """Return the pixels of an image of 8 bits and less as values; of gray ones a single band. Raises as `decode`."""
    x = _decode_photograph(data, bands_of(data, reading) if reading.bands else channels, max_pixels, min_side)
    return Stored((x[:1] if x.stride(0) == 0 else x).numpy(), 0, 255)


def _only_picture(kind: kinds.Kind, data: bytes | memoryview, max_pixels: int, reading: Reading) -> Stored:
    """Return the values of a file of a kind of its own that holds one picture. Raises BadImage for several."""
    layout = kinds.layout(kind, data)
    pictures = axes.pieces(layout, reading)
    if len(pictures) != 1:
        raise BadImage(f"{axes.described(layout, reading)} holds {len(pictures)} images, one was asked for")
    height, width = layout.size("Y"), layout.size("X")
    _check_pixels(width, height, max_pixels)
    with decoding.hold(BYTES_PER_VALUE * height * width * layout.size("C")):
        return kinds.read(kind, data, pictures[0])


def pixels_of_values(stored: Stored, reading: Reading, channels: int) -> Tensor:
    """Return values as uint8 [channels, H, W]; colors are weighted to gray for one channel. Raises BadImage."""
    if not reading.bands:
        stored = chosen_bands(stored, reading, channels)
    if channels == 1 and len(stored.values) == 3 and not reading.bands:
        return gray_of(to_bytes(stored, reading.intensity))
    return to_pixels(stored, reading, channels)


def _decode_photograph(data: bytes | memoryview, channels: int, max_pixels: int, min_side: int | None) -> Tensor:
    """Decode an image by the declared range of its values. Raises BadImage, or its decoder's error."""
    start = bytes(data[:8])
    if start[:4] in TIFF:
        return _decode_tiff(data, channels, max_pixels, min_side)
    if start.startswith(b"\xff\xd8"):
        return shrunk(_decode_jpeg(data, channels, max_pixels, min_side), min_side)
    if start == png.SIGNATURE:
        png.check(data)
    return _decode_pillow(data, channels, max_pixels, min_side)


def from_pillow(image: Image.Image, channels: int = 3) -> Tensor:
    """Return a PIL image as uint8 [channels, H, W], upright, by the rules of `decode`. Raises BadImage."""
    x = _to_tensor(image, channels, None)
    return upright(x, orientation_of(image)).expand(channels, -1, -1)


def _decode_jpeg(data: bytes | memoryview, channels: int, max_pixels: int, min_side: int | None) -> Tensor:
    """Decode a JPEG. Raises BadImage if its coded data ends before the last pixel.

    Where data is missing, also before an end marker, libjpeg fills the rest with mid-gray and only warns. So an image
    that ends in mid-gray is decoded again with other bits appended to its data: they change pixels only where the data
    was too short.
    """
    end = bytes(data).rfind(b"\xff\xd9")
    if end < 0:
        raise BadImage("truncated JPEG: no end marker")
    x = _decode_pillow(data, channels, max_pixels, min_side)
    # the image is upright already: any corner may hold the file's last pixel
    corners = x[:, :: max(1, x.shape[1] - 1), :: max(1, x.shape[2] - 1)].flatten(1).T.tolist()
    if any(all(127 <= value <= 129 for value in corner) for corner in corners):
        padded = bytes(data[:end]) + b"\x2a\x95" * 256 + b"\xff\xd9"
        # not by torchvision, whose decoder warns on the console about surplus bits
        by_pillow, again = (_decode_pillow(d, channels, max_pixels, min_side, pillow_only=True) for d in (data, padded))
        if not torch.equal(by_pillow, again):
            raise BadImage("truncated JPEG: its data ends before its last pixel")
    return x


def _decode_tiff(data: bytes | memoryview, channels: int, max_pixels: int, min_side: int | None) -> Tensor:
    plan = plan_tiff(data, channels, max_pixels)
    if plan.by_pillow:
        return _decode_pillow(data, channels, max_pixels, min_side, tiff=plan)
    with decoding.hold(plan.num_bytes):
        x = decode_tiff_bands(data, plan, channels, max_pixels)
        return shrunk(upright(x, plan.page.orientation), min_side)


def shrunk(x: Tensor, min_side: int | None) -> Tensor:
    """Return an image at 1/2, 1/4, ... of its size, the mean over blocks, as long as both sides keep `min_side`.

    uint8 [C, H, W]. As libjpeg's scaled decoding: no crop of `min_side` or more pixels loses any, and a batch of large
    pictures of any format stays small.
    """
    factor = reduction(x.shape[1], x.shape[2], min_side)
    if factor == 1:
        return x
    planes = x[:1] if x.stride(0) == 0 else x  # gray, repeated
    shrunk = [np.asarray(Image.fromarray(plane.contiguous().numpy()).reduce(factor)) for plane in planes]
    return torch.from_numpy(np.stack(shrunk)).expand(len(x), -1, -1)


def _decode_pillow(
    data: bytes | memoryview,
    channels: int,
    max_pixels: int,
    min_side: int | None,
    *,
    pillow_only: bool = False,
    tiff: TiffPlan | None = None,
) -> Tensor:
    with Image.open(io.BytesIO(data), formats=("TIFF",) if tiff else FORMATS) as image:
        _check_pixels(*image.size, max_pixels)
        size = image.size
        if image.format == "PNG" and "transparency" in image.info:
            png.scale_transparent_color(data, image)
        if min_side:
            image.draft(image.mode, (min_side, min_side))
        with decoding.hold(_num_bytes(image, size)):
            x = jpeg.pixels(data, image) if channels == 3 and image.size == size and not pillow_only else None
            if x is None:
                image.load()
                x = _to_tensor(image, channels, tiff)
            x = upright(x, orientation_of(image)).expand(channels, -1, -1)
            return x if image.format == "JPEG" else shrunk(x, min_side)  # a JPEG's corners are checked before


def _num_bytes(image: Image.Image, size: tuple[int, int]) -> int:
    """Return the memory that decoding takes at most. size: of the file, before `draft`."""
    width, height = image.size
    progressive = BYTES_PER_COEFFICIENT * size[0] * size[1] if image.info.get("progressive") else 0
    return BYTES_PER_PIXEL * width * height + progressive


def _to_tensor(image: Image.Image, channels: int, tiff: TiffPlan | None) -> Tensor:
    """Return [channels, H, W] uint8, or [1, H, W] where all channels are equal."""
    array = torch.from_numpy(_to_array(image, channels, tiff))
    return array.permute(2, 0, 1) if array.ndim == 3 else array[None]


def _to_array(image: Image.Image, channels: int, tiff: TiffPlan | None) -> np.ndarray:
    """Return [H, W, channels] uint8, or [H, W] where all channels are equal."""
    mode = image.mode
    if mode == "F":
        raise BadImage("floating-point pixels have no defined range; give --intensity range:LO,HI")
    if mode.startswith("I"):
        return _high_byte(image, tiff)
    if channels == 4 and (tiff is None or mode == "RGBA"):
        return np.array(image.convert("RGBA"))
    if channels not in (1, 3) and tiff is None:  # of TIFFs only gray ones come here
        raise BadImage(f"has {len(image.getbands())} bands, {channels} were asked for; use TIFF or .npy")
    if image.has_transparency_data:
        image = _on_white(image, tiff)
    if channels == 1 or (mode in ("1", "L") and image.mode == mode):
        return np.array(image.convert("L"))
    return np.array(image.convert("RGB") if image.mode != "RGB" else image)


def _on_white(image: Image.Image, tiff: TiffPlan | None) -> Image.Image:
    """Return an image with transparency composited on white; the image itself where the alpha may be a band."""
    if tiff and not tiff.keep_alpha:
        say_alpha_left_out()
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def _high_byte(image: Image.Image, tiff: TiffPlan | None) -> np.ndarray:
    """Return the upper eight bits of gray pixels, [H, W] uint8. Pillow stretches a PGM of any maximum to 16 bits."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage("32-bit pixels above 65535 have no defined range; convert to 8 or 16 bits")
    array = (values >> (tiff.page.bits[0] - 8 if tiff else 8)).astype(np.uint8)
    if tiff is None and (clear := image.info.get("transparency")) is not None:  # a gray level of a PNG
        array[values == clear] = 255
    return 255 - array if tiff and tiff.inverted else array


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels, above the limit of {max_pixels}; give --tiles 224")


def _looks_like(start: bytes) -> str:
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "it holds HTML or XML"
    return "it holds text" if all(9 <= b < 127 for b in start) else f"it starts with {start[:8].hex(' ')}"
