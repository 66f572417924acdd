"""Stacks in TIFFs: OME-TIFF, ImageJ hyperstacks and stated axes give the values that were written, plane by plane."""

from __future__ import annotations

import io
import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode.piece import decode_piece
from upstep_fast.data.formats import kinds
from upstep_fast.data.formats.kinds import STACKS
from upstep_fast.data.reading import axes
from upstep_fast.data.reading.stored import Piece
from upstep_fast.data.sources import file_kinds, open_source
from upstep_fast.errors import BadImage, DataError

tifffile = pytest.importorskip("tifffile", reason="install upstep_fast[microscopy]")
H, W = 37, 53
SIZES = {"T": 2, "Z": 3, "C": 2, "P": 2, "Y": H, "X": W, "S": 3}
FORMS = {
    "ome": ("ZYX", "CYX", "TYX", "ZCYX", "TZCYX", "TCZYX", "ZYXS", "CYXS", "ZSYX", "TZCYXS"),
    "imagej": ("ZYX", "CYX", "TYX", "ZCYX", "TZCYX", "ZYXS"),
    "stated": ("ZYX", "TYX", "TZYX", "ZCYX", "CZYX", "ZYXS", "ZSYX"),
}
DTYPES = {"ome": ("u1", "u2", "i1", "i2", "u4", "f4", "f8"), "imagej": ("u1", "u2", "f4")}
DTYPES["stated"] = DTYPES["ome"]
COMPRESSIONS = (None, "zlib", "lzw", "zstd", "packbits")
ALL = [
    (form, order, kind, compression, tiled, byteorder)
    for form, orders in FORMS.items()
    for order, kind, compression, tiled, byteorder in itertools.product(
        orders, DTYPES[form], COMPRESSIONS, (False, True), "<>"
    )
    if form != "imagej" or ((compression, tiled) == (None, False) and (kind == "u1" or "S" not in order))
]


def values_of(order: str, kind: str) -> np.ndarray:
    shape = tuple(SIZES[axis] for axis in order)
    rng = np.random.default_rng(sum(map(ord, order)))
    return rng.normal(size=shape).astype(kind) if kind[0] == "f" else rng.integers(0, 1 << 16, shape).astype(kind)


def written(array: np.ndarray, form: str, order: str, **options) -> bytes:
    file = io.BytesIO()
    options |= {"photometric": "rgb" if "S" in order else "minisblack", "metadata": {"axes": order}}
    if "SYX" in order:
        options["planarconfig"] = "separate"
    tifffile.imwrite(file, array, **{form: True} if form != "stated" else {}, **options)
    return file.getvalue()


def expected(array: np.ndarray, order: str, piece: Piece) -> np.ndarray:
    """Return the picture at a place as bands [C, H, W], by numpy alone."""
    array = array[tuple(slice(None) if axis in "YXCS" else piece.index(axis) for axis in order)]
    left = [axis for axis in order if axis in "YXCS"]
    bands = [left.index(axis) for axis in left if axis in "CS"]
    return array.transpose([*bands, left.index("Y"), left.index("X")]).reshape(-1, H, W)


def check(file, array: np.ndarray, order: str) -> None:
    layout = kinds.layout(STACKS, file)
    pictures = axes.pieces(layout, Reading())
    assert len(pictures) == np.prod([SIZES[axis] for axis in order if axis not in "YXCS"])
    for picture in pictures:
        stored = kinds.read(STACKS, file, picture)
        assert stored.values.dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(stored.values, expected(array, order, picture)), (order, picture)
    window = Piece(pictures[-1].at, (5, 7, 20, 30))
    assert np.array_equal(kinds.read(STACKS, file, window).values, stored.values[:, 5:25, 7:37])


def sweep(cases) -> None:
    for form, order, kind, compression, tiled, byteorder in cases:
        array = values_of(order, kind)
        options = {"byteorder": byteorder} if form != "imagej" or byteorder == ">" else {}
        options |= {"compression": compression} if compression else {}
        options |= {"tile": (16, 32)} if tiled else {}
        data = written(array, form, order, **options)
        assert kinds.stack_of(data, any_pages=False) is STACKS
        check(data, array, order)


