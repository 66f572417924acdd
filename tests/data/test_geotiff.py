"""GeoTIFFs written by GDAL: values, nodata, scales and overviews, against what was written and a second reader."""

import io
import itertools
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from upstep_fast.config.reading import Intensity, Reading
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.decode.image import decode, read_stored
from upstep_fast.data.formats import geotiff, kinds
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading.stored import Piece
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import BadImage

rasterio = pytest.importorskip("rasterio", reason="needs the extra [geo]")
tifffile = pytest.importorskip("tifffile", reason="the second reader")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
LOSSLESS = ("none", "lzw", "deflate", "packbits", "lzma", "zstd", "lerc")

LAYOUTS = ({}, {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"BIGTIFF": "YES", "ENDIANNESS": "BIG"})
PLACED = {"transform": rasterio.Affine(1, 0, 0, 0, -1, 9), "crs": "EPSG:32633"}


def write(bands, path=None, *, mask=None, overviews=(), scales=None, offsets=None, colors=None, **profile):
    """Return a GeoTIFF of bands [C, H, W]; at `path` if given."""
    profile = {"driver": "GTiff", "count": len(bands), "dtype": bands.dtype, "compress": "zstd", **profile}
    profile |= {"height": bands.shape[1], "width": bands.shape[2]}
    with rasterio.io.MemoryFile() as memory, rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with memory.open(**profile) as file:
            file.write(bands)
            if colors:
                file.write_colormap(1, colors)
            if scales:
                file.scales, file.offsets = scales, offsets
            if mask is not None:
                file.write_mask(mask)
            if overviews:
                file.build_overviews(overviews)
        data = memory.read()
    if path is not None:
        path.write_bytes(data)
    return data


def values_of(dtype, bands=4, shape=(37, 45), seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(scale=1e4, size=(bands, *shape)).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, (bands, *shape), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("compression", LOSSLESS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_type_and_compression(dtype, compression):
    if compression == "lerc" and "64" in dtype and dtype != "float64":
        return  # GDAL does not write it
    values = values_of(dtype)
    for interleave in ("pixel", "band"):
        # of big-endian floats in LERC, GDAL 3.10.3 writes other values wherever the bytes, swapped, are a NaN
        for layout in LAYOUTS[: 2 if compression == "lerc" else 3]:
            data = write(values, compress=compression, interleave=interleave, **layout)
            stored = geotiff.read(data, Piece())
            assert np.array_equal(stored.values, values) and stored.values.dtype == values.dtype
            assert stored.valid is None and not stored.inverted
    if np.dtype(dtype).kind == "f":
        assert (stored.low, stored.high) == (None, None)
    else:
        assert (stored.low, stored.high) == (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if compression in ("none", "deflate", "zstd"):
        with tifffile.TiffFile(io.BytesIO(data)) as file:  # planes of the last one
            assert np.array_equal(file.asarray(), stored.values)


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 9, 10, 12, 15])
def test_declared_bits_are_the_range(bits):
    values = (values_of("uint16") >> (16 - bits)).astype("uint8" if bits <= 8 else "uint16")
    stored = geotiff.read(write(values, nbits=bits), Piece())
    assert np.array_equal(stored.values, values) and (stored.low, stored.high) == (0, (1 << bits) - 1)


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [
        *(("uint8", 0), ("uint8", 255), ("uint16", 65535), ("int16", -32768), ("float64", 1e30)),
        *(("float32", nodata) for nodata in (-9999.0, np.nan, float(np.finfo(np.float32).min))),
    ],
)
def test_nodata_is_not_valid(dtype, nodata):
    values = np.clip(values_of(dtype), 1, 200)
    values[:, :5], values[:, 20, 30] = nodata, nodata
    expected = np.ones(values.shape[1:], bool)
    expected[:5], expected[20, 30] = False, False
    stored = geotiff.read(write(values, nodata=nodata), Piece())
    assert np.array_equal(stored.valid, expected) and stored.values.dtype == values.dtype
    assert np.array_equal(stored.values[:, expected], values[:, expected])


