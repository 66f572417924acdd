"""Every kind of pixel: read as the format's definition says, or refused by name; never other pixels in silence.

The files are written here, sample by sample, and the expected values follow from the samples by the rules of
docs/data.md: no library under test is asked for them.
"""

from __future__ import annotations

import io
import itertools
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tally import tally
from tiff_files import (
    BLACK_IS_ZERO,
    CMYK,
    DEFLATE,
    FLOAT,
    LAB,
    LZW,
    NONE,
    PACKBITS,
    PALETTE,
    RGB,
    SIGNED,
    WHITE_IS_ZERO,
    YCBCR,
    Kind,
    write_tiff,
)

from upstep_fast.data.decode import tiff
from upstep_fast.data.decode.image import decode
from upstep_fast.errors import BadImage

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
pytest.importorskip("tifffile")


def to_eight_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """Return the upper eight of the declared bits, or fewer bits stretched to 0..255."""
    return samples >> (bits - 8) if bits > 8 else samples * 255 // ((1 << bits) - 1)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite [..., C] on white by alpha [...]."""
    return (colors * alpha[..., None] + 255 * (255 - alpha[..., None]) + 127) // 255


def luma(colors: np.ndarray) -> np.ndarray:
    return ((colors @ np.array([19595, 38470, 7471]) + 32768) >> 16)[..., None]


