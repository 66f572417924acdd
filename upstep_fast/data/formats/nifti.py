"""NIfTI-1, NIfTI-2 and FreeSurfer's MGH volumes by nibabel, also compressed by gzip, a slice at a time.

    slices        along the third stored axis, the plane of acquisition, in stored order; then time
    orientation   as radiologists view it, by flips and transposition alone: rows run from superior to inferior, else
                  from anterior to posterior; columns from right to left, else from anterior to posterior. The sform
                  counts, else the qform, as for nibabel; without both rows and columns are the second and first stored
                  axis
    values        scl_slope * stored + scl_inter; the range is that of the stored integers; NaN is not valid
    colors        RGB24 and RGBA32 without alpha; a fifth axis is the bands

Complex values and pairs of .hdr and .img are refused.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.orientations import io_orientation

from upstep_fast.data.formats.reasons import bad_image
from upstep_fast.data.formats.rescale import rescaled
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage

_GZIP = b"\x1f\x8b"
_MAX_RATIO = 1100  # of gzip, which makes one byte of at most 1,032
_FIRST = 284  # byte that data may begin with, at the earliest: of MGH
_HEADER = 540  # bytes; of NIfTI-2, the longest
_THIRD = ("Z", "T", "C")  # names of the stored axes from the third on
_local = threading.local()  # the compressed file that a thread read last: its key, stream and volume


@dataclass(frozen=True)
class _Volume:
    """A volume, by its header."""

    shape: tuple[int, ...]  # as stored, the first axis fastest
    dtype: np.dtype
    offset: int  # of the first value
    scale: tuple[float, float]  # slope and intercept
    axes: str  # names of the stored axes: XY or YX, then Z, T, C
    flips: tuple[bool, bool]  # of the first and the second axis
    what: str

    @property
    def layout(self) -> Layout:
        """Axes with C of colors."""
        if self.dtype.names:
            return Layout(self.axes + "C", (*self.shape, 3), self.what)
        return Layout(self.axes, self.shape, self.what)


def layout(file: File) -> Layout:
    """Return the axes of a volume, and C of colors. Raises BadImage."""
    with bad_image("a volume"), _open(file) as (_, volume):
        return volume.layout


def read(file: File, piece: Piece) -> Stored:
    """Return a slice of a volume, or a window of it. Raises BadImage."""
    with bad_image("a volume"), _open(file) as (stream, volume):
        top, left, height, width = volume.layout.window(piece)
        place = tuple(slice(None) if axis in "YXC" else piece.index(axis) for axis in volume.axes)
        values = np.asarray(ArrayProxy(stream, (volume.shape, volume.dtype, volume.offset), mmap=False)[place])
    if volume.dtype.names:
        values = np.stack([values[name] for name in "RGB"], -1)
    values = np.flip(values, tuple(axis for axis in (0, 1) if volume.flips[axis]))
    values = np.atleast_3d(values).transpose((2, 0, 1) if volume.axes[0] == "Y" else (2, 1, 0))
    values = values[:, top : top + height, left : left + width]
    return _stored(values.astype(values.dtype.newbyteorder("="), order="C"), volume.scale)


def _stored(values: np.ndarray, scale: tuple[float, float]) -> Stored:
    if values.dtype.kind == "f":
        values = values.astype(np.float64) if values.itemsize > 8 else values
        return Stored(rescaled(values, None, *scale)[0])
    info = np.iinfo(values.dtype)
    values, declared = rescaled(values, (int(info.min), int(info.max)), *scale)
    low, high = declared or (None, None)
    return Stored(values, low, high)


@contextlib.contextmanager
def _open(file: File) -> Iterator[tuple[BinaryIO, _Volume]]:
    """Yield a file's content, decompressed, and its header.

    Each thread keeps the compressed file that it read last open, so that slices in order are decompressed once.
    """
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file) as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        is_compressed = stream.read(2) == _GZIP
        stream.seek(0)
        if not is_compressed:
            yield stream, _volume(stream.read(_HEADER), size)
            return
        status = os.fstat(stream.fileno()) if isinstance(file, str) else None
        if status is None:
            inner = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
            yield inner, _volume(inner.read(_HEADER), size * _MAX_RATIO)
            return
    yield from _kept(str(file), (file, status.st_mtime_ns, status.st_size))


def _kept(path: str, key: tuple[Any, ...]) -> Iterator[tuple[BinaryIO, _Volume]]:
    kept = getattr(_local, "kept", None)
    _local.kept = None  # until it is known that its place is right
    if kept is None or kept[0] != key:
        if kept is not None:
            kept[1].close()
        stream = cast(BinaryIO, gzip.open(path, "rb"))  # noqa: SIM115  (kept open)
        kept = key, stream, _volume(stream.read(_HEADER), key[2] * _MAX_RATIO)
    yield kept[1:]
    _local.kept = kept


def _volume(start: bytes, available: int) -> _Volume:
    """Return what a header says, checked against the bytes that the file can hold. Raises BadImage."""
    header, is_oriented = _header(start)
    shape, dtype, offset = _stored_array(header, available)
    slope, intercept = header.get_slope_inter()
    if slope is None or dtype.names:
        slope, intercept = 1, 0
    axes, flips, note = _orientation(header) if is_oriented else ("XY", (False, False), ", orientation unknown")
    kind, values = "MGH" if isinstance(header, MGHHeader) else "NIfTI", "RGB" if dtype.names else dtype.name
    axes += "".join(_THIRD[: len(shape) - 2])
    return _Volume(shape, dtype, offset, (float(slope), float(intercept)), axes, flips, f"{kind} {values}{note}")


def _stored_array(header: Any, available: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return the stored values' shape without axes of size 1 at its end, their type and offset. Raises BadImage."""
    shape = tuple(int(length) for length in header.get_data_shape())
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if not 2 <= len(shape) <= 5 or min(shape) < 1:
        raise BadImage(f"a volume of shape {shape}; those of two to five axes are read")
    dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
    if (dtype.names is None and dtype.kind not in "iuf") or (dtype.names and len(shape) > 4):
        raise BadImage(f"values of {dtype} on {len(shape)} axes are not read; save real numbers, or colors in 8 bits")
    end = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
    if offset < _FIRST or end > available:
        raise BadImage(f"truncated, or a wrong header: {shape} of {dtype} would end at byte {end} of {available}")
    return shape, dtype, offset