def test_nodata_in_some_bands_alone_is_nan_there():
    values = np.clip(values_of("uint16"), 1, None)
    values[1, :5], values[:, 30] = 0, 0
    stored = geotiff.read(write(values, nodata=0), Piece())
    assert not stored.valid[30].any() and stored.valid.sum() == stored.valid.size - 45
    assert np.isnan(stored.values[1, :5]).all() and np.array_equal(stored.values[0, :30], values[0, :30])
    assert (stored.low, stored.high) == (0, 65535)


def test_internal_mask_and_sparse_tiles():
    values = values_of("uint16", shape=(64, 64))
    mask = np.ones((64, 64), bool)
    mask[3:40, 5:9] = False
    stored = geotiff.read(write(values, mask=mask), Piece())
    assert np.array_equal(stored.valid, mask) and np.array_equal(stored.values, values)
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint16", "width": 64, "height": 64, "nodata": 9}
    with rasterio.io.MemoryFile() as memory:
        with memory.open(**profile, sparse_ok=True, tiled=True, blockxsize=16, blockysize=16) as file:
            file.write(values[:1, :16, :16], window=((16, 32), (32, 48)))
        stored = geotiff.read(memory.read(), Piece())
    expected = np.full((64, 64), 9, np.uint16)
    expected[16:32, 32:48] = values[0, :16, :16]
    assert np.array_equal(stored.values[0], expected) and np.array_equal(stored.valid, expected != 9)


def test_scales_and_offsets_are_applied_band_by_band():
    values = values_of("uint16")
    scales, offsets = (1e-4, 2.0, 1.0, -1.0), (0.0, 5.0, -3.0, 0.0)
    stored = geotiff.read(write(values, scales=scales, offsets=offsets), Piece())
    expected = values * np.array(scales)[:, None, None] + np.array(offsets)[:, None, None]
    assert np.allclose(stored.values, expected, rtol=1e-6)
    assert (stored.low, stored.high) == (-65535.0, 2 * 65535 + 5.0)
    masked = np.clip(values, 1, None)
    masked[:, 0] = 0
    stored = geotiff.read(write(masked, scales=scales, offsets=offsets, nodata=0), Piece())
    assert not stored.valid[0].any() and stored.valid[1:].all()


def test_bands_tagged_as_alpha_are_bands():
    values = values_of("uint8")
    data = write(values, photometric="rgb", alpha="yes")
    with rasterio.io.MemoryFile(data) as memory, memory.open() as file:
        assert file.colorinterp[3].name == "alpha"
    stored = geotiff.read(data, Piece())
    assert np.array_equal(stored.values, values) and stored.valid is None and stored.is_8_bit


