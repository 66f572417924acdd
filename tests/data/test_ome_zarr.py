"""OME-Zarr folders give the values that were written, as one file of the listing, and nothing outside them is read."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from upstep_fast.config.reading import Reading
from upstep_fast.data.formats import kinds
from upstep_fast.data.formats.kinds import ZARR
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading import axes
from upstep_fast.data.reading.stored import Piece
from upstep_fast.data.sources import open_source
from upstep_fast.errors import BadImage, DataError

zarr = pytest.importorskip("zarr", reason="install upstep_fast[microscopy]")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SIZES = {"t": 2, "c": 3, "z": 4, "y": 37, "x": 53}
ORDERS = ("yx", "zyx", "cyx", "tzyx", "czyx", "tczyx")
DTYPES = (">u2", "<u2", "u1", "i2", ">f4", "f8")
PACKED = ("", "none", "gzip", "shards")


def values_of(order: str, dtype: str) -> np.ndarray:
    shape = tuple(SIZES[axis] for axis in order)
    return (np.random.default_rng(len(order)).random(shape) * 60_000).astype(dtype)


def write(
    path: Path, array: np.ndarray, order: str, version: int = 2, packed: str = "default", levels: int = 1
) -> None:
    """Write an image with levels of 1/1, 1/2 ... in rows and columns, under names that are no numbers."""
    group = zarr.open_group(path, mode="w", zarr_format=version)
    chunks = tuple(1 if axis not in "yx" else 16 for axis in order)
    options: dict = {"chunks": chunks}
    if packed == "none":
        options["compressors"] = None
    elif packed == "gzip":
        options["compressors"] = zarr.codecs.GzipCodec() if version == 3 else __import__("numcodecs").GZip()
    elif packed == "shards" and version == 3:
        options["shards"] = tuple(2 * n for n in chunks)
    for k in range(levels):
        level = np.ascontiguousarray(array[..., :: 2**k, :: 2**k])
        group.create_array(f"s{k}", shape=level.shape, dtype=level.dtype, **options)[...] = level
    kind = {"t": "time", "c": "channel"}
    stated = [{"name": axis, "type": kind.get(axis, "space")} for axis in order]
    for axis in stated:
        if axis["type"] == "space":
            axis["unit"] = "nanometer"
    datasets = [
        {"path": f"s{k}", "coordinateTransformations": [{"type": "scale", "scale": [250.0 * 2**k] * len(order)}]}
        for k in range(levels)
    ]
    image = {"multiscales": [{"version": "0.4", "axes": stated, "datasets": datasets}]}
    group.attrs.update({"ome": image} if version == 3 else image)


def check(path: Path, array: np.ndarray, order: str) -> None:
    layout = kinds.layout(ZARR, str(path))
    assert (layout.axes, layout.shape) == (order.upper(), array.shape)
    for picture in axes.pieces(layout, Reading()):
        stored = kinds.read(ZARR, str(path), picture)
        one = array[tuple(slice(None) if axis in "cyx" else picture.index(axis.upper()) for axis in order)]
        assert stored.values.dtype.isnative
        assert np.array_equal(stored.values, one.reshape(-1, *one.shape[-2:]))
    window = kinds.read(ZARR, str(path), Piece(picture.at, (5, 7, 20, 30)))
    assert np.array_equal(window.values, stored.values[:, 5:25, 7:37])


CASES = list(itertools.product(ORDERS, DTYPES, (2, 3), PACKED))


@pytest.mark.parametrize("cases", [CASES[::59], pytest.param(CASES, marks=pytest.mark.long)])
def test_values_that_were_written(tmp_path, cases):
    for number, (order, dtype, version, packed) in enumerate(cases):
        path = tmp_path / f"{number}.ome.zarr"
        array = values_of(order, dtype)
        write(path, array, order, version, packed)
        check(path, array, order)


@pytest.mark.parametrize("version", [2, 3])
def test_levels_and_resolution(tmp_path, version):
    array = values_of("cyx", "u2")
    write(tmp_path / "a.zarr", array, "cyx", version, levels=2)
    layout = kinds.layout(ZARR, str(tmp_path / "a.zarr"))
    assert (layout.levels, layout.mpp) == (((37, 53), (19, 27)), 0.25)
    small = kinds.read(ZARR, str(tmp_path / "a.zarr"), Piece(level=1))
    assert np.array_equal(small.values, array[:, ::2, ::2])
    source = open_source(tmp_path, reading=Reading(tile=16, bands=(1, 2, 3)))
    assert len(source) == 3 * 4
    assert source.name(1).endswith("a.zarr#level=0,x=16,y=0")


def test_chunks_that_are_not_there_have_the_fill_value(tmp_path):
    write(tmp_path / "a.zarr", np.zeros((37, 53), np.uint16), "yx")
    stored = kinds.read(ZARR, str(tmp_path / "a.zarr"), Piece())
    assert not stored.values.any() and stored.valid is None and (stored.low, stored.high) == (0, 65535)


def test_a_folder_is_one_file_of_a_listing(tmp_path):
    array = values_of("zyx", "u1")
    for name in ("cat/a.ome.zarr", "dog/b.zarr"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, array, "zyx")
    labels = zarr.open_group(tmp_path / "cat/a.ome.zarr/labels/cells", mode="w", zarr_format=2)
    labels.create_array("0", shape=(4, 37, 53), dtype="u1")[...] = 1
    (tmp_path / "cat/a.ome.zarr/labels/preview.png").write_bytes(b"\x89PNG")
    source = open_source(tmp_path)
    assert len(source) == 8 and not source.problems
    assert source.labels == ["cat"] * 4 + ["dog"] * 4
    assert source.name(2).endswith("cat/a.ome.zarr#z=2")
    assert "OME-Zarr ZYX 4x37x53: 4 images of 1 channel" in source.summary
    assert np.array_equal(read_image(source, 2, channels=1)[0].numpy(), array[2])
    assert source.groups().tolist() == [0] * 4 + [1] * 4
    digests = [source.digest(index) for index in range(8)]
    assert len(set(digests)) == 8 and digests == [source.digest(index) for index in range(8)]
    assert len(open_source(tmp_path / "dog/b.zarr")) == 4


def test_series_of_bioformats2raw_and_fields_of_a_plate(tmp_path):
    arrays = [values_of("cyx", "u2") + number for number in range(3)]
    series = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=2)
    series.attrs["bioformats2raw.layout"] = 3
    plate = zarr.open_group(tmp_path / "p.zarr", mode="w", zarr_format=2)
    plate.attrs["plate"] = {"wells": [{"path": "A/1"}, {"path": "B/2"}]}
    for number, place in enumerate(("A/1", "A/1", "B/2")):
        write(tmp_path / "s.zarr" / str(number), arrays[number], "cyx")
        well = zarr.open_group(tmp_path / "p.zarr" / place, mode="a", zarr_format=2)
        well.attrs["well"] = {"images": [{"path": "0"}, {"path": "1"}] if place == "A/1" else [{"path": "0"}]}
    for number, place in enumerate(("A/1/0", "A/1/1", "B/2/0")):
        write(tmp_path / "p.zarr" / place, arrays[number], "cyx")
    write(tmp_path / "s.zarr" / "3", arrays[0][:, :8], "cyx")
    for name, what in (("s.zarr", "OME-Zarr, 1 images of other sizes left out,"), ("p.zarr", "OME-Zarr")):
        layout = kinds.layout(ZARR, str(tmp_path / name))
        assert (layout.axes, layout.shape, layout.what) == ("PCYX", (3, 3, 37, 53), what)
        for p in range(3):
            assert np.array_equal(kinds.read(ZARR, str(tmp_path / name), Piece((("P", p),))).values, arrays[p])


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_path(root: Path, path: str) -> None:
    metadata = json.loads((root / ".zattrs").read_text())
    metadata["multiscales"][0]["datasets"][0]["path"] = path
    (root / ".zattrs").write_text(json.dumps(metadata))


BAD = {
    "outside": (lambda root: with_path(root, "../other.zarr/s0"), "which is not in its folder"),
    "absolute": (lambda root: with_path(root, "/etc"), "which is not in its folder"),
    "no level": (lambda root: with_path(root, "s9"), "level s9 is missing"),
    "codec": (lambda root: change(root / "s0/.zarray", filters=[{"id": "pickle"}]), "packed by pickle"),
    "objects": (lambda root: change(root / "s0/.zarray", dtype="|O"), "OME-Zarr image"),
    "axes": (lambda root: change(root / "s0/.zarray", shape=[37], chunks=[16]), "of shape"),
    "absurd chunks": (lambda root: change(root / "s0/.zarray", chunks=[1 << 20, 1 << 20]), "above the limit"),
    "absurd size": (lambda root: change(root / "s0/.zarray", shape=[1 << 30, 1 << 30]), "give --tiles"),
    "no image": (lambda root: (root / ".zattrs").write_text("{}"), "write it as OME-Zarr with multiscales"),
    "no JSON": (lambda root: (root / ".zattrs").write_text("{"), "zattrs"),
    "a number": (lambda root: (root / ".zattrs").write_text("3"), "no table"),
    "other types": (lambda root: change(root / ".zattrs", multiscales=3), "OME-Zarr image"),
}


@pytest.mark.parametrize("name", BAD)
def test_metadata_that_are_wrong(tmp_path, name):
    write(tmp_path / "other.zarr", values_of("yx", "u2"), "yx")
    write(tmp_path / "a.zarr", values_of("yx", "u2"), "yx")
    damage, said = BAD[name]
    damage(tmp_path / "a.zarr")
    with pytest.raises(DataError, match=said) as error:
        open_source(tmp_path / "a.zarr")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["chunk", "level", "pipe"])
def test_links_out_of_the_folder_are_not_followed(tmp_path, kind):
    write(tmp_path / "other.zarr", values_of("yx", "u2"), "yx", packed="none")
    write(tmp_path / "a.zarr", values_of("yx", "u2"), "yx", packed="none")
    name = "s0" if kind == "level" else "s0/0.0"
    target = tmp_path / "a.zarr" / name
    if kind == "level":
        __import__("shutil").rmtree(target)
    else:
        target.unlink()
    if kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(tmp_path / "other.zarr" / name)
    with pytest.raises(BadImage, match="not a regular file" if kind == "pipe" else "link out of its folder"):
        kinds.read(ZARR, str(tmp_path / "a.zarr"), Piece())


def test_a_damaged_chunk_is_a_bad_image(tmp_path):
    write(tmp_path / "a.zarr", values_of("yx", "u2"), "yx")
    (tmp_path / "a.zarr/s0/0.0").write_bytes(b"text")
    with pytest.raises(BadImage, match="OME-Zarr image that cannot be read"):
        kinds.read(ZARR, str(tmp_path / "a.zarr"), Piece())


def test_a_folder_that_only_ends_in_zarr_is_a_folder(tmp_path):
    (tmp_path / "x.zarr").mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "x.zarr" / "a.png")
    assert len(open_source(tmp_path)) == 1
