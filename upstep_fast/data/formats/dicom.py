"""DICOM images by pydicom: the stored values of a frame, through what the file defines about them, but no window.

    unused bits, overlays   masked; values signed as PixelRepresentation says
    rescale                 Modality LUT, or slope and intercept (of the frame in enhanced objects), or dose scaling
    MONOCHROME1             inverted; the window (VOI LUT) is not applied: brightness is the user's choice
    PALETTE COLOR           through its table, of 8 or 16 bits; ICC profiles are not applied
    YBR                     converted to RGB, once
    padding                 PixelPaddingValue to its range limit is not valid
    1 bit, 32 bits, float   as they are

Each transfer syntax has one decoder, pylibjpeg's, whatever else is installed: pixels depend on the file alone.
References to other files are not followed.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import replace
from typing import BinaryIO

import numpy as np
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder

from upstep_fast.data.formats.dicom_file import MONOCHROME, PLUGIN, DicomImage, open_image
from upstep_fast.data.formats.dicom_values import (
    color_table,
    look_up,
    physical,
    valid_mask,
    without_unused_bits,
    ybr_to_rgb,
)
from upstep_fast.data.formats.reasons import bad_image
from upstep_fast.data.formats.rescale import stored_range
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage, printable

# lax files make pydicom warn; their values are right, or the file is refused
warnings.filterwarnings("ignore", module="pydicom")


def layout(file: File) -> Layout:
    """Return the axes of a DICOM file: frames F if there are several, Y, X, and C of colors. Raises BadImage."""
    with bad_image("DICOM"), open_image(file) as (image, _):
        return _layout(image)


def read(file: File, piece: Piece) -> Stored:
    """Return a frame, or a window of it, as physical values. Raises BadImage."""
    with bad_image("DICOM"), open_image(file) as (image, stream):
        top, left, height, width = _layout(image).window(piece)
        stored = _stored(image, stream, piece.index("F"))
    if piece.window is None:
        return stored
    rows, columns = slice(top, top + height), slice(left, left + width)
    valid = None if stored.valid is None else stored.valid[rows, columns]
    return replace(stored, values=stored.values[:, rows, columns].copy(), valid=valid)


def _layout(image: DicomImage) -> Layout:
    sizes = {"F": image.frames, "Y": image.options["rows"], "X": image.options["columns"]}
    sizes["C"] = 1 if image.color in MONOCHROME else 3
    axes = [axis for axis, size in sizes.items() if size > 1 or axis in "YX"]
    modality = printable(str(image.header.get("Modality") or "image"), 16)
    values = "floats" if image.is_float else f"{image.options['bits_stored']} bits"
    return Layout(
        "".join(axes),
        tuple(sizes[axis] for axis in axes),
        f"DICOM {modality}, {values}",
        series=str(image.header.get("SeriesInstanceUID") or ""),
        number=_instance_number(image.header),
    )


def _instance_number(header: Dataset) -> int | None:
    try:
        return int(header.InstanceNumber)
    except (AttributeError, TypeError, ValueError, OverflowError):  # it says nothing about the pixels
        return None


def _stored(image: DicomImage, stream: BinaryIO, frame: int) -> Stored:
    raw, color = _decoded(image, stream, frame)
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    header, options, is_little_endian = image.header, image.options, image.syntax.is_little_endian
    values, declared, bits = raw, None, 0
    if not image.is_float:
        bits = options["bits_stored"]
        declared = stored_range(bits, bool(options["pixel_representation"]))
        if not image.has_codestream and options["bits_allocated"] > 1:
            values = without_unused_bits(raw, bits)
    if color == "PALETTE COLOR":
        table, first = color_table(header, is_little_endian)
        values, declared, color = look_up(values, table, first), stored_range(8 * table.itemsize, False), "RGB"
    if color in ("YBR_FULL", "YBR_FULL_422"):
        values, color = ybr_to_rgb(values, bits), "RGB"
    valid = None
    if color in MONOCHROME:
        rescale = image.rescales[min(frame, len(image.rescales) - 1)]
        valid = valid_mask(raw, values, header, options)
        values, declared = physical(values, declared, header, rescale, is_little_endian)
    elif color != "RGB":
        raise BadImage(f"{color} pixels of {image.syntax.name} are not read")
    low, high = declared or (None, None)
    bands = np.moveaxis(np.atleast_3d(values), 2, 0)
    return Stored(bands, low, high, valid, inverted=color == "MONOCHROME1")


def _decoded(image: DicomImage, stream: BinaryIO, frame: int) -> tuple[np.ndarray, str]:
    """Return a frame as decoded, [H, W] or [H, W, 3], and what its samples are then: RGB where YBR was converted."""
    options = dict(image.options)
    if options["bits_allocated"] == 1 and not image.syntax.is_encapsulated:
        return _bits(image, stream, frame), image.color
    if image.has_codestream:
        offsets = options.get("extended_offsets")
        code = get_frame(stream, frame, number_of_frames=image.frames, extended_offsets=offsets)
        stream.seek(image.at)
        if (size := _coded_size(code)) != (expected := (options["rows"], options["columns"])):
            raise BadImage(f"its header declares {expected} rows and columns, its {image.syntax.name} data {size}")
    else:
        options["correct_unused_bits"] = False  # after padding was told apart
    values, properties = get_decoder(image.syntax).as_array(
        stream,
        index=frame,
        raw=options["bits_allocated"] != 8,  # pydicom converts YBR of 8 bits only
        decoding_plugin=PLUGIN if image.syntax.is_encapsulated else "",
        **options,
    )
    return values, str(properties["photometric_interpretation"])


def _bits(image: DicomImage, stream: BinaryIO, frame: int) -> np.ndarray:
    """Return a frame of packed bits as 0 and 1. Frames do not begin with a byte, which pydicom 3.0.2 cannot read."""
    shape = image.options["rows"], image.options["columns"]
    count = shape[0] * shape[1]
    first, skipped = divmod(frame * count, 8)
    stream.seek(first, io.SEEK_CUR)
    data = np.frombuffer(stream.read((skipped + count + 7) // 8), np.uint8)
    return np.unpackbits(data, bitorder="little")[skipped : skipped + count].reshape(shape)


def _coded_size(code: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream declares; None if it is none of them.

    Decoders allocate what the codestream says, whatever the data set declares.
    """
    at = code.find(b"\xff\x4f\xff\x51", 0, 1 << 16)  # SOC and SIZ, perhaps in a JP2 file
    if at >= 0:
        right, bottom, left, top = struct.unpack_from(">4L", code, at + 8)
        return bottom - top, right - left
    at = 2
    while code[:2] == b"\xff\xd8" and at + 9 <= len(code) and code[at] == 0xFF:
        marker, length = code[at + 1], int.from_bytes(code[at + 2 : at + 4], "big")
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return struct.unpack_from(">HH", code, at + 5)
        at += 1 if marker == 0xFF else 2 + length
    return None