def test_values_that_were_written():
    pytest.importorskip("imagecodecs")
    sweep(ALL[::37])


@pytest.mark.long
def test_values_that_were_written_in_every_form():
    pytest.importorskip("imagecodecs")
    sweep(ALL)


def test_slices_that_tifffile_writes_as_colors_are_slices():
    """[3, H, W] and [4, H, W] become one RGB page by default; the stated axes say what they are."""
    for count in (3, 4):
        array = np.random.default_rng(0).integers(0, 256, (count, H, W), dtype=np.uint8)
        file = io.BytesIO()
        tifffile.imwrite(file, array, metadata={"axes": "ZYX"})
        data = file.getvalue()
        assert kinds.stack_of(data, any_pages=False) is STACKS
        layout = kinds.layout(STACKS, data)
        assert (layout.axes, layout.shape) == ("ZYX", (count, H, W))
        got = [kinds.read(STACKS, data, piece).values[0] for piece in axes.pieces(layout, Reading())]
        assert np.array_equal(got, array)
        brightest = kinds.read(STACKS, data, axes.pieces(layout, Reading(slices="max"))[0])
        assert np.array_equal(brightest.values[0], array.max(0))


@pytest.mark.parametrize("order", ["ZYX", "TZCYX"])
def test_imagej_stack_with_one_header(tmp_path, order):
    """What ImageJ writes above 4 GB: the header of the first page, and all planes behind it."""
    array = values_of(order, "u2")
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, array, imagej=True, metadata={"axes": order}, truncate=True)
    with tifffile.TiffFile(path) as file:
        assert len(file.pages) == 1
    check(str(path), array, order)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadImage, match="truncated: an ImageJ stack"):
        kinds.layout(STACKS, str(path))


def test_ome_pyramid_of_slices():
    array = np.random.default_rng(0).integers(0, 1 << 16, (3, 128, 160), dtype=np.uint16)
    file = io.BytesIO()
    with tifffile.TiffWriter(file, ome=True) as out:
        size = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "axes": "ZYX"}
        out.write(array, subifds=1, tile=(32, 32), photometric="minisblack", metadata=size)
        out.write(array[:, ::2, ::2].copy(), subfiletype=1, tile=(32, 32), photometric="minisblack")
    layout = kinds.layout(STACKS, file.getvalue())
    assert (layout.levels, layout.mpp) == (((128, 160), (64, 80)), 0.25)
    for z in range(3):
        small = kinds.read(STACKS, file.getvalue(), Piece((("Z", z),), level=1))
        assert np.array_equal(small.values[0], array[z, ::2, ::2])


def test_several_series_are_positions_and_others_are_said():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((2, H, W), (2, H, W), (2, 8, 9))]
    file = io.BytesIO()
    with tifffile.TiffWriter(file, ome=True) as out:
        for array in arrays:
            out.write(array, photometric="minisblack", metadata={"axes": "ZYX"})
    layout = kinds.layout(STACKS, file.getvalue())
    assert axes.described(layout) == f"OME-TIFF, 1 series of other sizes left out, PZYX 2x2x{H}x{W}"
    for p, z in itertools.product(range(2), range(2)):
        stored = kinds.read(STACKS, file.getvalue(), Piece((("P", p), ("Z", z))))
        assert np.array_equal(stored.values[0], arrays[p][z])


def test_white_as_zero_and_orientation():
    array = np.random.default_rng(0).integers(0, 4096, (2, H, W), dtype=np.uint16)
    file = io.BytesIO()
    extra = [(274, "H", 1, 6, False)]
    tifffile.imwrite(file, array, photometric="miniswhite", metadata={"axes": "ZYX"}, extratags=extra)
    stored = kinds.read(STACKS, file.getvalue(), Piece((("Z", 1),)))
    assert stored.inverted and (stored.low, stored.high) == (0, 65535)
    assert np.array_equal(stored.values[0], np.rot90(array[1], -1))


