from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from large_files import picture, tifffile, write_pyramid
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.formats import slides, tiff_windows
from upstep_fast.data.reading.stored import Piece
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import BadImage

openslide = pytest.importorskip("openslide", reason="install upstep_fast[slides]")


def write_vms(folder, image, **changes):
    """Write a Hamamatsu slide of one JPEG with restart markers; return the path of its index file."""
    for name, part in (("a.jpg", image), ("map.jpg", image[::4, ::4].copy())):
        Image.fromarray(part).save(folder / name, quality=95, subsampling=0, restart_marker_blocks=8)
    (folder / "a.opt").write_bytes(b"")
    keys = {"NoLayers": 1, "NoJpegColumns": 1, "NoJpegRows": 1, "ImageFile": "a.jpg", "MapFile": "map.jpg"}
    keys |= {"OptimisationFile": "a.opt", "MacroImage": "map.jpg", "PhysicalWidth": 512_000, "PhysicalHeight": 256_000}
    lines = [f"{key}={value}" for key, value in (keys | changes).items()]
    path = folder / "slide.vms"
    path.write_text("\n".join(["[Virtual Microscope Specimen]", *lines, "SourceLens=20", ""]))
    return path


@pytest.mark.parametrize("compression", ["jpeg", "lzw", None, "aperio_jp2000_rgb"])
def test_slides_of_aperio_have_equal_pixels_by_both_readers(tmp_path, compression):
    path = str(tmp_path / "slide.svs")
    write_pyramid(tmp_path / "slide.svs", picture(512, 768), "aperio", compression=compression)
    ours, theirs = tiff_windows.layout(path), slides.layout(path)
    assert (ours.shape, ours.levels) == (theirs.shape, theirs.levels)
    assert ours.mpp == theirs.mpp == pytest.approx(0.499)
    for level in range(3):
        piece = Piece(window=(8, 20, 64, 100), level=level)
        assert np.array_equal(tiff_windows.read(path, piece).values, slides.read(path, piece).values)


def test_jpeg_2000_of_ycbcr_is_that_of_openslide(tmp_path):
    ycbcr = np.asarray(Image.fromarray(picture(256, 256)).convert("YCbCr"))
    options = {"compression": "aperio_jp2000_ycbc", "compressionargs": {"mct": False}}
    write_pyramid(tmp_path / "slide.svs", ycbcr, "aperio", levels=1, **options)
    values = [module.read(str(tmp_path / "slide.svs"), Piece()).values.astype(int) for module in (tiff_windows, slides)]
    assert np.abs(values[0] - values[1]).max() <= 1


