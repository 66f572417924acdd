"""OME-Zarr, versions 0.1 to 0.5 in Zarr 2 and 3, by zarr: a folder on a local disk, read a window at a time.

    axes      those of the metadata; without any, as before version 0.3, TCZYX. Other names than T, C, Z are F, then P
    images    `multiscales` of the folder, else the series of bioformats2raw, else the fields of a plate: positions P,
              as many as equal the first one; others are left out. Labels are no images
    levels    those that differ from the first in rows and columns alone
    values    as stored, in native order; a chunk that is not there has the fill value. `omero`, which is for display,
              is not used

Chunks that are links out of the folder, and codecs that are not known to be harmless, are refused.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from upstep_fast.data.formats.reasons import bad_image
from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.regular import ZARR_METADATA, is_zarr
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage, ConfigError
from upstep_fast.input_files import read_json

_MICROMETERS = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
# what numcodecs' pickle and the like would do is decided by the file
_CODECS = {"blosc", "zlib", "gzip", "bz2", "lzma", "zstd", "lz4", "shuffle", "delta", "bitround", "crc32", "crc32c"}
_CODECS |= {"bytes", "transpose", "sharding_indexed"}
_MAX_CHUNK = 1 << 28  # values
_MAX_IMAGES = 10_000
_MAX_METADATA = 16 << 20  # bytes
_opened = Recent(64)


class _Store(LocalStore):
    """Store whose files lie in its folder."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        await asyncio.to_thread(_check_inside, str(self.root), key)
        return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        ranges = list(key_ranges)
        for key in {key for key, _ in ranges}:
            await asyncio.to_thread(_check_inside, str(self.root), key)
        return await super().get_partial_values(prototype, ranges)


@dataclass(frozen=True, eq=False)
class _Images:
    """Images of a folder that are alike."""

    form: Layout
    axes: str  # of the arrays, by our names
    levels: tuple[tuple[Any, ...], ...]  # of each image its arrays, full size first


def layout(file: File) -> Layout:
    """Return axes, levels and resolution from the metadata. Raises BadImage."""
    return _open(file).form


def read(file: File, piece: Piece) -> Stored:
    """Return one picture, or a window of a level of it. Raises BadImage."""
    images = _open(file)
    top, left, height, width = images.form.window(piece)
    array = images.levels[piece.index("P") if images.form.axes.startswith("P") else 0][piece.level]
    place = {"Y": slice(top, top + height), "X": slice(left, left + width), "C": slice(None)}
    with bad_image("an OME-Zarr image"):
        values = np.asarray(array[tuple(place.get(axis, piece.index(axis)) for axis in images.axes)])
    order = [axis for axis in images.axes if axis in place]
    values = values.transpose([order.index(axis) for axis in "CYX" if axis in order])
    values = np.ascontiguousarray(values.reshape(-1, height, width), values.dtype.newbyteorder("="))
    if values.dtype.kind == "f":
        return Stored(values)
    info = np.iinfo(values.dtype)
    return Stored(values, int(info.min), int(info.max))


def _open(file: File) -> _Images:
    if not isinstance(file, str) or not is_zarr(file):
        raise BadImage("an OME-Zarr image is a folder with .zattrs or zarr.json; unpack it")
    states = [os.stat(place) for name in ZARR_METADATA if os.path.isfile(place := os.path.join(file, name))]
    key = (file, *((state.st_ino, state.st_size, state.st_mtime_ns) for state in states))

    def make() -> tuple[_Images, int]:
        with bad_image("an OME-Zarr image"):
            return _parsed(file), 1

    opened: _Images = _opened.get(key, make)
    return opened


def _parsed(root: str) -> _Images:
    paths = _image_paths(root)
    scales = _multiscales(root, paths[0])
    names = _names(scales)
    first, mpp = _arrays(root, paths[0], scales, len(names)), _micrometers(scales)
    alike = [first]
    for path in paths[1:]:
        others = _multiscales(root, path)
        arrays = _arrays(root, path, others, len(names)) if _names(others) == names else []
        if [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in first]:
            alike.append(arrays)
    shape = dict(zip(names, map(int, first[0].shape), strict=True))
    same = [k for k, a in enumerate(first) if _around(names, a.shape) == _around(names, first[0].shape)]
    rows, columns = names.index("Y"), names.index("X")
    sizes = tuple((int(first[k].shape[rows]), int(first[k].shape[columns])) for k in same)
    if len(alike) > 1 and "P" in shape:
        raise BadImage("several images of more than three axes besides Y, X and C")
    axes = ("P" if len(alike) > 1 else "") + names
    left_out = len(paths) - len(alike)
    what = f"OME-Zarr, {left_out} images of other sizes left out," if left_out else "OME-Zarr"
    lengths = tuple(len(alike) if axis not in shape else shape[axis] for axis in axes)
    form = Layout(axes, lengths, what, sizes if len(sizes) > 1 else (), mpp)
    return _Images(form, names, tuple(tuple(arrays[k] for k in same) for arrays in alike))


def _around(names: str, shape: tuple[int, ...]) -> list[int]:
    return [n for axis, n in zip(names, shape, strict=True) if axis not in "YX"]