def expected(page: np.ndarray, kind: Kind, channels: int) -> np.ndarray | None:
    """Return [H, W, channels], None if the file has no such channels."""
    v = to_eight_bits(page, kind.bits)
    if kind.photometric == CMYK:
        v = (255 - v[..., :3]) * (255 - v[..., 3:4]) // 255
        return {3: v, 1: luma(v)}.get(channels)
    if kind.photometric == WHITE_IS_ZERO:
        v = 255 - v
    samples = v.shape[-1]
    if samples == channels:
        return v
    if samples == 1:
        return v.repeat(channels, -1)
    if channels not in (1, 3):
        return None
    count = 3 if kind.photometric == RGB else 1
    if count == 1 and kind.extra[0] not in (1, 2):
        return None
    colors = v[..., :count]
    if kind.extra[:1] == (1,):  # associated: multiplied already
        colors = np.clip(colors + 255 - v[..., count : count + 1], 0, 255)
    return luma(colors) if count == 3 and channels == 1 else colors.repeat(channels // colors.shape[-1] or 1, -1)


SAMPLES = {  # photometric -> extra samples of each file
    WHITE_IS_ZERO: [(1, ())],
    BLACK_IS_ZERO: [(1, ()), (2, (0,)), (2, (1,)), (2, (2,)), (3, (0, 0))],
    RGB: [(3, ()), (4, (0,)), (4, (1,)), (4, (2,)), (5, (0, 0))],
    CMYK: [(4, ())],
}


def tiff_kinds() -> list[tuple[int, Kind]]:
    """Return (samples, kind) of every combination."""
    kinds = []
    for photometric, layouts in SAMPLES.items():
        for (samples, extra), bits, planar, order, compression, tile, big, predictor in itertools.product(
            layouts,
            (1, 2, 4, 8, 12, 16),
            (False, True),
            "<>",
            (NONE, LZW, DEFLATE, PACKBITS),
            (0, 16),
            (False, True),
            (False, True),
        ):
            if (predictor and (compression in (NONE, PACKBITS) or bits not in (8, 16))) or (planar and samples == 1):
                continue
            if bits < 8 and samples > 1:
                continue
            kinds.append(
                (samples, Kind(bits, photometric, 1, planar, extra, order, compression, tile, 5, 1, big, predictor))
            )
    return kinds


def check_tiffs(kinds, record_property) -> dict[bool, int]:
    """Check every kind for several numbers of channels; return how many were read (True) and refused (False)."""
    rng, counts = np.random.default_rng(0), {True: 0, False: 0}
    for samples, kind in kinds:
        page = rng.integers(0, 1 << kind.bits, (20, 24, samples))
        if kind.extra[:1] == (1,):  # no color is above its alpha
            colors = 3 if kind.photometric == RGB else 1
            page[..., :colors] = page[..., :colors] * page[..., colors : colors + 1] >> kind.bits
        data = write_tiff([page], kind)
        for channels in sorted({1, 3, 4, samples}):
            want = expected(page, kind, channels)
            try:
                got = decode(data, channels=channels)
            except BadImage as error:
                assert "\n" not in str(error) and "Error" not in error.reason, (kind, error)
                counts[False] += 1
                continue
            counts[True] += 1
            assert want is not None, (kind, channels)
            worst = np.abs(got.permute(1, 2, 0).numpy().astype(int) - want).max()
            # Pillow rounds CMYK, and divides by associated alpha before it composites
            limit = 2 if kind.photometric == CMYK or (kind.extra[:1] == (1,) and channels != samples) else 0
            assert worst <= limit, (kind, channels, worst)
    tally("pixel kinds", "TIFF", sum(counts.values()))
    record_property("tiff_kinds_read", counts[True])
    record_property("tiff_kinds_refused", counts[False])
    return counts


def test_tiffs_of_a_sample_of_kinds(record_property):
    counts = check_tiffs(tiff_kinds()[::13], record_property)
    assert counts[True] > 300


@pytest.mark.long
def test_tiffs_of_all_kinds(record_property):
    check_tiffs(tiff_kinds(), record_property)


@pytest.mark.long
def test_tiffs_of_all_kinds_without_tifffile(record_property, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    check_tiffs(tiff_kinds(), record_property)


def test_tiffs_of_a_sample_of_kinds_without_tifffile(record_property, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    check_tiffs(tiff_kinds()[3::23], record_property)


COMMON = [
    *itertools.product((1, 2, 4, 8, 16), (WHITE_IS_ZERO, BLACK_IS_ZERO), (1,), (False,), ((),)),
    *itertools.product((8, 16), (RGB,), (3,), (False, True), ((),)),
    *itertools.product((8, 16), (BLACK_IS_ZERO,), (3,), (False, True), ((0, 0),)),
    *itertools.product((8, 16), (RGB,), (4,), (False, True), ((0,), (1,), (2,))),
    (12, BLACK_IS_ZERO, 1, False, ()),
]


@pytest.mark.parametrize(("bits", "photometric", "samples", "planar", "extra"), COMMON)
def test_common_tiffs_are_read(bits, photometric, samples, planar, extra):
    """None of these may be refused, whatever the byte order."""
    page = np.random.default_rng(0).integers(0, 1 << bits, (20, 24, samples))
    if extra == (1,):
        page[..., :3] = page[..., :3] * page[..., 3:] >> bits
    for order, compression in itertools.product("<" if bits == 12 else "<>", (NONE, DEFLATE)):
        kind = Kind(bits, photometric, planar=planar, extra=extra, order=order, compression=compression)
        for channels in {1, 3, samples} if photometric == RGB else {3, samples}:
            got = decode(write_tiff([page], kind), channels=channels).permute(1, 2, 0).numpy().astype(int)
            limit = 2 if extra == (1,) and channels != samples else 0
            assert np.abs(got - expected(page, kind, channels)).max() <= limit, (order, compression, channels)


def constant(*values: int | float, size: tuple[int, int] = (10, 12)) -> np.ndarray:
    return np.broadcast_to(np.array(values), (*size, len(values))).copy()


@pytest.mark.parametrize(
    ("values", "kind", "channels", "want"),
    [  # by hand
        ((40000, 300, 255), Kind(16, RGB, planar=True), 3, [156, 1, 0]),
        ((46297, 46243, 46210, 46149), Kind(16, RGB, planar=True, extra=(2,)), 4, [180] * 4),
        ((200, 100, 50, 128), Kind(8, RGB, extra=(2,)), 3, [200, 100, 50]),  # GDAL's fourth band
        ((200, 100, 50, 128), Kind(8, RGB, extra=(1,)), 4, [200, 100, 50, 128]),
        ((100, 60, 20, 128), Kind(8, RGB, extra=(1,)), 3, [227, 187, 147]),
        ((100, 128), Kind(8, extra=(1,)), 3, [227] * 3),
        ((40000, 300, 255), Kind(16, extra=(0, 0)), 3, [156, 1, 0]),
        ((40000,), Kind(16, WHITE_IS_ZERO), 3, [99] * 3),
        ((55,), Kind(8, WHITE_IS_ZERO), 1, [200]),
        ((0x9AB,), Kind(12), 1, [0x9A]),
    ],
)
def test_tiff_values(values, kind, channels, want):
    got = decode(write_tiff([constant(*values)], kind), channels=channels)[:, 3, 4].int()
    assert (got - torch.tensor(want)).abs().max() <= (1 if kind.extra == (1,) and channels == 3 else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("samples", "photometric"), [(1, BLACK_IS_ZERO), (3, RGB), (5, BLACK_IS_ZERO)])
def test_tiffs_are_turned_upright_whatever_their_bands(samples, photometric, orientation):
    page = np.random.default_rng(0).integers(0, 256, (4, 6, samples))
    extra = (0,) * (samples - 1) if photometric == BLACK_IS_ZERO else ()
    got = decode(write_tiff([page], Kind(8, photometric, extra=extra, orientation=orientation)), channels=samples)
    # TIFF 6.0: where row 0 and column 0 are
    turned = {
        1: page,
        2: page[:, ::-1],
        3: page[::-1, ::-1],
        4: page[::-1],
        5: page.transpose(1, 0, 2),
        6: page.transpose(1, 0, 2)[:, ::-1],
        7: page.transpose(1, 0, 2)[::-1, ::-1],
        8: page.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert np.array_equal(got.permute(1, 2, 0).numpy(), turned)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("description", ["", "ImageJ=1.11a\nimages=3\nchannels=3\nmode=composite\n"])
def test_gray_pages_are_bands(bits, description):
    pages = list(np.random.default_rng(0).integers(0, 1 << bits, (3, 9, 7, 1)))
    data = write_tiff(pages, Kind(bits), description)
    got = decode(data).numpy()
    assert np.array_equal(got, to_eight_bits(np.stack(pages)[..., 0], bits))
    for channels in (1, 2, 4):
        with pytest.raises(BadImage, match=r"a TIFF of 3 bands"):
            decode(data, channels=channels)


def test_imagej_writes_three_channels_as_three_pages():
    tifffile = pytest.importorskip("tifffile")
    array = np.random.default_rng(0).integers(0, 1 << 16, (3, 9, 7), dtype=np.uint16)
    for options in ({"imagej": True, "metadata": {"axes": "CYX"}}, {"ome": True, "metadata": {"axes": "CYX"}}, {}):
        out = io.BytesIO()
        tifffile.imwrite(out, array, photometric="minisblack", **options)
        assert np.array_equal(decode(out.getvalue()).numpy(), array >> 8), options


@pytest.mark.parametrize(("axes", "said"), [("ZYX", r"3 slices \(Z\)"), ("TYX", r"3 frames \(T\)")])
@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_stacks_in_space_or_time_are_not_channels(kind, axes, said):
    tifffile = pytest.importorskip("tifffile")
    for count in (3, 5):
        array = np.random.default_rng(0).integers(0, 256, (count, 9, 7), dtype=np.uint8)
        out = io.BytesIO()
        tifffile.imwrite(out, array, photometric="minisblack", metadata={"axes": axes}, **{kind: True})
        for channels in (1, 3):
            with pytest.raises(BadImage, match=f"a stack of {said.replace('3', str(count))}, no channels; write each"):
                decode(out.getvalue(), channels=channels)
    assert np.array_equal(decode(out.getvalue(), channels=5).numpy(), array)  # asked for by --in-chans 5


def test_three_gray_pages_are_said_once(caplog):
    pages = [np.full((9, 7, 1), value) for value in (1, 2, 3)]
    tiff._say_pages_are_bands.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert decode(write_tiff(pages, Kind()))[:, 0, 0].tolist() == [1, 2, 3]
    assert caplog.text.count("three gray pages: the pages are read as red, green and blue") == 1


def test_pages_that_are_no_bands():
    rng = np.random.default_rng(0)
    colors = list(rng.integers(0, 256, (2, 9, 7, 3)))
    assert np.array_equal(decode(write_tiff(colors, Kind(8, RGB))).permute(1, 2, 0).numpy(), colors[0])
    other_size = [rng.integers(0, 256, (9, 7, 1)), rng.integers(0, 256, (4, 3, 1))]
    assert np.array_equal(decode(write_tiff(other_size, Kind()), channels=1)[0].numpy(), other_size[0][..., 0])
    scan = list(rng.integers(0, 2, (4, 9, 7, 1)))
    assert np.array_equal(decode(write_tiff(scan, Kind(1)), channels=1)[0].numpy(), scan[0][..., 0] * 255)


CIELAB_RED = (136, 80, 67)  # L* 53.2, a* 80.1, b* 67.2
REFUSED = {
    "int8": (constant(-3), Kind(8, sample_format=SIGNED), {}, "an array of int8: signed"),
    "int16": (constant(-3), Kind(16, sample_format=SIGNED), {}, "an array of int16: signed"),
    "positive int16": (constant(3000), Kind(16, sample_format=SIGNED), {}, "an array of int16: signed"),
    "int32": (constant(200), Kind(32, sample_format=SIGNED), {}, "an array of int32: signed"),
    "uint32": (constant(200), Kind(32), {}, "an array of uint32: 32-bit"),
    "big-endian uint32": (constant(1 << 31), Kind(32, order=">"), {}, "an array of uint32: 32-bit"),
    "float16": (constant(0.5), Kind(16, sample_format=FLOAT), {}, "an array of float16: floating-point"),
    "float32": (constant(0.5), Kind(32, sample_format=FLOAT), {}, "an array of float32: floating-point"),
    "float64": (constant(0.5), Kind(64, sample_format=FLOAT), {}, "an array of float64: floating-point"),
    "float bands": (constant(0.5, 1, 2), Kind(32, sample_format=FLOAT, extra=(0, 0)), {}, "an array of float32"),
    "24 bits": (constant(5), Kind(32), {258: [24]}, "uint24"),
    "5-6-5 bits": (constant(5, 6, 5), Kind(8, RGB), {258: [5, 6, 5]}, "samples of 5, 6, 5 bits"),
    "16-bit palette": (constant(1), Kind(16, PALETTE), {320: [0] * 768}, "palette of 1 samples is not read"),
    "subsampled YCbCr": (constant(76, 85, 255), Kind(8, YCBCR), {530: [2, 2]}, "YCbCr of 3 samples is not read"),
    "planar Lab": (constant(*CIELAB_RED), Kind(8, LAB, planar=True), {}, "planar Lab"),
    "other inks": (constant(0, 255, 255, 0), Kind(8, CMYK), {332: [2]}, "CMYK of 4 samples is not read"),
    "color filter array": (constant(5), Kind(8, 32803), {}, "photometric interpretation 32803"),
    "raw photograph": (constant(5), Kind(8), {50706: [1]}, "raw photograph"),
    "thumbnail": (constant(5), Kind(8, subfile=1), {}, "first page is a thumbnail"),
    "volume": (constant(5), Kind(8), {32997: [4]}, "12 x 10 x 4 pixels"),
    "sparse": (constant(5), Kind(8), {279: [0, 0]}, "a sparse TIFF"),
    "two bands": (constant(5, 6), Kind(8, extra=(0,)), {}, "a TIFF of 2 bands, 3 were asked for"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tiffs_without_a_defined_reading_are_refused_by_name(name):
    page, kind, tags, reason = REFUSED[name]
    with pytest.raises(BadImage, match=reason) as caught:
        decode(write_tiff([page], kind, tags=tags))
    assert "Error" not in caught.value.reason


def test_one_file_of_a_set_is_refused():
    description = (
        '<?xml version="1.0"?><OME><Image><Pixels SizeC="3" SizeT="1" SizeX="7" SizeY="9" SizeZ="1"/></Image></OME>'
    )
    with pytest.raises(BadImage, match="one file of an OME-TIFF of 3 planes"):
        decode(write_tiff([constant(5)], Kind(), description))


def test_tiffs_of_other_color_spaces():
    red = [254, 0, 0]
    for kind, values, tags in (
        (Kind(8, LAB), CIELAB_RED, {}),
        (Kind(8, YCBCR), (76, 85, 255), {530: [1, 1]}),
        (Kind(8, CMYK), (0, 255, 255, 0), {}),
        (Kind(8, PALETTE), (1,), {320: [0, 65535, *[0] * 766]}),
    ):
        got = decode(write_tiff([constant(*values)], kind, tags=tags))[:, 3, 4].int()
        assert (got - torch.tensor(red)).abs().max() <= 12, (kind, got)
        with pytest.raises(BadImage, match="channels were asked for"):
            decode(write_tiff([constant(*values)], kind, tags=tags), channels=5)


def png(pixels: np.ndarray, bits: int, color: int, palette: bytes = b"", clear: bytes = b"") -> bytes:
    """Return a PNG of integer samples [H, W, S]."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b""
    for row in pixels.reshape(len(pixels), -1):
        digits = (row[:, None] >> np.arange(bits - 1, -1, -1)) & 1
        rows += b"\0" + np.packbits(digits.astype(np.uint8).reshape(-1)).tobytes()
    height, width = pixels.shape[:2]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))]
    parts += [chunk(name, body) for name, body in ((b"PLTE", palette), (b"tRNS", clear)) if body]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PNGS = [
    (color, bits)
    for color, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 4: (8, 16), 6: (8, 16)}.items()
    for bits in depths
]


@pytest.mark.parametrize("is_clear", [False, True])
@pytest.mark.parametrize(("color", "bits"), PNGS)
def test_pngs(color, bits, is_clear):
    """Gray, RGB, gray with alpha, RGBA of all depths; is_clear: one color is transparent."""
    if is_clear and color not in (0, 2):
        return
    samples, rng = {0: 1, 2: 3, 4: 2, 6: 4}[color], np.random.default_rng(0)
    pixels = rng.integers(0, 1 << bits, (9, 13, samples))
    key = pixels[0, 0].copy()
    pixels[3, 4], pixels[5, 5], pixels[6, 6] = key, (key + (1 << bits) // 2) % (1 << bits), key ^ 1
    clear = struct.pack(f">{samples}H", *key.tolist()) if is_clear else b""
    data = png(pixels, bits, color, clear=clear)
    if is_clear and (color, bits) == (2, 16):
        with pytest.raises(BadImage, match="one of them transparent"):
            decode(data)
        return
    colors = to_eight_bits(pixels[..., :3] if color in (2, 6) else pixels[..., :1].repeat(3, -1), bits)
    if is_clear:
        colors = on_white(colors, np.where((pixels == key).all(-1), 0, 255))
    elif color in (4, 6):
        colors = on_white(colors, to_eight_bits(pixels[..., -1], bits))
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), colors)
    assert np.array_equal(decode(data, channels=1)[0].numpy(), luma(colors)[..., 0])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_pngs(bits):
    rng = np.random.default_rng(0)
    index, palette = rng.integers(0, 1 << bits, (9, 13, 1)), rng.integers(0, 256, (1 << bits, 3))
    alpha = rng.integers(0, 256, 1 << bits)
    colors = palette[index[..., 0]]
    body = palette.astype(np.uint8).tobytes()
    assert np.array_equal(decode(png(index, bits, 3, body)).permute(1, 2, 0).numpy(), colors)
    got = decode(png(index, bits, 3, body, alpha.astype(np.uint8).tobytes())).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - on_white(colors, alpha[index[..., 0]])).max() <= 1


@pytest.mark.parametrize("largest", [1, 7, 100, 255, 256, 1023, 4095, 65535])
def test_pnms_are_scaled_by_their_maximum(largest):
    rng = np.random.default_rng(0)
    for magic, samples in ((b"P5", 1), (b"P6", 3), (b"P2", 1), (b"P3", 3)):
        pixels = rng.integers(0, largest + 1, (6, 5, samples))
        pixels[0, 0], pixels[0, 1] = 0, largest
        text = " ".join(map(str, pixels.reshape(-1).tolist())).encode()
        body = text if magic in (b"P2", b"P3") else pixels.astype(">u2" if largest > 255 else "u1").tobytes()
        got = decode(b"%s\n5 6\n%d\n" % (magic, largest) + body).permute(1, 2, 0).numpy()
        assert np.abs(got - pixels * 255 / largest).max() < 1 and got[0, 0, 0] == 0 and got[0, 1, 0] == 255
    with pytest.raises(BadImage, match="floating-point"):
        decode(b"Pf\n2 2\n-1.0\n" + np.ones(4, "<f4").tobytes())


def bmp(
    rows: list[bytes], width: int, height: int, bits: int, masks: tuple[int, ...] = (), palette: bytes = b""
) -> bytes:
    body = b"".join(row + b"\0" * (-len(row) % 4) for row in rows)
    size = 108 if len(masks) == 4 else 40
    tail = (struct.pack(f"<{len(masks)}I", *masks)).ljust(size - 40 if size == 108 else 4 * len(masks), b"\0")
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, 3 if masks else 0, len(body), 0, 0, 0, 0)
    start = 14 + len(header) + len(tail) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + tail + palette + body


def test_bmps():
    rng = np.random.default_rng(0)
    c = rng.integers(0, 256, (5, 7, 3))
    bgr, a = c[..., ::-1].astype(np.uint8), rng.integers(0, 256, (5, 7, 1))
    bgra = np.concatenate([bgr, a], -1).astype(np.uint8)
    five, green = rng.integers(0, 32, (5, 7, 3)), rng.integers(0, 64, (5, 7))
    six = five.copy()
    six[..., 1] = green
    packed5 = (five @ np.array([1 << 10, 1 << 5, 1])).astype("<u2")
    packed6 = (six @ np.array([1 << 11, 1 << 5, 1])).astype("<u2")
    masks = (0xFF0000, 0xFF00, 0xFF)
    index, palette = rng.integers(0, 16, (5, 8)), rng.integers(0, 256, (16, 3))
    halves = (index[:, ::2] << 4 | index[:, 1::2]).astype(np.uint8)
    colors = b"".join(bytes([b, g, r, 0]) for r, g, b in palette.tolist())

    def up(x: np.ndarray) -> list[bytes]:
        return [row.tobytes() for row in x[::-1]]

    for data, want in (
        (bmp(up(bgr), 7, 5, 24), c),
        (bmp(up(bgr[::-1]), 7, -5, 24), c),
        (bmp(up(bgra), 7, 5, 32), c),  # the fourth byte has no meaning
        (bmp(up(bgra), 7, 5, 32, masks), c),
        (bmp(up(bgra), 7, 5, 32, (*masks, 0xFF000000)), on_white(c, a[..., 0])),
        (bmp(up(packed5), 7, 5, 16), five * 255 // 31),
        (bmp(up(packed6), 7, 5, 16, (0xF800, 0x7E0, 0x1F)), six * 255 // np.array([31, 63, 31])),
        (bmp(up(halves), 8, 5, 4, palette=colors), palette[index]),
    ):
        assert np.abs(decode(data).permute(1, 2, 0).numpy().astype(int) - want).max() <= 1


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_npy_kinds():
    rng = np.random.default_rng(0)
    gray, rgb = rng.integers(0, 256, (9, 7), np.uint8), rng.integers(0, 256, (9, 7, 3), np.uint8)
    for array in (gray, gray[..., None], gray[None], (gray.astype(">u2") << 8) + 7, np.asfortranarray(gray)):
        for channels in (1, 3, 5):
            assert np.array_equal(decode(saved(array), channels=channels).numpy(), np.stack([gray] * channels))
    for array in (rgb, rgb.transpose(2, 0, 1), np.asfortranarray(rgb), rgb.astype("<u2") << 8):
        assert np.array_equal(decode(saved(array)).permute(1, 2, 0).numpy(), rgb)
        assert np.array_equal(decode(saved(array), channels=1)[0].numpy(), luma(rgb.astype(int))[..., 0])
        with pytest.raises(BadImage, match="4 channels were asked for"):
            decode(saved(array), channels=4)
    for dtype in (
        "bool",
        "int8",
        "int16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
    ):
        with pytest.raises(BadImage, match=f"an array of {dtype}"):
            decode(saved(gray.astype(dtype)))
    with pytest.raises(BadImage, match="cannot be told apart"):
        decode(saved(rng.integers(0, 256, (3, 9, 3), np.uint8)))
    with pytest.raises(BadImage, match="damaged: 65 bytes of 63 values"):
        decode(saved(gray) + b"ab")


def test_jpeg_kinds():
    """Gray, RGB and CMYK as Adobe writes it, inverted; the picture is one color, which JPEG keeps within rounding."""
    for mode, value, want in (
        ("L", 77, [77] * 3),
        ("RGB", (200, 30, 10), [200, 30, 10]),
        ("CMYK", (55, 225, 245, 0), [200, 30, 10]),
    ):
        out = io.BytesIO()
        Image.new(mode, (16, 16), value).save(out, "JPEG", quality=98)
        assert (decode(out.getvalue())[:, 8, 8].int() - torch.tensor(want)).abs().max() <= 3, mode