def test_a_slide_of_hamamatsu_is_read(tmp_path):
    path = str(write_vms(tmp_path, picture(512, 1024)))
    layout = slides.layout(path)
    assert layout.shape == (3, 512, 1024) and layout.levels[:2] == ((512, 1024), (256, 512))
    assert layout.mpp == pytest.approx(0.5)  # 512,000 nm of 1,024 pixels
    by_pillow = np.asarray(Image.open(tmp_path / "a.jpg"))
    stored = slides.read(path, Piece(window=(100, 200, 128, 256)))
    assert stored.is_8_bit and np.array_equal(np.moveaxis(stored.values, 0, -1), by_pillow[100:228, 200:456])
    half = slides.read(path, Piece(window=(50, 100, 64, 128), level=1)).values
    blocks = by_pillow[100:228, 200:456].reshape(64, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(np.moveaxis(half, 0, -1) - blocks).max() <= 4


def test_outside_of_the_scan_is_white(tmp_path):
    image = picture(256, 256)
    options = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    tiles = (
        b"" if k == 5 else image[k // 4 * 64 :][:64, k % 4 * 64 :][:, :64].tobytes() for k in range(16)
    )  # one tile is not stored
    with tifffile.TiffWriter(tmp_path / "s.svs") as file:
        text = "Aperio Image Library v1\r\n256x256 (64x64)|MPP = 0.5"
        file.write(tiles, shape=image.shape, dtype=np.uint8, description=text, **options)
    stored = slides.read(str(tmp_path / "s.svs"), Piece())
    assert (stored.values[:, 64:128, 64:128] == 255).all()
    assert np.array_equal(stored.values[:, :64], np.moveaxis(image[:64], -1, 0))


def test_threads_share_a_slide(tmp_path):
    path = str(write_vms(tmp_path, picture(512, 1024)))
    whole = slides.read(path, Piece()).values
    pieces = [Piece(window=(top, left, 64, 64)) for top in range(0, 448, 64) for left in range(0, 960, 64)]
    with ThreadPoolExecutor(8) as pool:
        for piece, stored in zip(pieces, pool.map(lambda p: slides.read(path, p), pieces * 2), strict=False):
            top, left, *_ = piece.window
            assert np.array_equal(stored.values, whole[:, top : top + 64, left : left + 64])


def _outside(folder):
    (folder / "in").mkdir()
    Image.fromarray(picture(64, 64)).save(folder / "other.jpg")
    return write_vms(folder / "in", picture(64, 64), MapFile="../other.jpg")


def _linked(folder):
    path = write_vms(folder, picture(64, 64))
    (folder / "a.opt").unlink()
    (folder / "a.opt").symlink_to("/etc/hostname")
    return path


def _without_folder(folder):
    (folder / "s.mrxs").write_bytes(b"\xff\xd8\xff")
    return folder / "s.mrxs"


def _linked_folder(folder):
    (folder / "elsewhere").mkdir()
    (folder / "data").mkdir()
    (folder / "data" / "s.mrxs").write_bytes(b"\xff\xd8\xff")
    (folder / "data" / "s").symlink_to(folder / "elsewhere")
    return folder / "data" / "s.mrxs"


def _stated_elsewhere(folder):
    path = _without_folder(folder)
    (folder / "s").mkdir()
    (folder / "s" / "Slidedat.ini").write_text("[DATAFILE]\nFILE_COUNT=1\nFILE_0=../../../etc/hostname\n")
    return path


def _null_byte(folder):
    return write_vms(folder, picture(64, 64), MapFile="a\0b.jpg")


def _long_line(folder):
    return write_vms(folder, picture(64, 64), MapFile="a" + " " * 900_000 + "b")


def _text(folder):
    (folder / "s.ndpi").write_text("not a slide")
    return folder / "s.ndpi"


def _empty(folder):
    (folder / "s.scn").write_bytes(b"")
    return folder / "s.scn"


def _sixteen_bits(folder):
    tifffile.imwrite(folder / "s.scn", picture(64, 64).astype(np.uint16), photometric="rgb", metadata=None)
    return folder / "s.scn"


BAD = {
    _outside: "outside of its folder",
    _linked: "is a link",
    _without_folder: "without its folder s/",
    _linked_folder: "is a link",
    _stated_elsewhere: "outside of its folder",
    _null_byte: "beside it",
    _long_line: "slide",
    _text: "not a slide",
    _empty: "empty",
    _sixteen_bits: "16 bits a channel",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_bad_slide_is_refused_in_one_line(tmp_path, make):
    with pytest.raises(BadImage, match=BAD[make]) as error:
        slides.layout(str(make(tmp_path)))
    assert "\n" not in error.value.reason


def test_a_slide_in_an_archive_is_refused():
    with pytest.raises(BadImage, match="archive"):
        slides.layout(b"II*\0")


@pytest.mark.parametrize("reading", [Reading(), Reading(tile=128)])
def test_the_pictures_of_a_slide_are_no_images_of_their_own(tmp_path, reading):
    write_vms(tmp_path, picture(256, 512))
    Image.fromarray(picture(128, 128)).save(tmp_path / "other.png")
    source = open_source(str(tmp_path), reading=reading)
    files = {source.name(index).partition("#")[0].rpartition("/")[2] for index in range(len(source))}
    assert files == {"slide.vms", "other.png"} and len(source) == (9 if reading.tile else 2)
    assert "2 files of slides" in source.summary
