"""Zip files: read as the folder that they were made from, and what is refused in them."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

import pytest

from tests.helpers.trees import write_tree
from upstep_fast.data.sources import open_source
from upstep_fast.errors import DataError

TREE = {
    "train/b/2.jpg": b"2" * 900,
    "train/b-c/1.jpg": b"1",
    "train/b/sub/9.png": os.urandom(300),
    "train/a/x.y.z.jpg": b"xyz",
    "test/a/ü \u4e2d.jpg": b"u",
    "test/.hidden/a.jpg": b"h",
    "test/b/notes.txt": b"n",
    "test/b/inner.zip": b"PK",
}


def make_zip(path: Path, tree: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("split", [None, "train", "test"])
def test_a_zip_is_its_folder(tmp_path, method, split):
    folder = open_source(write_tree(tmp_path / "in", TREE), split)
    path = make_zip(tmp_path / "in.zip", TREE, method)
    assert [open_source(path, split).name(i) for i in range(len(folder))] == [
        folder.name(i).replace(f"{tmp_path}/in/", f"{path}/") for i in range(len(folder))
    ]
    source = open_source(path, split)
    assert len(source) == len(folder) and source.labels == folder.labels
    assert [source.read(i) for i in range(len(source))] == [folder.read(i) for i in range(len(folder))]
    assert source.sizes().tolist() == folder.sizes().tolist()
    assert source.summary == folder.summary.replace(f"{tmp_path}/in", str(path))
    assert source.fingerprint() == folder.fingerprint()


def test_shards_are_one_tree(tmp_path):
    make_zip(tmp_path / "0.zip", {"train/a/1.jpg": b"1"})
    make_zip(tmp_path / "1.zip", {"test/a/2.jpg": b"2"})
    sources = [open_source(tmp_path / "*.zip", split) for split in ("train", "test")]
    assert [source.read(0) for source in sources] == [b"1", b"2"] and sources[0].labels == ["a"]


class RawName(zipfile.ZipInfo):
    """Member whose name is written as these bytes."""

    raw = b""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.raw, 0


def test_names_of_other_systems(tmp_path):
    """Code page 437 and backslashes of DOS, bytes of Unix as they are: unzip gives the same files."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, system, data in (
            (b"d\\\x81.jpg", 0, b"dos"),
            (b"u/\xff.jpg", 3, b"unix"),
            (b"u/\xc3\xbc.jpg", 3, b"utf-8"),
        ):
            member = RawName("placeholder")
            member.filename = member.orig_filename = name.decode("cp437")
            member.create_system = system
            member.raw = name
            archive.writestr(member, data)
    source = open_source(tmp_path / "x.zip")
    assert {source.name(i).removeprefix(f"{tmp_path}/x.zip/"): source.read(i) for i in range(3)} == {
        "d/ü.jpg": b"dos",
        "u/\\xff.jpg": b"unix",
        "u/ü.jpg": b"utf-8",
    }
    assert source.labels == ["d", "u", "u"]


def with_member(path: Path, name: str, data: bytes = b"x", **fields: object) -> Path:
    """Write a zip of a good image and another member; fields: of its directory entry."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.jpg", b"good")
        method = fields.pop("method", zipfile.ZIP_STORED)
        archive.writestr(name, data, method)
        for field, value in fields.items():
            setattr(archive.filelist[-1], field, value)
    return path


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("../a.jpg", {}, "its name leads out of the archive"),
        ("/a.jpg", {}, "its name leads out of the archive"),
        ("a.jpg", {"flag_bits": 1}, "encrypted; unpack the zip file"),
        ("a.jpg", {"method": zipfile.ZIP_BZIP2}, "compressed by bzip2"),
        ("a.jpg", {"method": zipfile.ZIP_LZMA}, "compressed by LZMA"),
        ("a.jpg", {"file_size": 1 << 31, "compress_type": 8}, "above the limit"),
        ("a.jpg", {"file_size": 1 << 29, "compress_type": 8}, "no image is as empty as that"),
        ("a.jpg", {"file_size": 5}, "stored, with 1 bytes for 5"),
        ("a.jpg", {"compress_size": 1 << 20, "file_size": 1 << 20}, "beyond the end"),
        ("a.jpg", {"external_attr": (stat.S_IFLNK | 0o777) << 16, "create_system": 3}, "symbolic link"),
        ("good.jpg", {}, "replaced by a later member"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_are_left_out(tmp_path, name, fields, reason):
    source = open_source(with_member(tmp_path / "x.zip", name, **fields))
    assert len(source) == 1 and len(source.problems) == 1 and reason in source.problems[0][1]
    assert source.read(0) == (b"x" if name == "good.jpg" else b"good")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"file_size": 999}, "1000 of 999 bytes"),  # more is in it than was declared
        ({"file_size": 2001}, "2000 of 2001 bytes"),
        ({"CRC": 1}, "checksum"),
        ({"header_offset": 3}, "header in the zip file is damaged"),
    ],
)
def test_a_damaged_member_is_a_bad_image(tmp_path, fields, reason):
    path = with_member(tmp_path / "x.zip", "a.jpg", b"y" * 2000, method=zipfile.ZIP_DEFLATED, **fields)
    with pytest.raises(OSError, match=reason):
        open_source(path).read(0)


@pytest.mark.parametrize("keep", [0, 10, -30])
def test_a_zip_that_is_cut_off(tmp_path, keep):
    path = make_zip(tmp_path / "x.zip", TREE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.zip is no zip file, or is cut off \(.*\); copy it again"):
        open_source(path)


def test_a_member_is_read_without_the_others(tmp_path, monkeypatch):
    """By offset: the bytes read are those of the member and its header."""
    path = make_zip(tmp_path / "x.zip", {f"{i:04}.png": os.urandom(5000) for i in range(50)}, zipfile.ZIP_STORED)
    source, sizes = open_source(path), []
    from upstep_fast.data.sources import zip_files

    real = zip_files.read_image_file
    monkeypatch.setattr(zip_files, "read_image_file", lambda p, o, s: (sizes.append(s), real(p, o, s))[1])
    assert len(source.read(30)) == 5000 and sum(sizes) == 5030
