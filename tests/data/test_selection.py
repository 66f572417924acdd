"""Lists that `curate --apply` writes: any name that a source has goes out and comes back, with its class and split."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest

from upstep_fast.config.reading import Reading
from upstep_fast.data.sources.selection import HEADER, is_selection, selection_text
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import DataError, NoTestPartError

ODD = (
    *("a b.png", " lead.png", "trail .png", "'q\".png", '"both".png', "#hash.png", "new\nline.png", "cr\rx.png"),
    *("tab\t.png", "\u2028sep.png", "\x1b[2J.png", "ünï.png", "scan.nii.gz#z=12.png", "a,b.png", "%s{0}.png"),
    os.fsdecode(b"\xff\xfe.png"),
)


@pytest.fixture
def odd(photos, tmp_path):
    folder = tmp_path / "in here"
    folder.mkdir()
    for i, name in enumerate(ODD):
        shutil.copy(photos / f"{i:02}.png", folder / name)
    return folder


def packed(kind, folder, to):
    if kind == "folder":
        return folder
    files = sorted(folder.rglob("*.png"))
    if kind == "tar":
        with tarfile.open(to / "x.tar", "w") as tar:
            for file in files:
                tar.add(file, file.relative_to(folder))
        return to / "x.tar"
    with zipfile.ZipFile(to / "x.zip", "w") as archive:
        for file in files:
            archive.writestr(str(file.relative_to(folder)).encode("utf-8", "replace").decode(), file.read_bytes())
    return to / "x.zip"


def names_of(source):
    return [source.name(i) for i in range(len(source))]


def written(path, source_path, names):
    path.write_bytes(selection_text([str(source_path)], names))
    return path


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_every_name_comes_back_with_its_bytes(odd, tmp_path, kind):
    path = packed(kind, odd, tmp_path)
    source = open_source(path)
    assert len(source) == len(ODD)
    indices = range(0, len(source), 2)
    found = open_source(written(tmp_path / "keep.txt", path, [source.name(i) for i in indices]))
    assert names_of(found) == [source.name(i) for i in indices]
    assert [found.read(i) for i in range(len(found))] == [source.read(i) for i in indices]
    assert [found.digest(i) for i in range(len(found))] == [source.digest(i) for i in indices]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_classes_and_splits_stay(photos, tmp_path, kind):
    files = sorted(photos.iterdir())
    for i, file in enumerate(files):
        to = tmp_path / "tree" / ("train", "test")[i % 4 == 0] / "ab"[i % 2]
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    path = packed(kind, tmp_path / "tree", tmp_path)
    whole = open_source(path)
    keep = written(tmp_path / "keep.txt", path, names_of(whole)[1::2])
    for split in (None, "train", "test"):
        source, found = open_source(path, split), open_source(keep, split)
        chosen = [i for i, name in enumerate(names_of(source)) if name in set(names_of(whole)[1::2])]
        assert names_of(found) == [source.name(i) for i in chosen]
        assert found.labels == [source.labels[i] for i in chosen]


def test_pictures_of_a_file_are_chosen_one_by_one(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
    reading = Reading(tile=32, stride=32)
    source = open_source(tmp_path / "x.npy", reading=reading)
    assert len(source) == 6 and "#" in source.name(2)
    keep = written(tmp_path / "keep.txt", tmp_path / "x.npy", names_of(source)[2:5])
    found = open_source(keep, reading=reading)
    assert names_of(found) == names_of(source)[2:5] and found.groups().tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=r"none of the 3 images .* give the flags of reading \(--tiles, --slice\)"):
        open_source(keep)


def test_images_that_are_gone_are_named_and_new_ones_are_not_read(odd, tmp_path):
    names = names_of(open_source(odd))
    keep = written(tmp_path / "keep.txt", odd, names[:4])
    os.remove(names[0])
    shutil.copy(names[5], odd / "new.png")
    found = open_source(keep)
    assert names_of(found) == names[1:4]
    assert found.problems == ((names[0], f"listed in {keep}, but not there any more"),)


def test_it_can_stand_beside_other_data(odd, photos, tmp_path):
    keep = written(tmp_path / "keep.txt", odd, names_of(open_source(odd))[:3])
    assert len(open_source([keep, photos])) == 27


def test_data_without_a_test_part_has_none_in_the_list(photos, tmp_path):
    keep = written(tmp_path / "keep.txt", photos, names_of(open_source(photos)))
    with pytest.raises(NoTestPartError):
        open_source(keep, "test")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "is damaged"),
        (b"[]", "names no data"),
        (b"[3]", "names no data"),
        (b"[" * 100_000, "is damaged"),
        (b'["/none/such"]\n/none/such/a.png', "/none/such"),
        (b'["SELF"]\n"a', "is damaged"),
        (b'["SELF"]\na.png', "names another such list"),
    ],
)
def test_a_damaged_list_is_one_line(tmp_path, text, said):
    path = tmp_path / "keep.txt"
    path.write_bytes(HEADER + text.replace(b"SELF", os.fsencode(path)))
    with pytest.raises(DataError, match=said) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_other_lists_are_none(tmp_path, photos):
    (tmp_path / "plain.txt").write_text(f"#upstep_fast\n{photos}/00.png\n")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    assert not any(is_selection(str(tmp_path / name)) for name in ("plain.txt", "folder.txt", "pipe.txt", "none.txt"))
    assert len(open_source(tmp_path / "plain.txt")) == 1


def test_without_its_first_line_it_is_a_plain_list_of_files(photos, tmp_path):
    keep = written(tmp_path / "keep.txt", photos, names_of(open_source(photos))[:5])
    keep.write_bytes(keep.read_bytes().partition(b"\n")[2])
    assert len(open_source(keep)) == 5