def _image_paths(root: str) -> list[str]:
    """Return the groups of a folder's images, the first of which are its own."""
    attributes = _attributes(root, "")
    if "multiscales" in attributes:
        return [""]
    if "plate" in attributes:
        wells = [_inside(well["path"]) for well in attributes["plate"]["wells"][:_MAX_IMAGES]]
        paths = [
            f"{well}/{_inside(image['path'])}" for well in wells for image in _attributes(root, well)["well"]["images"]
        ]
    else:
        paths = sorted((name for name in os.listdir(root) if name.isdecimal() and len(name) < 7), key=int)
        if "bioformats2raw.layout" not in attributes:
            paths = []
    if not 0 < len(paths) <= _MAX_IMAGES:
        raise BadImage(
            f"{len(paths)} images in its OME metadata, those of 1 to {_MAX_IMAGES:,} are read; "
            "write it as OME-Zarr with multiscales"
        )
    return paths


def _attributes(root: str, group: str) -> dict[str, Any]:
    """Return the OME attributes of a group; of Zarr 3 those under "ome". Raises BadImage."""
    metadata = _json(root, group, "zarr.json")
    if metadata is not None:
        attributes = metadata.get("attributes", {})
        found = attributes.get("ome", attributes)
    else:
        found = _json(root, group, ".zattrs") or {}
    if not isinstance(found, dict):
        raise BadImage("an OME-Zarr image whose attributes are no table")
    return found


def _json(root: str, group: str, name: str) -> Any:
    """Return a metadata file's content; None if it is not there."""
    path = os.path.join(root, group, name)
    if not os.path.exists(path):
        return None
    _check_inside(root, os.path.join(group, name))
    try:
        return read_json(Path(path), "data", _MAX_METADATA)
    except ConfigError as error:
        raise BadImage(str(error).removeprefix("data: ")) from error


def _multiscales(root: str, group: str) -> dict[str, Any]:
    scales: dict[str, Any] = _attributes(root, group)["multiscales"][0]
    return scales


def _names(scales: dict[str, Any]) -> str:
    """Return our names of the axes."""
    stated = scales.get("axes") or list("tczyx")
    axes = [axis if isinstance(axis, str) else axis["name"] for axis in stated]
    known, free = {"t": "T", "c": "C", "z": "Z", "y": "Y", "x": "X"}, ["F", "P"]
    unknown = [axis for axis in axes if axis.lower() not in known]
    if len(unknown) > len(free):
        raise BadImage(f"axes {', '.join(axes)}; those of at most two other names than t, c, z, y and x are read")
    return "".join(known.get(axis.lower()) or free[unknown.index(axis)] for axis in axes)


def _micrometers(scales: dict[str, Any]) -> float | None:
    """Return the size of a pixel of the full size; None if it is not stated."""
    stated = scales.get("axes") or []
    column = next((k for k, axis in enumerate(stated) if isinstance(axis, dict) and axis["name"] == "x"), None)
    if column is None or (unit := _MICROMETERS.get(stated[column].get("unit", ""))) is None:
        return None
    both = [*scales["datasets"][0].get("coordinateTransformations", []), *scales.get("coordinateTransformations", [])]
    size = math.prod((float(one["scale"][column]) for one in both if one.get("type") == "scale"), start=unit)
    return size if 0 < size < 1e9 else None


def _arrays(root: str, group: str, scales: dict[str, Any], axes: int) -> list[Any]:
    """Return the arrays of an image's levels. Raises BadImage for those that are not read."""
    arrays = []
    for level in scales["datasets"][:64]:
        path = "/".join(part for part in (group, _inside(level["path"])) if part)
        _check_codecs(root, path)
        version = 3 if os.path.exists(os.path.join(root, path, "zarr.json")) else 2
        array: Any = zarr.open_array(_Store(root, read_only=True), path=path, mode="r", zarr_format=version)  # type: ignore[arg-type]
        if array.ndim != axes or 0 in array.shape or array.dtype.kind not in "uif":
            raise BadImage(f"an array of {array.dtype} of shape {array.shape} for {axes} axes; use numbers")
        if math.prod(array.chunks) > _MAX_CHUNK:
            raise BadImage(f"chunks of {array.chunks} values, above the limit of {_MAX_CHUNK}; write smaller ones")
        arrays.append(array)
    return arrays


def _check_codecs(root: str, path: str) -> None:
    """Raise BadImage unless an array's codecs do no more than to unpack numbers."""
    if (metadata := _json(root, path, "zarr.json")) is not None:
        codecs = list(metadata.get("codecs", []))
        for codec in codecs:  # grows by those of shards
            inner = codec.get("configuration", {})
            codecs += [*inner.get("codecs", []), *inner.get("index_codecs", [])]
        used = {codec["name"] for codec in codecs}
    else:
        metadata = _json(root, path, ".zarray")
        if metadata is None:
            raise BadImage(f"its level {path} is missing")
        used = {codec["id"] for codec in [metadata.get("compressor"), *(metadata.get("filters") or [])] if codec}
    if unknown := sorted(used - _CODECS):
        raise BadImage(f"values packed by {', '.join(map(str, unknown))}; write it again with zstd or blosc")


def _inside(path: str) -> str:
    """Return a path of the metadata that stays in its folder. Raises BadImage for another."""
    if not re.fullmatch(r"[^/\\\0]+(/[^/\\\0]+)*", path) or {".", ".."} & set(path.split("/")):
        raise BadImage(f"its metadata name the path {path!r}, which is not in its folder")
    return path


def _check_inside(root: str, key: str) -> None:
    """Raise BadImage for a link out of the folder, and for what is no regular file."""
    path = os.path.join(root, key)
    base = os.path.realpath(root)
    if os.path.commonpath([base, os.path.realpath(path)]) != base:
        raise BadImage(f"{key} is a link out of its folder")
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadImage(f"{key} is not a regular file")
