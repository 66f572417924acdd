"""Sources: folders, lists, tar files; faults I5 and I6 of RELIABILITY. Python's tarfile writes the tars."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from trees import contents, reasons, write_tar, write_tree

from upstep_fast.data.sources.source import open_source
from upstep_fast.data.sources.tar_index import read_index
from upstep_fast.errors import DataError

TREE = {
    "train/cat/1.jpg": b"cat one",
    "train/cat/2.PNG": b"cat two",
    "train/dog/deep/er/3.webp": b"dog three",
    "test/cat/4.jpg": b"cat four",
    "test/dog/5.tiff": b"dog five",
}


@pytest.fixture(params=["folder", "tar"])
def tree(request, tmp_path) -> Path:
    if request.param == "folder":
        return write_tree(tmp_path / "data", TREE)
    return write_tar(tmp_path / "data.tar", TREE)


def test_splits_and_labels(tree):
    train, test, everything = (open_source(tree, split) for split in ("train", "test", None))
    assert contents(train) == [b"cat one", b"cat two", b"dog three"]
    assert train.labels == ["cat", "cat", "dog"]
    assert contents(test) == [b"cat four", b"dog five"] and test.labels == ["cat", "dog"]
    assert len(everything) == 5 and everything.labels == ["cat", "dog", "cat", "cat", "dog"]
    assert train.name(0) == f"{tree}/train/cat/1.jpg"
    assert train.problems == ()


def test_without_both_splits_train_is_everything(tmp_path):
    # a class may be called train: without test/ beside it, it is a class
    root = write_tree(tmp_path / "traffic", {"bus/1.jpg": b"1", "train/2.jpg": b"2"})
    assert open_source(root, "train").labels == ["bus", "train"]
    with pytest.raises(DataError, match=r"no test images in .*train/CLASS"):
        open_source(root, "test")


def test_labels_are_none_unless_all_images_lie_in_class_folders(tmp_path):
    root = write_tree(tmp_path / "a", {"cat/1.jpg": b"1", "2.jpg": b"2"})
    assert open_source(root).labels is None
    other = write_tree(tmp_path / "b", {**TREE, "extra/6.jpg": b"6"})
    assert open_source(other).labels is None
    assert open_source(other, "train").labels == ["cat", "cat", "dog"]


def test_a_folder_and_its_tar_have_the_same_order(tmp_path):
    names = ["a/1.jpg", "a-b/1.jpg", "a.jpg", "a/b/1.jpg", "a b.jpg", "B/1.jpg", "ä/1.jpg", "a/10.jpg", "a/9.jpg"]
    tree = {name: name.encode() for name in reversed(names)}
    folder, tar = write_tree(tmp_path / "f", tree), write_tar(tmp_path / "f.tar", tree)
    assert contents(open_source(folder)) == contents(open_source(tar))
    assert contents(open_source(folder)) == sorted(tree.values(), key=lambda name: name.split(b"/"))


def test_several_paths_are_joined(tmp_path):
    a = write_tree(tmp_path / "a", {"x/1.jpg": b"1"})
    b = write_tar(tmp_path / "b.tar", {"y/2.jpg": b"2"})
    one = write_tree(tmp_path, {"single.png": b"3"}) / "single.png"
    source = open_source([a, str(b), one])
    assert contents(source) == [b"1", b"2", b"3"] and source.labels is None
    assert open_source([a, b]).labels == ["x", "y"]
    with pytest.raises(IndexError):
        source.read(3)


def test_hidden_files_and_other_kinds_are_no_images(tmp_path):
    names = [".DS_Store", "._1.jpg", ".git/2.jpg", "notes.txt", "3.json", "good.jpg"]
    folder = write_tree(tmp_path / "f", dict.fromkeys(names, b"x"))
    assert len(open_source(folder)) == 1
    assert len(open_source(write_tar(tmp_path / "f.tar", dict.fromkeys(names[1:2] + names[3:], b"x")))) == 1


def test_fingerprint_follows_names_and_sizes_not_places(tmp_path):
    tree = {"a/1.jpg": b"one", "a/2.jpg": b"two"}
    first = open_source(write_tree(tmp_path / "x", tree)).fingerprint()
    assert open_source(write_tree(tmp_path / "moved", tree)).fingerprint() == first
    assert open_source(write_tree(tmp_path / "y", {**tree, "a/2.jpg": b"three"})).fingerprint() != first
    assert open_source(write_tree(tmp_path / "z", {"a/1.jpg": b"one", "b/2.jpg": b"two"})).fingerprint() != first


def test_a_source_can_be_pickled_and_read_by_threads(tree):
    source = pickle.loads(pickle.dumps(open_source(tree)))
    want = contents(source)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: bytes(source.read(i % 5)), range(500))) == want * 100


# what can be wrong with a folder


@pytest.mark.parametrize(
    "path", ["nothing", "none-*.tar", "none-{000..003}.tar", "ftp://example.org/a.tar", "pipe:cat a"]
)
def test_a_path_that_is_not_there(tmp_path, path):
    with pytest.raises(DataError) as caught:
        open_source(path if ":" in path else tmp_path / path)
    assert path.split("{")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_folder_names_the_cure(tmp_path):
    with pytest.raises(DataError, match=r"no images in .*\.jpg"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no path given"):
        open_source([])
    with pytest.raises(ValueError, match="split"):
        open_source(tmp_path, "val")


def test_links_dangling_looping_and_shared(tmp_path):
    root = write_tree(tmp_path / "root", {"a/1.jpg": b"1"})
    outside = write_tree(tmp_path / "outside", {"2.jpg": b"2"})
    (root / "b-link").symlink_to(outside)
    (root / "c-again").symlink_to(outside)
    (root / "a" / "loop").symlink_to(root)
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "file-link.jpg").symlink_to(root / "a" / "1.jpg")
    source = open_source(root)
    assert contents(source) == [b"1", b"2", b"1"]
    found = reasons(source)
    assert found["dangling.jpg"] == "a link to nothing" and found["self.jpg"] == "a link to nothing"
    assert "already listed" in found["loop"] and "already listed" in found["c-again"]


def test_links_that_double_at_every_level_end(tmp_path):
    """Thirty folders, each linked twice from the one above: 2^30 paths to one image."""
    below = write_tree(tmp_path / "d30", {"1.jpg": b"1"})
    for level in reversed(range(30)):
        folder = tmp_path / f"d{level}"
        folder.mkdir()
        (folder / "x").symlink_to(below)
        (folder / "y").symlink_to(below)
        below = folder
    assert contents(open_source(below)) == [b"1"]


def test_special_files_are_not_opened(tmp_path):
    root = write_tree(tmp_path / "root", {"1.jpg": b"1"})
    os.mkfifo(root / "pipe.jpg")
    source = open_source(root)
    assert contents(source) == [b"1"] and reasons(source) == {"pipe.jpg": "not a regular file"}
    (root / "1.jpg").unlink()
    os.mkfifo(root / "1.jpg")  # after listing
    with pytest.raises(OSError, match="not a regular file"):
        source.read(0)


def test_an_unreadable_folder_is_counted_or_refused(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "root", {"a/1.jpg": b"1", "locked/2.jpg": b"2"})
    real = os.scandir

    def scandir(path):
        if os.fsdecode(path).rstrip("/").endswith("locked"):  # chmod does not stop root, who runs many CI machines
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = open_source(root)
    assert contents(source) == [b"1"]
    assert reasons(source) == {"locked": "the folder cannot be read: Permission denied"}
    with pytest.raises(DataError, match="cannot read the folder"):
        open_source(root / "locked")


def test_names_that_are_not_utf8(tmp_path):
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    try:
        with open(os.fsencode(root) + b"/cat/\xff\xfe.jpg", "wb") as file:
            file.write(b"1")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_source(root)
    assert contents(source) == [b"1"] and source.labels == ["cat"]
    assert source.name(0).encode() and source.name(0).endswith(r"\xff\xfe.jpg")


def test_a_file_deleted_after_listing_raises_oserror(tmp_path):
    root = write_tree(tmp_path / "root", {"1.jpg": b"1"})
    source = open_source(root)
    (root / "1.jpg").unlink()
    with pytest.raises(OSError):
        source.read(0)
    assert source.fingerprint()


def _many(root: Path, count: int) -> None:
    for folder in range(count // 1000):
        (root / f"class{folder:04d}").mkdir(parents=True)
        for i in range(1000):
            os.close(os.open(root / f"class{folder:04d}" / f"image_{i:08d}.jpg", os.O_CREAT))


def test_ten_thousand_files_take_little_memory(tmp_path):
    _many(tmp_path, 10_000)
    tracemalloc.start()
    source = open_source(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 10_000 and source.labels is not None and len(set(source.labels)) == 10
    assert held / 10_000 < 100, f"{held / 10_000} bytes a file"


@pytest.mark.long
def test_a_million_files_list_in_ten_seconds(tmp_path, record_property):
    _many(tmp_path, 1_000_000)
    start = time.perf_counter()
    source = open_source(tmp_path)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    open_source(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    record_property("files", len(source))
    record_property("list_seconds", round(seconds, 2))
    record_property("list_peak_mb", round(peak / 1e6))
    assert seconds < 10 and peak < 300e6 and len(source) == 1_000_000


# lists


def test_text_lists(tmp_path):
    write_tree(tmp_path, {"images/b.jpg": b"b", "images/a.jpg": b"a"})
    absolute = tmp_path / "images" / "a.jpg"
    text = f"# a remark\nimages/b.jpg\r\n\n{absolute}\nimages/gone.jpg\n"
    (tmp_path / "list.txt").write_text(text)
    source = open_source(tmp_path / "list.txt", "train")
    assert len(source) == 3 and source.read(0) == b"b" and source.read(1) == b"a" and source.labels is None
    with pytest.raises(OSError):
        source.read(2)


def test_csv_lists(tmp_path):
    write_tree(tmp_path, {"a, b.jpg": b"a", "c.jpg": b"c"})
    (tmp_path / "list.csv").write_text('\ufefflabel,path\ncat,"a, b.jpg"\ndog,c.jpg\n')
    source = open_source(tmp_path / "list.csv")
    assert contents(source) == [b"a", b"c"] and source.labels == ["cat", "dog"]
    (tmp_path / "short.csv").write_text("label,path\ncat\n")
    with pytest.raises(DataError, match="line 2: 1 columns"):
        open_source(tmp_path / "short.csv")


def test_bad_lists_name_the_cure(tmp_path):
    (tmp_path / "wrong.txt").write_text("no/such/1.jpg\nno/such/2.jpg\n")
    with pytest.raises(DataError, match="relative to the list's folder"):
        open_source(tmp_path / "wrong.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="names no images"):
        open_source(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match="not a text list"):
        open_source(tmp_path / "binary.txt")


# tar files


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_long_names_and_sizes(tmp_path, format):
    rng = np.random.default_rng(0)
    tree = {f"{'folder' * (12 if i % 2 else 1)}/{i}/ü{i}.jpg": rng.bytes(int(rng.integers(0, 3000))) for i in range(40)}
    if format != tarfile.USTAR_FORMAT:
        tree["d/" * 120 + "n" * 150 + ".jpg"] = b"long"
    path = write_tar(tmp_path / "a.tar", tree, format)
    source = open_source(path)
    assert {source.name(i).removeprefix(f"{path}/"): source.read(i) for i in range(len(source))} == tree
    assert source.problems == ()


def test_dot_slash_names_and_folders(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./", "./train", "./test", "./train/x"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name in ("./train/x/1.jpg", "./test/x/2.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert len(open_source(tmp_path / "a.tar", "train")) == 1


def test_shards_are_one_tree(tmp_path):
    write_tar(tmp_path / "s-000.tar", {"train/a/1.jpg": b"1"})
    write_tar(tmp_path / "s-001.tar", {"train/b/2.jpg": b"2"})
    write_tar(tmp_path / "s-002.tar", {"test/b/3.jpg": b"3"})
    for pattern in ("s-{000..002}.tar", "s-*.tar", "s-00[0-2].tar", "s-{000,001,002}.tar"):
        assert contents(open_source(tmp_path / pattern, "train")) == [b"1", b"2"]
        assert contents(open_source(tmp_path / pattern, "test")) == [b"3"]
    with pytest.raises(DataError, match="s-003"):
        open_source(tmp_path / "s-{000..003}.tar")


def test_webdataset_classes(tmp_path):
    tree = {"000.jpg": b"a", "000.cls": b"7", "000.json": b"{}", "001.left.jpg": b"b", "001.cls": b"3\n"}
    source = open_source(write_tar(tmp_path / "w.tar", tree))
    assert contents(source) == [b"a", b"b"] and source.labels == ["7", "3"]
    assert open_source(write_tar(tmp_path / "v.tar", {**tree, "002.jpg": b"c"})).labels is None


def test_shards_that_webdataset_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=3, verbose=0) as shards:
        for i in range(8):
            shards.write({"__key__": f"{i:04d}", "jpg": bytes([i]) * (i + 1), "cls": i % 2})
    source = open_source(tmp_path / "s-{000..002}.tar")
    assert contents(source) == [bytes([i]) * (i + 1) for i in range(8)]
    assert source.labels == [str(i % 2) for i in range(8)]


def test_only_regular_members_inside_the_archive_are_read(tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../up.jpg", "/etc/absolute.jpg", "a/../../up2.jpg", "good.jpg", "twice.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        kinds = {
            "link": tarfile.SYMTYPE,
            "hard": tarfile.LNKTYPE,
            "char": tarfile.CHRTYPE,
            "block": tarfile.BLKTYPE,
            "fifo": b"6",
        }
        for name, kind in kinds.items():
            member = tarfile.TarInfo(f"{name}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        again = tarfile.TarInfo("twice.jpg")
        again.size = 5
        tar.addfile(again, io.BytesIO(b"later"))
    before = {p for p in tmp_path.rglob("*")}
    source = open_source(path)
    assert contents(source) == [b"abc", b"later"]
    found = reasons(source)
    assert found["up.jpg"] == found["absolute.jpg"] == found["up2.jpg"] == "its name leads out of the archive"
    assert found["link.jpg"] == "symbolic link, not a regular file"
    assert {"hard.jpg", "char.jpg", "block.jpg", "fifo.jpg"} <= set(found)
    assert found["twice.jpg"] == "replaced by a later member of that name"
    assert {p for p in tmp_path.rglob("*")} == before, "something was extracted"


def test_a_terabyte_member_and_a_sparse_one(tmp_path):
    path = tmp_path / "huge.tar"
    good = tarfile.TarInfo("good.jpg")
    good.size = 3
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 1 << 40
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    block = b"abc" + b"\0" * 509
    pieces = [good.tobuf(tarfile.GNU_FORMAT), block, sparse.tobuf(tarfile.GNU_FORMAT), block]
    pieces += [good.tobuf(tarfile.GNU_FORMAT).replace(b"good", b"more"), block]
    # the changed name needs its checksum anew
    more = tarfile.TarInfo("more.jpg")
    more.size = 3
    pieces[4] = more.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(b"".join(pieces) + huge.tobuf(tarfile.GNU_FORMAT) + block)
    source = open_source(path)
    assert contents(source) == [b"abc", b"abc"]
    assert "sparse" in reasons(source)["sparse.jpg"] and "cut off" in reasons(source)["huge.jpg"]


@pytest.mark.parametrize(("kind", "size"), [(tarfile.GNUTYPE_LONGNAME, 1 << 31), (tarfile.XHDTYPE, -512), (b"0", -512)])
def test_a_header_of_an_absurd_size_ends_the_index(tmp_path, kind, size):
    """A long name of 2 GB is not read into memory, and a negative size does not lead backwards."""
    whole = write_tar(tmp_path / "a.tar", {"good.jpg": b"abc"}, tarfile.GNU_FORMAT).read_bytes()[:1024]
    absurd = tarfile.TarInfo("absurd.jpg")
    absurd.type, absurd.size = kind, size
    with open(tmp_path / "b.tar", "wb") as file:
        file.write(whole + absurd.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 32)  # sparse on disk
    source = open_source(tmp_path / "b.tar")
    assert contents(source) == [b"abc"]
    assert [reason for _, reason in source.problems] == [
        "tar header of an absurd size; the rest of the file is not read"
    ]


def test_truncated_and_damaged_tars_keep_what_is_whole(tmp_path):
    whole = write_tar(
        tmp_path / "a.tar", {f"{i}.jpg": bytes([i]) * 700 for i in range(10)}, tarfile.USTAR_FORMAT
    ).read_bytes()
    each = 512 + 1024
    for length in (each * 4 + 100, each * 4 + 512 + 300, each * 4, each * 4 + 512 + 700):
        (tmp_path / "b.tar").write_bytes(whole[:length])
        source = open_source(tmp_path / "b.tar")
        complete = 5 if length == each * 4 + 512 + 700 else 4
        assert contents(source) == [bytes([i]) * 700 for i in range(complete)]
        assert bool(source.problems) == (length % each != 0)
    damaged = bytearray(whole)
    damaged[each * 3 + 5] ^= 1
    (tmp_path / "c.tar").write_bytes(damaged)
    source = open_source(tmp_path / "c.tar")
    assert len(source) == 3 and "bad tar header" in source.problems[0][1]


def test_other_files_are_refused_as_tars(tmp_path):
    (tmp_path / "text.tar").write_bytes(b"hello " * 200)
    with pytest.raises(DataError, match="not a tar file"):
        open_source(tmp_path / "text.tar")
    plain = write_tar(tmp_path / "a.tar", TREE)
    for mode in ("gz", "bz2", "xz"):
        with tarfile.open(tmp_path / f"b.{mode}.tar", f"w:{mode}") as tar:
            tar.add(plain, "a.tar")
        with pytest.raises(DataError, match="compressed"):
            open_source(tmp_path / f"b.{mode}.tar")
    (tmp_path / "zeros.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(DataError, match="no images"):
        open_source(tmp_path / "zeros.tar")


def test_every_mutation_of_a_tar_is_survived(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {f"{'n' * 120}{i}.jpg": bytes([i]) * 600 for i in range(6)}).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "m.tar"
    for _ in range(300):
        changed = bytearray(whole[: int(rng.integers(1, len(whole) + 1))])
        for at in rng.integers(0, len(changed), 3):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            index = read_index(path)
        except DataError:
            continue
        assert all(o >= 0 and o + s <= len(changed) for o, s in zip(index.offsets, index.sizes, strict=True))


def test_the_real_tars(shared):
    train, test = (open_source(shared / "sign_digits_64.tar", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1465, 597)
    assert train.labels is not None and sorted(set(train.labels)) == [str(d) for d in range(10)]
    with tarfile.open(shared / "sign_digits_64.tar") as tar:
        member = tar.extractfile(train.name(77).removeprefix(f"{shared / 'sign_digits_64.tar'}/"))
        assert member is not None and member.read() == train.read(77)


# Hugging Face data sets


def test_a_dataset_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = write_tree(tmp_path, {"x.png": b"not decoded here"}) / "x.png"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": b"one", "path": None}, {"bytes": None, "path": str(image)}], "label": [1, 0]}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "test": split.select([0])}).save_to_disk(str(tmp_path / "set"))
    source = open_source(f"hf:{tmp_path / 'set'}", "train")
    assert contents(source) == [b"one", b"not decoded here"] and source.labels == ["dog", "cat"]
    assert len(open_source(f"hf:{tmp_path / 'set'}", "test")) == 1 and len(source.fingerprint()) == 64


@pytest.mark.parametrize("columns", ["as datasets writes them", "bytes and path", "bytes"])
def test_parquet_files_on_disk(tmp_path, monkeypatch, columns):
    """A folder of parquet files, as on the hub, and a single file; also without datasets' schema."""
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data, labels = [b"one", b"two", b"three"], [1, 0, 1]
    folder = tmp_path / "set"
    for split, rows in (("train", slice(0, 2)), ("test", slice(2, 3))):
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        stored: list = [{"bytes": b, "path": None} for b in data[rows]]
        if columns == "as datasets writes them":
            features = datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
            )
            datasets.Dataset.from_dict({"image": stored, "label": labels[rows]}, features=features).to_parquet(file)
            continue
        if columns == "bytes":
            stored = data[rows]
        kind = pa.binary() if columns == "bytes" else pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = {"image": pa.array(stored, kind), "label": pa.array(labels[rows])}
        parquet.write_table(pa.table(table), file)
    source = open_source(f"hf:{folder}", "train")
    named = columns == "as datasets writes them"
    assert contents(source) == data[:2] and source.labels == (["dog", "cat"] if named else ["1", "0"])
    assert contents(open_source(f"hf:{folder}", "test")) == data[2:]
    assert contents(open_source(f"hf:{folder / 'data' / 'test-00000-of-00001.parquet'}")) == data[2:]


def test_without_the_package_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'upstep_fast\[data\]'"):
        open_source("hf:some/name")
