"""Decoding: every format and fault of RELIABILITY I1 to I4 and I7. All fixtures are generated, none are stored."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from upstep_fast.data.decode import fingerprint
from upstep_fast.data.decode import image as decode_module
from upstep_fast.data.decode.image import MAX_PIXELS, decode
from upstep_fast.errors import BadImage

# Pillow's remarks on the broken files made here
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

RED, BLUE = (200, 30, 10), (10, 40, 220)


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Return a smooth image without symmetry: flips and rotations change it, JPEG keeps it within a few levels."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(extra) + body + png_chunk(b"IEND", b"")


VALID = {
    "jpeg": encoded(picture(), "JPEG", quality=92),
    "progressive": encoded(picture(), "JPEG", quality=92, progressive=True),
    "png": encoded(picture(), "PNG"),
    "webp": encoded(picture(), "WEBP", quality=90),
    "tiff": encoded(picture(), "TIFF", compression="tiff_lzw"),
    "bmp": encoded(picture(), "BMP"),
    "gif": encoded(picture(), "GIF"),
}


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_exact_pixels(kind):
    got = decode(encoded(picture(), kind))
    assert got.dtype == torch.uint8 and torch.equal(got, pixels(picture()))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_give_nearly_the_pixels(kind):
    got = decode(encoded(picture(), kind, quality=95)).int()
    assert (got - pixels(picture()).int()).abs().float().mean() < 2


def test_memoryview_decodes_as_bytes():
    assert torch.equal(decode(memoryview(VALID["png"])), decode(VALID["png"]))


def test_gray_palette_and_one_bit_become_rgb():
    gray = picture().convert("L")
    for image in (gray, picture().convert("P"), gray.convert("1")):
        assert torch.equal(decode(encoded(image, "PNG")), pixels(image.convert("RGB")))


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (2, 1))
    image.putdata([(*RED, 255), (*RED, 0)])
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode(encoded(image, "PNG"))[:, 0].T.tolist() == [list(RED), [255, 255, 255]]
    assert decode(encoded(half, "PNG")).flatten().tolist() == [127, 127, 127]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([*RED])
    assert decode(encoded(palette, "PNG", transparency=0)).flatten().tolist() == [255, 255, 255]


def test_sixteen_bits_keep_the_high_byte():
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    gray = encoded(Image.fromarray(values), "PNG")
    assert decode(gray)[0].tolist() == [[0, 0, 1, 0x12, 0xFF]]
    assert decode(encoded(Image.fromarray(values), "TIFF"))[2].tolist() == [[0, 0, 1, 0x12, 0xFF]]
    row = b"\0" + np.array([0x1234, 0x00FF, 0xFF00], ">u2").tobytes()
    assert decode(png(1, 1, 16, 2, row)).flatten().tolist() == [0x12, 0x00, 0xFF]


def test_cmyk_is_converted():
    got = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert (got[:, 8, 8].int() - torch.tensor([255, 0, 0])).abs().max() <= 3


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert (decode(data)[:, 0, 0].int() - torch.tensor(RED)).abs().max() <= 2, kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # how a viewer shows the file, by Pillow's own definition of the eight cases
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    shown = picture().transpose(turn) if turn is not None else picture()
    assert torch.equal(decode(encoded(picture(), "PNG", exif=exif)), pixels(shown))


def test_broken_exif_and_broken_icc_do_not_matter():
    for options in ({"exif": b"Exif\0\0MM\0*" + b"\xff" * 40}, {"icc_profile": b"this is no profile"}):
        assert torch.equal(decode(encoded(picture(), "PNG", **options)), pixels(picture()))
        assert decode(encoded(picture(), "JPEG", **options)).shape == (3, 40, 60)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes(width, height):
    image = Image.new("RGB", (width, height), RED)
    assert torch.equal(decode(encoded(image, "PNG")), pixels(image))


def test_hundred_megapixels_are_decoded():
    rows = (b"\0" + b"\xaa" * 1_250) * 10_000  # white, black, white, ...
    got = decode(png(10_000, 10_000, 1, 0, rows))
    assert got.shape == (3, 10_000, 10_000) and got[1, -1, -2:].tolist() == [255, 0]


def test_npy_in_each_layout():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)

    def saved(a: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.save(out, a)
        return out.getvalue()

    want = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(decode(saved(array)), want)
    assert torch.equal(decode(saved(np.ascontiguousarray(array.transpose(2, 0, 1)))), want)
    assert torch.equal(decode(saved(np.asfortranarray(array))), want)
    assert torch.equal(decode(saved(array.astype(np.uint16) << 8)), want)
    assert torch.equal(decode(saved(array[:, :, 0])), want[:1].expand(3, -1, -1))
    many = np.arange(2 * 4 * 7, dtype=np.uint8).reshape(7, 2, 4)
    assert torch.equal(decode(saved(many), channels=7), torch.from_numpy(many))
    for bad in (array.astype(np.float32), array.astype(object), array[None], array[:0], many):
        out = io.BytesIO()
        np.save(out, bad, allow_pickle=True)
        with pytest.raises(BadImage):
            decode(out.getvalue())
    with pytest.raises(BadImage, match="truncated"):
        decode(saved(array)[:-1])


def test_channels():
    assert torch.equal(decode(VALID["png"], channels=1)[0], torch.from_numpy(np.array(picture().convert("L"))))
    rgba = Image.new("RGBA", (2, 2), (*RED, 7))
    assert decode(encoded(rgba, "PNG"), channels=4)[:, 0, 0].tolist() == [*RED, 7]
    with pytest.raises(BadImage, match="3 bands, 5 were asked for"):
        decode(VALID["png"], channels=5)


def tiff(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(out, array, **{"photometric": "minisblack", **options})
    return out.getvalue()


LAYOUTS = {
    "interleaved": {"planarconfig": "contig"},
    "planar": {"planarconfig": "separate"},
    "a page a band": {},
    "deflate": {"planarconfig": "contig", "compression": "zlib", "predictor": True},
    "tiles": {"planarconfig": "contig", "tile": (32, 32), "compression": "zlib"},
    "big endian": {"planarconfig": "contig", "byteorder": ">"},
    "BigTIFF": {"planarconfig": "contig", "bigtiff": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bands", [2, 4, 6, 13])
def test_tiffs_of_many_bands(layout, bands):
    array = np.random.default_rng(0).integers(0, 1 << 16, (40, 50, bands), dtype=np.uint16)
    stored = (
        array if LAYOUTS[layout].get("planarconfig") == "contig" else np.ascontiguousarray(array.transpose(2, 0, 1))
    )
    want = torch.from_numpy((array >> 8).astype(np.uint8)).permute(2, 0, 1)
    assert torch.equal(decode(tiff(stored, **LAYOUTS[layout]), channels=bands), want)
    eight = tiff((stored >> 8).astype(np.uint8), **LAYOUTS[layout])
    assert torch.equal(decode(eight, channels=bands), want)
    for length in [*range(8, len(eight), 997), len(eight) - 1]:  # no part is taken for the whole
        try:
            got = decode(eight[:length], channels=bands)
        except BadImage:
            continue
        assert torch.equal(got, want) and length > array.size, "only directories behind the pixels were cut off"


def test_four_bands_are_bands_and_transparency_is_transparency():
    array = np.random.default_rng(0).integers(0, 256, (9, 8, 4), dtype=np.uint8)
    want = torch.from_numpy(array).permute(2, 0, 1)
    for kind in ("unspecified", "unassalpha"):
        data = tiff(array, photometric="rgb", extrasamples=[kind])
        assert torch.equal(decode(data, channels=4), want), kind
    # Pillow would give the first three of a fourth band that is not alpha, and 255 for it
    assert torch.equal(decode(tiff(array, photometric="rgb", extrasamples=["unspecified"])), want[:3])


def test_unsupported_tiffs_name_the_reason(monkeypatch):
    array = np.zeros((30, 20, 5), np.uint8)
    with pytest.raises(BadImage, match="a TIFF of 5 bands, 3 were asked for"):
        decode(tiff(array, planarconfig="contig"))
    with pytest.raises(BadImage, match="6 channels were asked for"):
        decode(tiff(array, planarconfig="contig"), channels=6)
    with pytest.raises(BadImage, match="an array of float32"):
        decode(tiff(array.astype(np.float32), planarconfig="contig"), channels=5)
    with pytest.raises(BadImage, match="above the limit of 100"):
        decode(tiff(array, planarconfig="contig"), channels=5, max_pixels=100)
    with pytest.raises(BadImage, match="3 bands, 5 were asked for"):
        decode(VALID["bmp"], channels=5)
    data = tiff(array, planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImage, match=r"needs the package tifffile: pip install 'upstep_fast\[data\]'"):
        decode(data, channels=5)


def test_min_side_decodes_large_jpegs_at_a_fraction():
    large = picture(1600, 1200)
    data = encoded(large, "JPEG", quality=95)
    assert decode(data, min_side=280).shape == (3, 300, 400)
    assert decode(data, min_side=601).shape == (3, 1200, 1600)
    want = pixels(large.resize((400, 300), Image.Resampling.BOX)).float()
    # the picture's colors wrap around, and at a wrap the two filters differ
    assert ((decode(data, min_side=280).float() - want).abs() < 6).float().mean() > 0.9


def test_decoder_fingerprint_changes_with_pixels(monkeypatch):
    """It is equal in another process, and changes with one level of one pixel or with a filter of the decoder."""
    here = fingerprint.decoder_fingerprint()
    code = "from upstep_fast.data.decode.fingerprint import decoder_fingerprint as f; print(f())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    reader, _, digest = here.partition(" ")
    assert here == there and reader in ("torchvision", "Pillow") and len(digest) == 64
    real = decode_module._to_array

    def off_by_one(image, channels, tiff):
        pixels = real(image, channels, tiff).copy()
        if image.mode == "CMYK":  # one picture of the twenty
            pixels.flat[0] ^= 1
        return pixels

    monkeypatch.setattr(decode_module, "_to_array", off_by_one)
    assert fingerprint.decoder_fingerprint.__wrapped__() != here
    monkeypatch.setattr(decode_module, "_to_array", real)
    assert fingerprint.decoder_fingerprint.__wrapped__() == here
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    assert fingerprint.decoder_fingerprint.__wrapped__() != here


# what is not an image, or only a part of one


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 1000, "not an image"),
        (b"hello, this is a text file", "text"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (np.random.default_rng(0).bytes(5000), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\x93NUMPY\x01\x00", "cannot be decoded"),
    ],
)
def test_other_bytes_are_refused_with_a_reason(data, reason, record_property):
    with pytest.raises(BadImage) as caught:
        decode(data, name="photo.jpg")
    assert reason in caught.value.reason
    assert str(caught.value).startswith("photo.jpg: ") and "\n" not in str(caught.value)
    record_property("bad_images", 1)


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("percent", [1, 50, 80, 99])
def test_truncated_files_are_refused(kind, percent, record_property):
    data = VALID[kind]
    with pytest.raises(BadImage):
        decode(data[: len(data) * percent // 100])
    record_property("bad_images", 1)


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png"])
def test_every_prefix_of_a_file_is_refused(kind, record_property):
    data = VALID[kind]
    for length in range(len(data)):
        with pytest.raises(BadImage):
            decode(data[:length])
    record_property("bad_images", len(data))


def test_a_cut_jpeg_with_an_end_marker_is_refused():
    """libjpeg fills such an image with gray and only warns: without a check it would be trained on."""
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise).resize((256, 256)), "JPEG", quality=90)
    for percent in (30, 50, 80, 95):
        with pytest.raises(BadImage, match="truncated"):
            decode(data[: len(data) * percent // 100] + b"\xff\xd9")
    with pytest.raises(BadImage, match="truncated"):  # a piece out of the middle
        decode(data[: len(data) // 2] + data[len(data) * 3 // 4 :])


def test_a_jpeg_that_ends_in_gray_is_accepted():
    image = picture()
    image.paste((128, 128, 128), (0, 20, 60, 40))
    assert decode(encoded(image, "JPEG", quality=95)).shape == (3, 40, 60)
    assert decode(encoded(Image.new("RGB", (33, 17), (128, 128, 128)), "JPEG")).shape == (3, 17, 33)


def test_a_flipped_bit_in_a_png_is_detected(record_property):
    data = VALID["png"]
    bits = range(0, 8 * len(data), 7)
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadImage):
            decode(bytes(changed))
    record_property("bad_images", len(bits))


def test_bombs_are_refused_from_the_header():
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(b"\0" * 1_876) for _ in range(15_000)) + rows.flush()
    header = struct.pack(">IIBBBBB", 15_000, 15_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    assert len(bomb) < 40_000
    start = time.process_time()
    with pytest.raises(BadImage):
        decode(bomb)
    assert time.process_time() - start < 0.5, "the bomb was unpacked before it was refused"
    with pytest.raises(BadImage, match="60 x 40 pixels, above the limit of 100"):
        decode(VALID["png"], max_pixels=100)
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)})
    with pytest.raises(BadImage, match="above the limit"):
        decode(out.getvalue())
    assert MAX_PIXELS >= 100_000_000


def test_floating_point_has_no_defined_range():
    with pytest.raises(BadImage, match="floating-point"):
        decode(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


def _mutate(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    changed = bytearray(data)
    for at, cut, put in edits:
        at %= len(changed) + 1
        changed[at : at + cut] = put
    return bytes(changed)


def _check_mutation(kind: str, edits: list[tuple[int, int, bytes]]) -> bool:
    """Check that a mutated file is refused or decodes to a complete image; return whether it decodes."""
    data = _mutate(VALID[kind], edits)
    start = time.perf_counter()
    try:
        got = decode(data, max_pixels=1_000_000)
    except BadImage as error:
        assert error.reason and "\n" not in error.reason
        taken = False
    else:
        assert got.dtype == torch.uint8 and got.ndim == 3 and got.shape[0] == 3 and 0 < got.numel() <= 3_000_000
        if kind == "png":  # checksums: what is accepted is what was written
            assert torch.equal(got, decode(VALID["png"]))
        taken = True
    assert time.perf_counter() - start < 5
    return taken


mutations = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 64), st.binary(max_size=16)), min_size=1, max_size=4
)
slow = [HealthCheck.too_slow, HealthCheck.data_too_large]


def _mutations(record_property, **options):
    """Decode mutated files and record how many were refused and how many accepted."""
    taken: list[bool] = []

    @settings(deadline=None, suppress_health_check=slow, **options)
    @given(kind=st.sampled_from(sorted(VALID)), edits=mutations)
    def check(kind, edits):
        taken.append(_check_mutation(kind, edits))

    check()
    assert len(taken) >= options["max_examples"]
    record_property("bad_images", len(taken))
    record_property("mutations", len(taken))
    record_property("mutations_refused", len(taken) - sum(taken))


def test_mutated_files(record_property):
    _mutations(record_property, max_examples=300, derandomize=True)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=slow)
@given(layout=st.sampled_from(sorted(LAYOUTS)), edits=mutations)
def test_mutated_tiffs_of_many_bands(layout, edits):
    stored = np.random.default_rng(0).integers(0, 256, (40, 50, 5), dtype=np.uint8)
    if LAYOUTS[layout].get("planarconfig") != "contig":
        stored = np.ascontiguousarray(stored.transpose(2, 0, 1))
    data = _mutate(tiff(stored, **LAYOUTS[layout]), edits)
    start = time.perf_counter()
    try:
        got = decode(data, channels=5, max_pixels=1_000_000)
    except BadImage as error:
        assert error.reason and "\n" not in error.reason
    else:
        assert got.dtype == torch.uint8 and got.ndim == 3 and got.shape[0] == 5 and 0 < got.numel() <= 5_000_000
    assert time.perf_counter() - start < 5


@pytest.mark.long
def test_mutated_files_long(record_property):
    _mutations(record_property, max_examples=10_000)
