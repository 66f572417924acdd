"""Tiles as images of a source: every container and kind of file, in the order and with the labels of their files."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
from large_files import picture, write_pyramid, write_sparse
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.curation.triage import triage
from upstep_fast.data.decode import cut
from upstep_fast.data.decode.image import decode
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading.intensity import map_range
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import BadImage, DataError

TILES = Reading(tile=64, stride=50)


def write(path, image) -> None:
    suffix = path.suffix
    if suffix == ".svs":
        write_pyramid(path, image, "aperio", compression="zlib")
    elif suffix == ".tif":
        write_pyramid(path, image, "subifds", compression="zlib")
    elif suffix == ".npy":
        np.save(path, image)
    else:
        exif = Image.Exif()
        if path.stem == "turned":
            exif[0x0112] = 6
        Image.fromarray(image).save(path, exif=exif)


FILES = ("a.svs", "b.tif", "c.jpg", "turned.jpg", "d.png", "e.npy", "f.bmp", "g.webp")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("level", [0, 1])
def test_tiles_are_windows_of_the_whole_picture(tmp_path, name, level):
    image = picture(150, 230)
    write(tmp_path / name, image)
    if name.endswith(".npy") and level:
        with pytest.raises(DataError, match="only level 0"):
            open_source(str(tmp_path), reading=Reading(tile=64, level=1))
        return
    if name.endswith((".svs", ".tif", ".npy")):
        whole = np.moveaxis(image, -1, 0)
        whole = np.moveaxis(np.asarray(Image.fromarray(image).reduce(2)), -1, 0) if level else whole
    else:
        data = (tmp_path / name).read_bytes()
        whole = decode(data, min_side=75 if level else None).numpy()
        assert whole.shape[1:] == ((115, 75) if name == "turned.jpg" else (75, 115)) if level else True
    source = open_source(str(tmp_path), reading=Reading(tile=64, stride=50, level=level))
    assert not source.problems and f"{len(source)} images" in source.summary
    for index in range(len(source)):
        place = dict(part.split("=") for part in source.name(index).rpartition("#")[2].split(","))
        left, top = int(place["x"]), int(place["y"])
        expected = whole[:, top : top + 64, left : left + 64]
        assert place["level"] == str(level)
        assert np.array_equal(read_image(source, index).numpy(), expected)


def test_tiles_have_the_class_and_the_group_of_their_file(tmp_path):
    for folder, names in (("cat", ("a.tif", "b.png")), ("dog", ("c.jpg",))):
        (tmp_path / folder).mkdir()
        for name in names:
            write(tmp_path / folder / name, picture(100, 164))
    source = open_source(str(tmp_path), reading=Reading(tile=64))
    tiles = 2 * 3
    assert source.labels == ["cat"] * 2 * tiles + ["dog"] * tiles
    assert source.groups().tolist() == [0] * tiles + [1] * tiles + [2] * tiles
    other = open_source(str(tmp_path), reading=Reading(tile=64, stride=32))
    assert other.fingerprint() != source.fingerprint()
    assert open_source(str(tmp_path), reading=Reading(tile=64)).fingerprint() == source.fingerprint()


def test_tiles_of_a_tar_are_those_of_its_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.tif", "c.jpg", "d.png", "e.npy"):
        write(folder / name, picture(100, 164))
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    folder_source, tar_source = (open_source(str(path), reading=TILES) for path in (folder, tmp_path / "images.tar"))
    assert len(tar_source) == len(folder_source) > 0
    for index in range(len(tar_source)):
        assert tar_source.name(index).rpartition("/")[2] == folder_source.name(index).rpartition("/")[2]
        assert read_image(tar_source, index).equal(read_image(folder_source, index))


def test_a_picture_is_decoded_once_for_all_its_tiles(tmp_path, monkeypatch):
    write(tmp_path / "d.png", picture(300, 300))
    source = open_source(str(tmp_path), reading=Reading(tile=64))
    calls = []
    monkeypatch.setattr(cut, "decode", lambda *args, **options: calls.append(1) or decode(*args, **options))
    cut._pictures.clear()
    for index in range(len(source)):
        read_image(source, index)
    assert len(calls) == 1


def test_blank_tiles_are_no_images_and_blank_pictures_are_listed(tmp_path):
    image = picture(128, 192)
    image[:64, :64] = 250
    write(tmp_path / "a.png", image)
    write(tmp_path / "b.tif", np.full((128, 128, 3), 9, np.uint8))
    source = open_source(str(tmp_path), reading=Reading(tile=64))
    assert [source.name(index).rpartition("#")[2] for index in range(len(source))] == [
        f"level=0,x={x},y={y}" for x, y in ((64, 0), (128, 0), (0, 64), (64, 64), (128, 64))
    ]
    ((name, reason),) = source.problems
    assert name.endswith("b.tif") and "blank" in reason


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_tiles_of_12_bits_in_16_are_not_blank(tmp_path, suffix):
    values = np.full((128, 192), 300, np.uint16)
    values[:64] += np.random.default_rng(0).integers(0, 900, (64, 192), dtype=np.uint16)
    if suffix == ".npy":
        np.save(tmp_path / "a.npy", values)
    else:
        Image.fromarray(values).save(tmp_path / f"a{suffix}")
    source = measure_intensity(open_source(str(tmp_path), reading=Reading(tile=64)), channels=3)
    assert [source.name(index).rpartition("#")[2] for index in range(len(source))] == [
        f"level=0,x={x},y=0" for x in (0, 64, 128)
    ]
    ((low, high),) = source.reading.intensity.ranges
    # of PNGs the whole picture is measured, of others the tiles
    assert low == pytest.approx(300, abs=10) and high == pytest.approx(1195, abs=10)
    expected = map_range(values[:64, 64:128], low, high)
    assert np.array_equal(read_image(source, 1).numpy(), np.stack([expected] * 3))


def test_triage_takes_tiles_as_images(tmp_path):
    image = picture(128, 128)
    image[64:, 64:] = image[:64, :64]
    write(tmp_path / "a.tif", image)
    verdict = triage(open_source(str(tmp_path), reading=Reading(tile=64)))
    assert verdict.counts["images"] == 4 and list(verdict.left_out) == [3]


def test_gray_and_four_channels_of_tiles(tmp_path):
    image = np.dstack([picture(80, 80), picture(80, 80)[..., :1]])
    from large_files import tifffile

    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extrasamples=["unassalpha"], metadata=None)
    source = open_source(str(tmp_path), reading=Reading(tile=64, stride=16))
    window = np.moveaxis(image[:64, :64], -1, 0)
    assert np.array_equal(read_image(source, 0, channels=4).numpy(), window)
    assert np.array_equal(read_image(source, 0, channels=3).numpy(), window[:3])
    gray = np.asarray(Image.fromarray(image[:64, :64, :3].copy()).convert("L"))
    assert np.array_equal(read_image(source, 0, channels=1).numpy()[0], gray)


def test_a_slide_that_is_too_large_is_refused_with_the_cure(tmp_path):
    write_sparse(tmp_path / "a.svs", 20_000, {}, description="Aperio Image Library v1\r\n|MPP = 0.5")
    with pytest.raises(DataError) as error:
        open_source(str(tmp_path))
    assert "20000 x 20000 pixels" in str(error.value) and "--tiles 224" in str(error.value)


@pytest.mark.parametrize("name", ["a.png", "b.tif"])
def test_a_photograph_that_is_too_large_is_refused_with_the_cure(tmp_path, name):
    write(tmp_path / name, picture(30, 30))
    with pytest.raises(BadImage, match="--tiles 224"):
        decode((tmp_path / name).read_bytes(), max_pixels=100)


def test_files_that_do_not_say_their_scale_are_listed(tmp_path):
    write(tmp_path / "a.svs", picture(150, 230))  # 0.499 micrometers per pixel
    write(tmp_path / "b.png", picture(150, 230))
    source = open_source(str(tmp_path), reading=Reading(tile=64, mpp=1.0))
    ((name, reason),) = source.problems
    assert name.endswith("b.png") and "--level" in reason
    assert read_image(source, 0).shape == (3, 64, 64)