def test_nodata_and_tiles_that_are_not_stored():
    array = np.random.default_rng(0).integers(1, 256, (2, 2, 32, 32), dtype=np.uint8)
    array[1, 0, 3, 4] = array[1, 1, 5, 6] = 0
    file = io.BytesIO()
    options = {"photometric": "minisblack", "metadata": {"axes": "ZCYX"}, "ome": True}
    tifffile.imwrite(file, array, extratags=[(42113, "s", 1, "0", False)], **options)
    stored = kinds.read(STACKS, file.getvalue(), Piece((("Z", 1),)))
    assert np.array_equal(stored.valid, (array[1] > 0).all(0))
    tiles = [zlib.compress(plane.tobytes()) for plane in array.reshape(4, 32, 32)]
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        iter([*tiles[:3], b""]),
        shape=array.shape,
        dtype="u1",
        tile=(32, 32),
        compression="zlib",
        **options,
    )
    layout = kinds.layout(STACKS, file.getvalue())
    assert layout.shape == (2, 2, 32, 32)
    stored = kinds.read(STACKS, file.getvalue(), Piece((("Z", 1),)))
    assert np.array_equal(stored.values[0], array[1, 0]) and not stored.valid.any()


def test_a_folder_of_stacks(tmp_path):
    array = values_of("ZCYX", "u1")
    (tmp_path / "a.ome.tif").write_bytes(written(array, "ome", "ZCYX"))
    (tmp_path / "b.tif").write_bytes(written(array[:, 0], "imagej", "ZYX"))
    tifffile.imwrite(tmp_path / "photo.tif", array[0, 0])
    source = open_source(tmp_path)
    names = [Path(source.name(index)).name for index in range(len(source))]
    assert names == [f"{name}#z={z}" for name in ("a.ome.tif", "b.tif") for z in range(3)] + ["photo.tif"]
    assert f"OME-TIFF ZCYX 3x2x{H}x{W}: 3 images of 2 channels" in source.summary
    reading = Reading(slices="max", bands=(2,))
    item = open_source(tmp_path / "a.ome.tif", reading=reading).item(0)
    pixels = decode_piece(item.kind, item.file, item.piece, channels=1, min_side=None, reading=reading)
    assert np.array_equal(pixels[0].numpy(), array[:, 1].max(0))
    with pytest.raises(BadImage, match="--bands"):
        decode_piece(item.kind, item.file, item.piece, channels=3, min_side=None, reading=Reading())


def test_pages_without_a_name_are_bands_unless_axes_say_otherwise(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, H, W), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", array, photometric="minisblack")
    assert len(open_source(tmp_path)) == 1
    source = open_source(tmp_path, reading=Reading(axes="ZYX"))
    assert len(source) == 5
    item = source.item(3)
    assert np.array_equal(kinds.read(item.kind, item.file, item.piece).values[0], array[3])


def test_of_many_tiffs_a_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(file_kinds, "MAX_HEADERS", 8)
    monkeypatch.setattr(file_kinds, "SAMPLE", 4)
    array = values_of("ZYX", "u1")
    for number in range(16):
        tifffile.imwrite(tmp_path / f"{number:02d}.tif", array[0])
    (tmp_path / "05.tif").write_bytes(written(array, "ome", "ZYX"))  # between those of the sample
    (tmp_path / "06.ome.tif").write_bytes(written(array, "ome", "ZYX"))
    assert len(open_source(tmp_path)) == 16 + 3
    assert len(open_source(tmp_path, reading=Reading(slices="all"))) == 15 + 2 * 3
    (tmp_path / "00.tif").write_bytes(written(array, "imagej", "ZYX"))
    assert len(open_source(tmp_path)) == 14 + 3 * 3


