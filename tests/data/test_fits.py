"""FITS images against the arrays that were written and, uncompressed, against the file's bytes."""

import errno
import gzip
import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from upstep_fast.data.formats import fits
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading.stored import Piece
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import BadImage

writer = pytest.importorskip("astropy.io.fits", reason="needs the extra [astro]")
DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
LOSSLESS = (None, "GZIP_1", "GZIP_2", "NOCOMPRESS")  # RICE and HCOMPRESS are of integers up to 32 bits
KINDS = [(dtype, compression) for dtype in DTYPES for compression in LOSSLESS]
KINDS += [(dtype, compression) for dtype in DTYPES[:6] for compression in ("RICE_1", "HCOMPRESS_1")]


def write(*hdus):
    file = io.BytesIO()
    writer.HDUList(list(hdus)).writeto(file)
    return file.getvalue()


def values_of(dtype, shape=(9, 12), seed=0):
    """Return values of a type over its whole range, whole numbers below 2^24 for floats."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.integers(-(1 << 20), 1 << 20, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def header(**cards):
    text = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items())
    return (text + "END".ljust(80)).ljust(2880).encode()


def by_hand(data):
    """Return the first HDU's physical values from the file's bytes, lowest row first, in Python integers or floats."""
    cards = {}
    for at in range(0, len(data), 80):
        card = data[at : at + 80].decode()
        if card.startswith("END "):
            break
        if card[8:10] == "= ":
            cards[card[:8].strip()] = card[10:].split("/")[0].strip()
    start = -(-(at + 80) // 2880) * 2880
    width, height, bits = (int(cards[name]) for name in ("NAXIS1", "NAXIS2", "BITPIX"))
    code = {8: "B", 16: "h", 32: "i", 64: "q", -32: "f", -64: "d"}[bits]
    stored = struct.unpack_from(f">{width * height}{code}", data, start)
    scale, zero = float(cards.get("BSCALE", 1)), cards.get("BZERO", "0")
    zero = int(zero) if zero.lstrip("-").isdecimal() else float(zero)
    physical = [value + zero for value in stored] if scale == 1 else [value * scale + zero for value in stored]
    return np.array(physical, dtype=object).reshape(height, width)


@pytest.mark.parametrize(("dtype", "compression"), KINDS)
def test_values_of_every_type_and_compression(dtype, compression):
    a = values_of(dtype)
    if compression == "HCOMPRESS_1" and "32" in dtype:
        a //= 1 << 16  # its transform overflows
    hdus = (
        (writer.PrimaryHDU(a),)
        if compression is None
        else (writer.PrimaryHDU(), writer.CompImageHDU(a, compression_type=compression, quantize_level=0))
    )
    data = write(*hdus)
    for file in (data, gzip.compress(data), memoryview(data)):
        stored = fits.read(file, Piece())
        assert stored.values.dtype == np.dtype(dtype) and stored.values.dtype.isnative
        assert np.array_equal(stored.values, a[None, ::-1])  # the first stored row is the lowest
    if compression is None:
        assert np.array_equal(stored.values[0, ::-1].astype(object), by_hand(data))
    if np.dtype(dtype).kind == "f":
        assert (stored.low, stored.high) == (None, None)
    else:
        assert (stored.low, stored.high) == (np.iinfo(dtype).min, np.iinfo(dtype).max)
    assert fits.layout(data).axes == "YX" and fits.layout(data).shape == a.shape


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32"])
def test_blank_is_not_valid_for_signed_and_unsigned(dtype, compressed):
    a = np.arange(20, dtype=dtype).reshape(4, 5)
    hdu = writer.CompImageHDU(a, compression_type="GZIP_1") if compressed else writer.ImageHDU(a)
    half = {"uint16": 1 << 15, "uint32": 1 << 31}.get(dtype, 0)
    hdu.header["BLANK"] = 7 - half  # a stored value
    stored = fits.read(write(writer.PrimaryHDU(), hdu), Piece())
    assert np.array_equal(stored.valid, (a != 7)[::-1]) and np.array_equal(stored.values[0], a[::-1])


def test_scale_and_zero_give_physical_values_and_their_range():
    a = values_of("int16", (4, 5))
    for scale, zero in ((0.5, 100.0), (-2.0, 3.0), (1.0, 10.0)):
        sizes = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 5, "NAXIS2": 4}
        data = header(**sizes, BSCALE=scale, BZERO=zero) + a.astype(">i2").tobytes().ljust(2880, b"\0")
        stored = fits.read(data, Piece())
        assert np.array_equal(stored.values[0, ::-1].astype(object), by_hand(data))
        assert np.array_equal(stored.values[0, ::-1], (a * np.float64(scale) + zero).astype(np.float32))
        assert (stored.low, stored.high) == tuple(sorted((-32768 * scale + zero, 32767 * scale + zero)))


def test_nan_and_zero_of_quantized_floats_are_exact():
    a = np.random.default_rng(1).normal(size=(40, 40)).astype(np.float32)
    a[3, 4], a[5, 6:9] = np.nan, 0
    hdu = writer.CompImageHDU(a, compression_type="RICE_1", quantize_method=2)
    stored = fits.read(write(writer.PrimaryHDU(), hdu), Piece())
    assert np.array_equal(np.isnan(stored.values[0]), np.isnan(a)[::-1]) and not stored.values[0, ::-1][5, 6:9].any()


def test_first_image_not_a_table():
    table = writer.BinTableHDU.from_columns([writer.Column("x", "E", array=np.zeros(3))])
    a = values_of("uint16")
    for hdus in (
        [writer.PrimaryHDU(), table, writer.ImageHDU(a), writer.ImageHDU(a[:2])],
        [writer.PrimaryHDU(a), table],
    ):
        assert np.array_equal(fits.read(write(*hdus), Piece()).values[0], a[::-1])
    with pytest.raises(BadImage, match="without an image"):
        fits.read(write(writer.PrimaryHDU(), table), Piece())


@pytest.mark.parametrize(
    ("shape", "cards", "axes"),
    [
        ((3, 4, 5), {}, "ZYX"),
        ((3, 4, 5), {"CTYPE3": "RGB"}, "CYX"),
        ((3, 4, 5), {"CTYPE3": "TIME"}, "TYX"),
        ((2, 3, 4, 5), {"CTYPE3": "FREQ", "CTYPE4": "STOKES"}, "FZYX"),
        ((2, 1, 4, 5), {"CTYPE3": "FREQ"}, "ZYX"),
        ((1, 1, 4, 5), {}, "YX"),
        ((1, 5), {}, "YX"),
    ],
)
def test_axes_of_cubes(shape, cards, axes):
    a = values_of("int16", shape)
    hdu = writer.PrimaryHDU(a)
    hdu.header.update(cards)
    data = write(hdu)
    layout = fits.layout(data)
    named = a.reshape(layout.shape)
    assert layout.axes == axes
    last = tuple((axis, size - 1) for axis, size in zip(layout.axes, layout.shape, strict=True) if axis not in "CYX")
    picture = named[tuple(index for _, index in last)]
    assert np.array_equal(fits.read(data, Piece(last)).values, picture.reshape(-1, *shape[-2:])[:, ::-1])


def test_windows_are_those_of_the_displayed_picture(tmp_path):
    a = values_of("int32", (3, 20, 30))
    hdu = writer.PrimaryHDU(a)
    (tmp_path / "a.fits").write_bytes(write(hdu))
    piece = Piece((("Z", 1),), window=(2, 5, 7, 11))
    assert np.array_equal(fits.read(str(tmp_path / "a.fits"), piece).values[0], a[1, ::-1][2:9, 5:16])
    hdu.header["ROWORDER"] = "TOP-DOWN"
    assert np.array_equal(fits.read(write(hdu), piece).values[0], a[1, 2:9, 5:16])
    for wrong in (Piece(level=1), Piece((("Z", 3),)), Piece(window=(15, 0, 6, 5)), Piece(window=(0, 0, 0, 5))):
        with pytest.raises(BadImage):
            fits.read(write(hdu), wrong)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"SIMPLE  = ", "truncated"),
        (b"<html>" * 1000, "does not start with SIMPLE|no END"),
        (b"SIMPLE  =                    T".ljust(80) * 20000, "no END"),
        (gzip.compress(bytes(50 << 20)), "no END"),
        (gzip.compress(header(SIMPLE="T", BITPIX=8, NAXIS=2, NAXIS1=64, NAXIS2=64))[:-9], "decoded|END"),
        (header(SIMPLE="T", BITPIX=16, NAXIS=2, NAXIS1=10**6, NAXIS2=10**6), "truncated"),
        (gzip.compress(header(SIMPLE="T", BITPIX=16, NAXIS=2, NAXIS1=10**6, NAXIS2=10**6)), "above the limit"),
        (header(SIMPLE="T", BITPIX=16, NAXIS=2, NAXIS1=-4, NAXIS2=4), "NAXIS1 -4"),
        (header(SIMPLE="T", BITPIX=16, NAXIS=10**9), "NAXIS 1000000000"),
        (header(SIMPLE="T", BITPIX=17, NAXIS=2, NAXIS1=4, NAXIS2=4) + bytes(2880), "BITPIX 17"),
        (header(SIMPLE="T", BITPIX=16, NAXIS=2, NAXIS1=4, NAXIS2=4, BLANK="'x'") + bytes(2880), "number"),
        (header(SIMPLE="T", BITPIX=16, NAXIS=2, NAXIS1=4, NAXIS2=4, BSCALE="NAN") + bytes(2880), "number"),
        (header(SIMPLE="T", BITPIX=8, NAXIS=0), "without an image"),
        (write(writer.PrimaryHDU(values_of("int16", (90, 90))))[:-9000], "truncated"),
        (write(writer.PrimaryHDU(values_of("int16", (2, 2, 2, 2, 2, 2)))), "6 axes"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else ""
    ),  # of the reasons: bytes differ between the processes of pytest-xdist
)
def test_bad_files_are_refused_in_one_line(data, reason):
    with pytest.raises(BadImage, match=reason) as error:
        fits.read(data, Piece())
    assert "\n" not in error.value.reason and len(error.value.reason) < 250


def test_folder_of_files_in_a_source(tmp_path):
    cube, picture = values_of("int16", (3, 20, 30)), values_of("uint16", (20, 30))
    (tmp_path / "a.fits").write_bytes(write(writer.PrimaryHDU(cube)))
    (tmp_path / "b.fits.gz").write_bytes(gzip.compress(write(writer.PrimaryHDU(picture))))
    (tmp_path / "c.fits").write_text("no FITS" * 1000)
    source = open_source(tmp_path)
    assert [source.name(i)[len(str(tmp_path)) + 1 :] for i in range(4)] == [
        "a.fits#z=0",
        "a.fits#z=1",
        "a.fits#z=2",
        "b.fits.gz",
    ]
    assert len(source) == 4 and any("c.fits" in name for name, _ in source.problems)
    full = (cube[1, ::-1].astype(int) + 32768) >> 8
    assert np.array_equal(read_image(source, 1).numpy(), np.broadcast_to(full, (3, 20, 30)))
    assert np.array_equal(read_image(source, 3, channels=1).numpy()[0], picture[::-1] >> 8)


def test_threads_read_their_own_files():
    pictures = [values_of("int16", (64, 64), seed) for seed in range(8)]
    kinds = (lambda a: [writer.PrimaryHDU(a)], lambda a: [writer.PrimaryHDU(), writer.CompImageHDU(a)])
    files = [write(*kinds[seed % 2](picture)) for seed, picture in enumerate(pictures)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda file: fits.read(file, Piece()).values[0, ::-1], files * 4))
    assert all(np.array_equal(values, picture) for values, picture in zip(results, pictures * 4, strict=True))


@pytest.mark.parametrize("number", [errno.EIO, None])
def test_errors_of_the_machine_are_no_fault_of_the_file(number, monkeypatch):
    def failing(stream):
        raise OSError("odd") if number is None else OSError(number, "Input/output error")

    monkeypatch.setattr(fits, "_first_image", failing)
    with pytest.raises(BadImage if number is None else OSError, match="odd" if number is None else "Input/output"):
        fits.layout(b"SIMPLE  =")