def _header(start: bytes) -> tuple[Any, bool]:
    """Return nibabel's header, and whether it states an orientation. Raises BadImage."""
    if start[344:348] == b"ni1\0" or start[4:8] == b"ni2\0":
        raise BadImage("the header of a pair of .hdr and .img; save it as .nii")
    if start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0":
        kind = nibabel.Nifti1Header if start[344:348] == b"n+1\0" else nibabel.Nifti2Header
        header = kind(start[: kind.sizeof_hdr], check=False)
        # as nibabel mends them
        header["pixdim"][0] = -1 if header["pixdim"][0] == -1 else 1
        header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
        return header, bool(header["qform_code"] > 0 or header["sform_code"] > 0)
    if start[:4] == b"\0\0\0\x01" and len(start) >= 284:
        return MGHHeader(start[:284], check=False), start[28:30] != b"\0\0"
    raise BadImage("not a volume: neither the magic of NIfTI nor that of MGH")


def _orientation(header: Any) -> tuple[str, tuple[bool, bool], str]:
    """Return the names of the first two stored axes, whether each is turned round, and a note for messages.

    Axes of the world are R, A and S, by nibabel's `io_orientation`. Of the two in the picture the later one is the
    rows, and both run from plus to minus.
    """
    world = io_orientation(header.get_best_affine())
    if not np.isfinite(world).all():
        return "XY", (False, False), ", orientation unknown"
    note = ""
    if not isinstance(header, MGHHeader) and header["qform_code"] > 0 and header["sform_code"] > 0:
        with contextlib.suppress(Exception):  # a quaternion without a rotation says nothing
            if not np.array_equal(io_orientation(header.get_qform()), world):
                note = ", sform taken, qform disagrees"
    (first, sign_1), (second, sign_2) = world[:2].tolist()
    return "YX" if first > second else "XY", (sign_1 > 0, sign_2 > 0), note
