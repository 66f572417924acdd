"""What a listing says it found, used and left out; and its bounds: depth, patterns, pipes, holes, odd names."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import contents, reasons, write_tar, write_tree

from upstep_fast.data.decode.image import decode
from upstep_fast.data.formats.kinds import NO_READER
from upstep_fast.data.formats.kinds import PHOTOGRAPHS as SUFFIXES
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import DataError


def test_files_of_other_kinds_are_counted(tmp_path):
    others = ["a.heic", "b.HEIC", "c.heif", "d/e.txt", "f.tar", "README", "g.averylongsuffix"]
    tree = dict.fromkeys(["1.jpg", "d/2.jfif", *others, ".hidden.txt"], b"x")
    words = {"2 .heic (no reader)", "1 .heif (no reader)", "1 .txt", "1 .tar", "2 without a suffix"}
    for source in (open_source(write_tree(tmp_path / "f", tree)), open_source(write_tar(tmp_path / "f.tar", tree))):
        found, left_out = source.summary.split("; left out: ")
        assert found == "2 images (1 .jpg, 1 .jfif)" and set(left_out.split(", ")) == words


def test_pictures_that_nothing_reads_are_named_with_the_cure(tmp_path):
    for suffix in (".exr", ".hdr", ".pfm", ".nc", ".bil", ".mrc", ".nrrd", ".dng", ".heic", ".vrt", ".ecw", ".h5"):
        root = write_tree(tmp_path / suffix[1:], {f"x{suffix}": b"x"})
        with pytest.raises(DataError) as error:
            open_source(root)
        assert f"1 {suffix}" in str(error.value) and NO_READER[suffix] in str(error.value)
        assert "\n" not in str(error.value)


def test_many_kinds_are_summed_up(tmp_path):
    tree = {f"{i}.k{i}": b"" for i in range(12)}
    summary = open_source(write_tree(tmp_path, tree | {"1.jpg": b"x"})).summary
    assert summary.startswith("1 image; left out: ") and summary.endswith("4 of other kinds")


# what Pillow writes under each name that folders are searched for
FORMATS = {".jpe": "JPEG", ".jfif": "JPEG", ".apng": "PNG", ".pnm": "PPM", ".pbm": "PPM", ".pgm": "PPM", ".ppm": "PPM"}


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".npy"])
def test_every_kind_that_is_listed_is_decoded(tmp_path, suffix):
    pixels = np.full((8, 8, 3), 255, np.uint8)
    pixels[:, :4] = 0
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    file = io.BytesIO()
    kind = FORMATS.get(suffix) or Image.registered_extensions()[suffix]
    Image.fromarray(pixels).convert(mode).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    source = open_source(write_tree(tmp_path, {f"x{suffix}": file.getvalue()}))
    assert np.abs(decode(source.read(0)).permute(1, 2, 0).numpy().astype(int) - pixels).max() <= 4


def test_features_that_embed_wrote_are_no_images(tmp_path):
    root = write_tree(tmp_path, {"1.jpg": b"x", "features.txt": b"1.jpg\n", "gray.txt": b"a caption"})
    np.save(root / "features.npy", np.zeros((1, 8), np.float32))
    np.save(root / "gray.npy", np.zeros((8, 8), np.uint8))
    np.save(root / "other.npy", np.zeros((8, 8), np.uint8))
    source = open_source(root)
    assert len(source) == 3 and reasons(source) == {"features.npy": "features that embed has written, no image"}


# the same file twice


def twice(root):
    yield [root, root / "train"]
    yield [root / "train", root]
    yield [root / "train", root / "train" / "a" / "1.jpg"]
    yield [root / "train" / "a" / "1.jpg", root / "train"]
    yield [root / "train", root / "all.txt"]
    yield [root / "all.txt", root / "train"]
    yield [root / "all.txt", root / "train" / "a" / "1.jpg"]
    yield [root / "train", root / "link"]
    yield [root / "train", f"{root}/train/*/1.jpg"]


@pytest.mark.parametrize("case", range(9))
def test_the_same_file_twice_counts_once(tmp_path, case):
    root = write_tree(tmp_path / "root", {f"train/{c}/{i}.jpg": f"{c}{i}".encode() for c in "ab" for i in range(2)})
    (root / "all.txt").write_text("".join(f"train/{c}/{i}.jpg\n" for c in "ab" for i in range(2)))
    (root / "link").symlink_to(root / "train" / "a")
    paths = list(twice(root))[case]
    source = open_source(paths)
    assert sorted(contents(source)) == [b"a0", b"a1", b"b0", b"b1"]
    assert source.problems and all("already listed" in reason for _, reason in source.problems)


def test_the_same_tar_or_dataset_twice_counts_once(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": b"1", "2.jpg": b"2"})
    source = open_source([path, path, f"{tmp_path}/*.tar"])
    assert len(source) == 2 and len(source.problems) == 2
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b"1", "path": None}]})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "set"))
    assert len(open_source([f"hf:{tmp_path / 'set'}"] * 2)) == 1


# the cure for what is no folder of images


@pytest.mark.parametrize(
    ("tree", "path", "cure"),
    [
        ({"a/state.json": b"{}", "a/data.arrow": b"x"}, "a", "give the folder as --data hf:{root}/a"),
        ({"a/x.parquet": b"PAR1"}, "a", "give the folder as --data hf:{root}/a"),
        ({"a/x.parquet": b"PAR1"}, "a/x.parquet", "give it as --data hf:{root}/a/x.parquet"),
        ({"a/train/0.tar": b"x"}, "a", "give its tars as --data '{root}/a/train/*.tar'"),
        ({"a/b.csv": b"path\n"}, "a", "give the list itself: --data {root}/a/b.csv"),
        ({"m.jsonl": b"{}"}, "m.jsonl", "write a CSV with the columns path,label"),
        ({"a.zip": b"PK"}, "a.zip", "is no zip file, or is cut off (File is not a zip file); copy it again"),
        ({"a/1.zip": b"PK"}, "a", "give its zips as --data '{root}/a/*.zip'"),
        ({"a.7z": b"7z"}, "a.7z", "unpack it and give the folder"),
        ({"a.tar.gz": b"x"}, "a.tar.gz", "decompress it"),
        ({"a.heic": b"x"}, "a.heic", "nothing here reads this kind; convert it to JPEG or PNG"),
        ({"a/1.heic": b"x"}, "a", "1 .heic (no reader); nothing here reads this kind; convert it to JPEG or PNG"),
        ({"a.dat": b"x" * 600}, "a.dat", "not a tar file"),
    ],
)
def test_what_is_no_folder_of_images_names_the_cure(tmp_path, tree, path, cure):
    write_tree(tmp_path, tree)
    with pytest.raises(DataError) as error:
        open_source(tmp_path / path)
    assert cure.format(root=tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_each_suffix_is_counted(tmp_path):
    names = ["a.JPG", "b.c.jpg", "d.png", "e/f.nii.gz.png", "g.Ab.tif", "x/y.heic", "z"]
    source = open_source(write_tree(tmp_path, dict.fromkeys(names, b"x")))
    assert source.summary == "5 images (2 .jpg, 2 .png, 1 .tif); left out: 1 without a suffix, 1 .heic (no reader)"


@pytest.mark.parametrize(
    ("names", "count", "example"),
    [
        (["images/1.jpg", "images/2.jpg", "masks/1.png"], 1, "masks/1.png"),
        (["a/1.jpg", "a/1_mask.png", "a/2.jpg", "a/2-Seg.PNG"], 2, "a/1_mask.png"),
        (["x/1.jpg", "x/Thumbs/1.jpg"], 1, "x/Thumbs/1.jpg"),
        (["with_mask/1.jpg", "without_mask/2.jpg", "massage/3.jpg"], 0, ""),
        (["masks/1.png", "masks/2.png"], 0, ""),
    ],
)
def test_files_named_like_masks_are_said(tmp_path, names, count, example):
    tree = dict.fromkeys(names, b"x")
    for source in (open_source(write_tree(tmp_path / "f", tree)), open_source(write_tar(tmp_path / "f.tar", tree))):
        said = f"; {count} files are named like masks or thumbnails ({example}) and are read; move them if they are"
        assert len(source) == len(names) and (said in source.summary) is (count > 0)
        assert count or "masks or" not in source.summary


# bounds


@pytest.mark.parametrize(
    "pattern", ["s-{0..99999999}.tar", "{a,b}" * 40, "{0..999}{0..999}", "{1..999999999999999999}"]
)
def test_a_pattern_of_too_many_names(tmp_path, pattern):
    start = time.perf_counter()
    with pytest.raises(DataError, match="names, more than 100,000; give a narrower pattern"):
        open_source(tmp_path / pattern)
    assert time.perf_counter() - start < 20  # the names are counted, not made


def test_braces_expand_as_in_a_shell(tmp_path):
    for name in ("s-08", "s-09", "s-10", "t-08"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.jpg": name.encode()})
    assert contents(open_source(tmp_path / "s-{08..10}.tar")) == [b"s-08", b"s-09", b"s-10"]
    assert contents(open_source(tmp_path / "{t,s}-{08..08}.tar")) == [b"t-08", b"s-08"]


def test_folders_deeper_than_the_stack(tmp_path):
    place, depth = os.open(tmp_path, os.O_RDONLY), 1500
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=place)
            below = os.open("d", os.O_RDONLY, dir_fd=place)
            os.close(place)
            place = below
        os.close(os.open("1.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=place))
        source = open_source(tmp_path)
        assert len(source) == 1 and source.name(0).count("/d") >= depth and source.labels == ["d"]
    finally:
        os.close(place)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # too deep for pytest's own rmtree


@pytest.mark.parametrize("name", ["x.tar", "x.txt", "x.csv", "x.jpg"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    if name == "x.jpg":
        with pytest.raises(OSError, match="not a regular file"):
            open_source(tmp_path / name).read(0)
    else:
        with pytest.raises(DataError, match="is a named pipe, not a regular file"):
            open_source(tmp_path / name)


def test_holes_are_not_read(tmp_path):
    """Forty members of a gigabyte each in a file of a few kB; the small one among them is read."""
    path = tmp_path / "holes.tar"
    sizes = [3] + [1 << 30] * 40
    with open(path, "wb") as file:
        for i, size in enumerate(sizes):
            member = tarfile.TarInfo(f"{i:02d}.jpg")
            member.size = size
            file.write(member.tobuf(tarfile.GNU_FORMAT) + b"abc")
            file.seek(-(-size // 512) * 512 - 3, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    if os.stat(path).st_blocks * 512 > 1 << 20:
        pytest.skip("this file system stores holes")
    source = open_source(path)
    assert len(source) == 41 and source.read(0) == b"abc"
    with pytest.raises(OSError, match="bytes of holes"):
        source.read(1)
    with open(tmp_path / "holes.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(1 << 30)
    with pytest.raises(OSError, match="bytes of holes"):
        open_source(tmp_path / "holes.jpg").read(0)


def test_names_keep_what_other_tools_find_files_by(tmp_path):
    names = ["\u0645\u06cc\u200c\u062e.jpg", "👩\u200d🎨.jpg", "a\u00a0b.jpg", "back\\slash.jpg", "a\nb.jpg"]
    source = open_source(write_tree(tmp_path, dict.fromkeys(names, b"x")))
    assert {source.name(i) for i in range(5)} == {str(tmp_path / name) for name in names}


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"of": 1}', "null", '{"found": {}}'])
@pytest.mark.parametrize("name", ["triage.json", "statistics.json"])
def test_damaged_results_of_a_survey_are_made_again(tmp_path, name, text, caplog):
    check_survey(tmp_path, name, lambda path, good: path.write_text(text), caplog)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("triage.json", '"left_out": {}', '"left_out": {"999": "x"}'),
        ("triage.json", '"left_out": {}', '"left_out": {"-1": "x"}'),
        ("triage.json", '"images": 4', '"images": 1e999'),
        ("triage.json", '"images": 4', '"images": 5'),
        ("triage.json", '"blank": 0,', ""),
        ("statistics.json", '"std"', '"other"'),
        ("statistics.json", '"mean": [', '"mean": [NaN, 0.1, 0.2], "old": ['),
        ("statistics.json", '"std": [', '"std": [Infinity, 0.1, 0.2], "old": ['),
        ("statistics.json", '"std": [', '"std": [0, 0.1, 0.2], "old": ['),
    ],
)
def test_wrong_values_in_a_survey_are_made_again(tmp_path, name, old, new, caplog):
    def damage(path: Path, good: str) -> None:
        assert old in good
        path.write_text(good.replace(old, new))

    check_survey(tmp_path, name, damage, caplog)


def test_a_pipe_in_place_of_a_survey_is_not_waited_for(tmp_path, caplog):
    def pipe(path: Path, good: str) -> None:
        path.unlink()
        os.mkfifo(path)

    check_survey(tmp_path, "triage.json", pipe, caplog)
    assert "is a named pipe" in caplog.text


def check_survey(tmp_path, name, damage, caplog):
    from upstep_fast.data.curation.survey import survey

    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    out.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(photos / f"{i}.png")
    run = {"triage.json": (True, False), "statistics.json": (False, True)}[name]

    def result():
        options = {"run_triage": run[0], "measure_statistics": run[1]}
        return survey(open_source(photos), out, **options, channels=3, num_workers=0, max_bad_fraction=0.5)

    good = result()
    (out / name).write_bytes(good.files[name])
    assert result().files == good.files
    damage(out / name, good.files[name].decode())
    with caplog.at_level("WARNING", "upstep_fast"):
        again = result()
    assert again.files == good.files and again.statistics == good.statistics and len(again.source) == 4
    is_of_others = (out / name).is_file() and '{"of": 1}' in (out / name).read_text()
    assert is_of_others or f"{name} is damaged and is made again" in caplog.text