SET = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:a"><Image ID="Image:0">
<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="53" SizeY="37" SizeZ="2" SizeC="1" SizeT="1">
<TiffData IFD="0" FirstZ="0" PlaneCount="{count}"><UUID FileName="a.ome.tif">urn:uuid:a</UUID></TiffData>
<TiffData IFD="0" FirstZ="1" PlaneCount="1"><UUID FileName="{other}">urn:uuid:b</UUID></TiffData>
</Pixels></Image></OME>"""


@pytest.mark.parametrize("other", ["b.ome.tif", "../b.ome.tif", "missing.ome.tif"])
def test_one_file_of_a_set_is_refused_and_no_other_is_opened(tmp_path, other, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    plane = np.zeros((H, W), np.uint8)
    for path in (folder / "b.ome.tif", tmp_path / "b.ome.tif"):
        tifffile.imwrite(path, plane, metadata=None, description=SET.format(other=other, count=1))
    path = folder / "a.ome.tif"
    tifffile.imwrite(path, plane, metadata=None, description=SET.format(other=other, count=1))
    opened = []
    original = tifffile.FileHandle.open
    monkeypatch.setattr(tifffile.FileHandle, "open", lambda self: (opened.append(self._file), original(self)))
    with pytest.raises(DataError, match=r"one file of an OME-TIFF in several files.*join them"):
        open_source(path)
    assert {Path(str(file)).name for file in opened} == {"a.ome.tif"}


BINARY_ONLY = '<OME xmlns="x"><BinaryOnly MetadataFile="../set.companion.ome" UUID="urn:uuid:a"/></OME>'
MANY = SET.replace('SizeZ="2"', 'SizeZ="999999999"')
BAD = {
    "companion": (BINARY_ONLY, "one file of an OME-TIFF in several files"),
    "absurd count": (SET.format(other="a.ome.tif", count=999_999_999), "states more than 1,000,000 planes"),
    "absurd size": (MANY.format(other="a.ome.tif", count=1), "states more than 1,000,000 planes"),
    "no planes": ("ImageJ=1.53t\nimages=7\nslices=7\n", "fewer planes than its description states"),
}


@pytest.mark.parametrize("name", BAD)
def test_descriptions_that_are_wrong(name):
    description, said = BAD[name]
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((H, W), np.uint8), metadata=None, description=description)
    assert kinds.stack_of(file.getvalue(), any_pages=False) is STACKS
    with pytest.raises(BadImage, match=said):
        kinds.layout(STACKS, file.getvalue())


def test_missing_planes_are_not_zeros():
    """tifffile fills them with zeros and warns."""
    array = values_of("ZYX", "u1")
    data = written(array, "ome", "ZYX", compression="zlib")
    broken = data.replace(b'SizeZ="3"', b'SizeZ="5"').replace(b'PlaneCount="3"', b'PlaneCount="5"')
    assert broken != data
    with pytest.raises(BadImage, match="truncated TIFF: 3 of 5 planes"):
        kinds.layout(STACKS, broken)
    with pytest.raises(BadImage):
        kinds.layout(STACKS, data[: len(data) // 2])


def test_the_lack_of_the_extra_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.ome.tif").write_bytes(written(values_of("ZYX", "u1"), "ome", "ZYX"))
    tifffile.imwrite(tmp_path / "photo.tif", np.zeros((H, W), np.uint8))
    monkeypatch.setattr(kinds, "missing", lambda kind: "pip install 'upstep_fast[microscopy]'")
    assert "left out: 1 .tif" in open_source(tmp_path).summary


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.long)])
def test_damaged_files_are_read_or_refused(count):
    rng = np.random.default_rng(0)
    array = values_of("TZCYX", "u1")
    files = [written(array, "ome", "TZCYX", compression="zlib"), written(array, "imagej", "TZCYX")]
    for number in range(count):
        data = bytearray(files[number % 2])
        for at in rng.integers((64, 1600, len(data))[number % 3], size=3):
            data[at] = rng.integers(256)
        try:
            layout = kinds.layout(STACKS, bytes(data))
            if layout.size("Y") * layout.size("X") < 1e7:
                kinds.read(STACKS, bytes(data), axes.pieces(layout, Reading())[0])
        except BadImage as error:
            assert "\n" not in str(error)