def test_white_as_zero_and_palettes():
    values = values_of("uint8", bands=1)
    white = geotiff.read(write(values, photometric="miniswhite"), Piece())
    assert white.inverted and np.array_equal(white.values, values)
    colors = {i: (i, 255 - i, i // 2, 255) for i in range(256)}
    palette = geotiff.read(write(values, colors=colors), Piece())
    i = values[0].astype(int)
    assert np.array_equal(palette.values, [i, 255 - i, i // 2]) and palette.is_8_bit


def test_overviews_are_levels_and_full_size_is_full_size(tmp_path):
    values = values_of("uint16", shape=(200, 300))
    data = write(values, tmp_path / "a.tif", overviews=[2, 4], tiled=True, blockxsize=64, blockysize=64)
    for file in (data, str(tmp_path / "a.tif")):
        layout = geotiff.layout(file)
        assert layout.levels == ((200, 300), (100, 150), (50, 75)) and layout.shape == (4, 200, 300)
        assert np.array_equal(geotiff.read(file, Piece()).values, values)
        window = Piece(window=(120, 30, 50, 70))
        assert np.array_equal(geotiff.read(file, window).values, values[:, 120:170, 30:100])
        level = geotiff.read(file, Piece(level=2)).values
        assert level.shape == (4, 50, 75) and np.isin(level, values).all()  # GDAL's default: nearest
        with pytest.raises(BadImage, match="level 3 of a file with 3"):
            geotiff.read(file, Piece(level=3))


def test_files_beside_it_change_nothing(tmp_path):
    values = values_of("uint16", bands=1, shape=(64, 64))
    path = tmp_path / "a.tif"
    write(values, path)
    plain = geotiff.read(str(path), Piece())
    metadata = (
        "<PAMDataset><PAMRasterBand band='1'><NoDataValue>{}</NoDataValue><Scale>7</Scale></PAMRasterBand></PAMDataset>"
    )
    (tmp_path / "a.tif.aux.xml").write_text(metadata.format(values[0, 0, 0]))
    write(np.zeros((1, 64, 64), np.uint8), tmp_path / "a.tif.msk")
    write(values[:, :32, :32], tmp_path / "a.tif.ovr")
    again = geotiff.read(str(path), Piece())
    assert np.array_equal(plain.values, again.values) and again.valid is None and not geotiff.layout(str(path)).levels


@pytest.mark.parametrize("name", [b"a#b?c=1,d.tif", b"a!b%20:c.tif", b"\xff\xfe.tif", b"s3:"])
def test_names_mean_nothing_to_gdal(name, tmp_path):
    values = values_of("uint16", bands=1)
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(write(values))
    assert np.array_equal(geotiff.read(os.fsdecode(path), Piece()).values, values)


def test_other_formats_of_gdal_are_not_opened(tmp_path):
    write(values_of("uint8", bands=1), tmp_path / "a.tif")
    vrt = f"<VRTDataset rasterXSize='9' rasterYSize='9'><VRTRasterBand dataType='Byte' band='1'><SimpleSource>\
<SourceFilename>{tmp_path}/a.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    (tmp_path / "b.tif").write_text(vrt)
    for file in (str(tmp_path / "b.tif"), vrt.encode()):
        with pytest.raises(BadImage, match="GDAL"):
            geotiff.read(file, Piece())


ZSTD = write(values_of("uint16", shape=(256, 256)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "GDAL"),
        (b"II*\0", "GDAL"),
        (b"<html>" * 50, "GDAL"),
        (ZSTD[: len(ZSTD) // 2], "GDAL"),
        (ZSTD[:300], "GDAL"),
        (write(values_of("uint8"), photometric="cmyk"), "CMYK"),
        (write(values_of("float32").astype("complex64")), "complex"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(data, reason):
    with pytest.raises(BadImage, match=reason) as error:
        geotiff.read(data, Piece())
    assert "\n" not in error.value.reason and len(error.value.reason) < 250 and "vsimem" not in error.value.reason


def test_threads_read_their_own_files():
    pictures = [values_of("uint16", seed=seed, shape=(128, 128)) for seed in range(16)]
    files = [write(picture, nodata=seed) for seed, picture in enumerate(pictures)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda file: geotiff.read(file, Piece()), files * 4))
    for stored, picture in zip(results, pictures * 4, strict=True):
        assert np.array_equal(np.nan_to_num(stored.values, nan=0), np.where(np.isnan(stored.values), 0, picture))


def test_nan_in_lerc_stays_nan():
    values = values_of("float32")
    values[:, 4:9, 7:30] = np.nan
    stored = geotiff.read(write(values, compress="lerc"), Piece())
    assert np.array_equal(stored.values, values, equal_nan=True)


def test_orientation_that_gdal_does_not_apply_is_refused(tmp_path):
    data = write(values_of("uint16"))
    at = data.index(struct.pack("<HHI", 262, 3, 1))  # an entry of the directory: PhotometricInterpretation
    turned = data[:at] + struct.pack("<HHIHH", 274, 3, 1, 6, 0) + data[at + 12 :]
    (tmp_path / "a.tif").write_bytes(turned)
    for file in (turned, str(tmp_path / "a.tif")):
        with pytest.raises(BadImage, match="orientation 6"):
            geotiff.read(file, Piece())


def to_8_bits(values, low, high):
    x = (values.astype(np.float64) - low) / (high - low)
    return np.rint(255 * np.clip(x, 0, 1))


def reading_of(low, high, bands=()):
    return Reading(Intensity("range", ranges=((low, high),)), bands=bands)


@pytest.mark.parametrize("compression", ["none", "deflate", "zstd", "lerc"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32"])
def test_decode_gives_chosen_bands_and_fills_nodata_by_the_median(dtype, compression):
    values = np.clip(values_of(dtype, bands=4), 1, 200)
    values[:, 3:20, 5:9] = 0
    low, high = 10, 150
    for interleave in ("pixel", "band"):
        data = write(values, nodata=0, compress=compression, interleave=interleave)
        x = decode(data, reading=reading_of(low, high, (4, 3, 2)))
        for band, y in zip((3, 2, 1), x.numpy(), strict=True):
            expected = to_8_bits(values[band], low, high)
            valid = expected[values[0] != 0]
            expected[values[0] == 0] = np.sort(valid)[(len(valid) - 1) // 2]
            assert np.array_equal(y, expected)


def test_nodata_of_8_bits_is_filled_and_full_range_keeps_the_rest():
    values = np.clip(values_of("uint8", bands=3), 1, 255)
    values[:, :, :7] = 0
    for bands in (values, values[:1]):
        x = decode(write(bands, nodata=0, compress="deflate")).numpy()
        assert np.array_equal(x[:, :, 7:], np.broadcast_to(bands[:, :, 7:], x[:, :, 7:].shape))
        assert (x[:, 0, 0] == [np.sort(band[:, 7:].reshape(-1))[(37 * 38 - 1) // 2] for band in x]).all()
    with pytest.raises(BadImage, match="no valid value"):
        decode(write(np.zeros((3, 20, 20), np.uint8), nodata=0, compress="deflate"))


def test_four_bands_of_a_satellite_are_never_composited():
    values = values_of("uint8")
    data = write(values, photometric="rgb", alpha="yes", compress="deflate")
    assert np.array_equal(decode(data).numpy(), values[:3])
    assert np.array_equal(decode(data, reading=Reading(bands=(4, 3, 2))).numpy(), values[[3, 2, 1]])
    assert np.array_equal(decode(data, channels=4).numpy(), values)


def test_gdal_reads_only_what_others_do_not():
    for dtype, compression, nodata in itertools.product(("uint8", "uint16"), ("none", "lzw", "deflate"), (None, 0)):
        assert kinds.kind_of_content(write(values_of(dtype), compress=compression, nodata=nodata, **PLACED)) is None
    for data in (
        *(write(values_of("uint16"), compress=compression, **PLACED) for compression in ("zstd", "lzma", "lerc")),
        *(write(values_of(dtype), compress="deflate", **PLACED) for dtype in ("int16", "uint32", "float32", "float64")),
        write(values_of("uint8"), mask=np.eye(37, 45) > 0, compress="deflate", overviews=[2], **PLACED),
        write(values_of("uint16"), scales=(2,) * 4, offsets=(1,) * 4, compress="none"),
        write(values_of("uint16") >> 5, nbits=11, compress="none", **PLACED),
    ):
        assert kinds.kind_of_content(data) is kinds.GEOTIFF
    assert kinds.kind_of_content(write(values_of("float32"), compress="zstd")) is None  # no tag of GDAL's
    assert kinds.kind_of_content(write(values_of("float32"), compress="lerc")) is kinds.GEOTIFF


def test_infrared_behind_colors_is_left_out_unless_asked_for():
    values = values_of("uint8")
    for compression in ("deflate", "zstd"):
        data = write(values, photometric="rgb", nodata=None, compress=compression, **PLACED)
        assert np.array_equal(decode(data).numpy(), values[:3])
        assert np.array_equal(decode(data, reading=Reading(bands=(4, 2, 1))).numpy(), values[[3, 1, 0]])


def test_tiles_and_levels_of_files_that_gdal_reads(tmp_path):
    values = np.clip(values_of("int16", shape=(128, 192)), 1, None)
    values[:, :64, :64] = 0
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "overviews": [2], "nodata": 0}
    write(values, tmp_path / "a.tif", **options, **PLACED)
    reading = Reading(Intensity("range", ranges=((0, 32767),)), bands=(3, 1, 2), tile=64)
    source = open_source(tmp_path, reading=reading)
    names = [source.name(i).partition("#")[2] for i in range(len(source))]
    assert names == [f"level=0,x={x},y={y}" for y in (0, 64) for x in (0, 64, 128) if (x, y) != (0, 0)]
    tile = read_image(source, names.index("level=0,x=128,y=64")).numpy()
    assert np.array_equal(tile, to_8_bits(values[[2, 0, 1], 64:, 128:], 0, 32767))


@pytest.mark.parametrize("compression", ["deflate", "zstd", "lerc"])
@pytest.mark.parametrize(
    ("dtype", "bands"), [("uint16", (4, 3, 2)), ("int16", (4, 3, 2)), ("float32", (4, 3, 2)), ("uint16", ())]
)
def test_measured_intensity_leaves_nodata_out(tmp_path, dtype, bands, compression):
    nodata = -9999 if dtype != "uint16" else 0
    pictures = [np.random.default_rng(i).integers(1000, 2001, (4, 64, 64)).astype(dtype) for i in range(4)]
    for i, picture in enumerate(pictures):
        picture[:, : 10 * i] = nodata
        write(picture, tmp_path / f"{i}.tif", nodata=nodata, compress=compression, photometric="rgb", **PLACED)
    source = measure_intensity(open_source(tmp_path, reading=Reading(bands=bands)), channels=3)
    ((low, high),) = source.reading.intensity.ranges
    shown = [band - 1 for band in bands or (1, 2, 3)]
    valid = np.concatenate([picture[shown, 10 * i :].reshape(-1) for i, picture in enumerate(pictures)])
    assert np.allclose((low, high), np.percentile(valid, (0.5, 99.5)), atol=2)
    assert abs(read_image(source, 0).float().mean() - 127.5) < 3


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("compression", ["none", "lzw", "deflate", "packbits"])
def test_plain_files_have_the_values_that_gdal_gives(compression, interleave):
    cases = itertools.product(("uint8", "uint16"), (1, 2, 3, 4, 7), (None, 3), (None, "minisblack"), (False, True))
    for dtype, bands, nodata, photometric, tiled in cases:
        values = values_of(dtype, bands, (32, 48))
        values[:, :5] = 3
        values[0, 9] = 3  # in one band alone
        options = {"tiled": tiled, **({"blockxsize": 16, "blockysize": 16} if tiled else {})}
        options |= {} if photometric is None else {"photometric": photometric}
        data = write(values, nodata=nodata, compress=compression, interleave=interleave, **options, **PLACED)
        by_gdal = geotiff.read(data, Piece())
        by_us = read_stored(data, channels=bands, reading=Reading(bands=tuple(range(1, bands + 1))))
        assert kinds.kind_of_content(data) is None
        assert np.array_equal(by_us.values, by_gdal.values, equal_nan=by_gdal.values.dtype.kind == "f")
        assert (by_us.low, by_us.high, by_us.inverted) == (by_gdal.low, by_gdal.high, by_gdal.inverted)
        assert (by_us.valid is None) == (by_gdal.valid is None)
        assert by_us.valid is None or np.array_equal(by_us.valid, by_gdal.valid)


def test_no_warning_where_another_thread_resets_the_filters():
    data = write(np.zeros((1, 8, 8), np.int16))
    geotiff.layout(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        geotiff.layout(data)
    assert not caught
