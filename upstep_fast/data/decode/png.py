"""PNGs: what Pillow does not verify or scale."""

from __future__ import annotations

import zlib

from PIL import Image

from upstep_fast.errors import BadImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _RGB = 0, 2  # color types


def check(data: bytes | memoryview) -> None:
    """Raise BadImage for cut chunks, wrong checksums and a missing IEND: Pillow does not verify those of pixel data."""
    view, at, kind = memoryview(data), len(SIGNATURE), b""
    while kind != b"IEND":
        length = int.from_bytes(view[at : at + 4], "big")
        kind = bytes(view[at + 4 : at + 8])
        stored = view[at + 8 + length : at + 12 + length]
        if len(stored) != 4:
            raise BadImage("truncated PNG")
        if zlib.crc32(view[at + 4 : at + 8 + length]) != int.from_bytes(stored, "big"):
            raise BadImage(f"PNG chunk {kind.decode('latin-1')!r} has a wrong checksum")
        at += 12 + length


def scale_transparent_color(data: bytes | memoryview, image: Image.Image) -> None:
    """Bring a PNG's transparent gray to the range of the decoded pixels, 0 to 255, which Pillow does not do.

    Raises BadImage for a 16-bit color, which cannot be found in the high bytes that Pillow decodes.
    """
    bits, color_type = data[24], data[25]
    if color_type == _RGB and bits == 16:
        raise BadImage("a PNG of 16-bit colors, one of them transparent; convert it to 8 bits or give it alpha")
    if color_type == _GRAY and bits in (2, 4):
        image.info["transparency"] = image.info["transparency"] * 255 // ((1 << bits) - 1)
