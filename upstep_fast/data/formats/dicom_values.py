"""Values of DICOM pixels, by the formulas of the standard (PS3.3): rescale, Modality LUT, palette, padding and YBR."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from upstep_fast.data.formats.rescale import Range, rescaled, stored_range
from upstep_fast.errors import BadImage


def physical(
    values: np.ndarray, declared: Range | None, header: Dataset, rescale: tuple[float, float], is_little_endian: bool
) -> tuple[np.ndarray, Range | None]:
    """Return values through the Modality LUT, or slope * value + intercept, and their declared range.

    values: [H, W]. declared: range of the stored values, None for floats. rescale: slope and intercept. Raises BadImage
    as `rescaled`.
    """
    if header.get("ModalityLUTSequence"):
        item = header.ModalityLUTSequence[0]
        _, first, bits = item.LUTDescriptor
        data = item.LUTData
        table = _entries(data, bits, is_little_endian) if isinstance(data, bytes) else np.array(data, np.uint16)
        return look_up(values, table, first), stored_range(bits, False)
    return rescaled(values, declared, *rescale)


def rescale_of_frames(header: Dataset, num_frames: int) -> list[tuple[float, float]]:
    """Return slope and intercept of each frame: of its functional group, the shared one, or the file.

    One pair where all are equal.
    """
    shared = header.get("SharedFunctionalGroupsSequence")
    of_all = _rescale(shared[0]) if shared else None
    if of_all is None:
        slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
        of_all = _pair(header.get("DoseGridScaling") if slope is None else slope, intercept)
    groups = list(header.get("PerFrameFunctionalGroupsSequence") or ())[:num_frames]
    pairs = [_rescale(group) or of_all for group in groups]
    pairs += [of_all] * (num_frames > len(pairs))
    return pairs[:1] if len(set(pairs)) == 1 else pairs


def _rescale(group: Dataset) -> tuple[float, float] | None:
    transform = group.get("PixelValueTransformationSequence")
    return _pair(transform[0].get("RescaleSlope"), transform[0].get("RescaleIntercept")) if transform else None


def _pair(slope: Any, intercept: Any) -> tuple[float, float]:
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def look_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """Return table entries, [H, W] or [H, W, 3]; `first` is the value of entry 0, and values beyond take the ends."""
    return table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)]


def color_table(header: Dataset, is_little_endian: bool) -> tuple[np.ndarray, int]:
    """Return the palette, uint8 or uint16 [N, 3], and the value that its first entry stands for. Raises BadImage."""
    length, first, bits = (int(number) for number in header.RedPaletteColorLookupTableDescriptor)
    length = length or 1 << 16
    colors = [header.get(f"{color}PaletteColorLookupTableData") for color in ("Red", "Green", "Blue")]
    if all(colors):
        stored_bits = 16 if len(colors[0]) >= 2 * length else 8  # entries of 8 bits may be stored in 16
        table = np.stack([_entries(color, stored_bits, is_little_endian)[:length] for color in colors], -1)
        table = table.astype(np.uint8) if bits == 8 and table.max() < 256 else table
    elif bits == 8 and length > 256:  # apply_color_lut counts entries in 8 bits
        raise BadImage(f"a segmented palette of {length} entries of 8 bits is not read")
    else:
        table = apply_color_lut(np.arange(first, first + length, dtype=np.int32), header)[:, :3]
    if len(table) < length:
        raise BadImage(f"a palette of {len(table)} entries, {length} are declared")
    return table, first


def _entries(data: bytes, bits: int, is_little_endian: bool) -> np.ndarray:
    """Return entries of a lookup table in native byte order."""
    if bits <= 8:
        return np.frombuffer(data, np.uint8)
    return np.frombuffer(data, "<u2" if is_little_endian else ">u2").astype(np.uint16)


def without_unused_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Return integers with the bits above the lowest `bits` replaced by their sign, or by 0 where they are unsigned."""
    shift = 8 * values.dtype.itemsize - bits
    return (values << shift) >> shift


def valid_mask(raw: np.ndarray, values: np.ndarray, header: Dataset, options: dict[str, Any]) -> np.ndarray | None:
    """Return which pixels are no padding, [H, W] bool; None if the header declares no padding.

    Padding are the values from PixelPaddingValue to PixelPaddingRangeLimit, in either order, or the former alone. Both
    are read as the pixels are, signed or not, whatever their own type says. raw: with the unused bits, in which alone
    a padding value above BitsStored is seen.
    """
    is_float = options["pixel_keyword"] != "PixelData"
    name = options["pixel_keyword"].replace("PixelData", "PixelPadding")
    ends = [header.get(f"{name}{end}") for end in ("Value", "RangeLimit")]
    if ends[0] is None:
        return None
    ends = [float(end) if is_float else _as_stored(int(end), options) for end in ends if end is not None]
    low, high = min(ends), max(ends)
    if not is_float:
        lowest, highest = stored_range(options["bits_stored"], bool(options["pixel_representation"]))
        values = values if lowest <= low and high <= highest else raw
    return ~((low <= values) & (values <= high))


def _as_stored(number: int, options: dict[str, Any]) -> int:
    """Return a number as it reads in the type of the pixels: 63536 as -2000 where they are signed, of 16 bits."""
    bits = options["bits_allocated"]
    number &= (1 << bits) - 1
    return number - (1 << bits) if options["pixel_representation"] and number >> (bits - 1) else number


def ybr_to_rgb(values: np.ndarray, bits: int) -> np.ndarray:
    """Return YBR_FULL as RGB, [H, W, 3] of unsigned integers of `bits` bits (PS3.3, C.7.6.3.1.2)."""
    y, blue, red = np.moveaxis(values.astype(np.float64), 2, 0)
    blue, red = blue - 2 ** (bits - 1), red - 2 ** (bits - 1)
    green = y - 0.114 * 1.772 / 0.587 * blue - 0.299 * 1.402 / 0.587 * red
    rgb = np.stack([y + 1.402 * red, green, y + 1.772 * blue], -1)
    return np.clip(np.floor(rgb + 0.5), 0, 2**bits - 1).astype(values.dtype)
