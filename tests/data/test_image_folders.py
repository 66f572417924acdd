"""Folders of images as people have them: Hugging Face's metadata, against `datasets`, and splits at other places."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
from PIL import Image
from trees import contents, reasons, write_tar, write_tree

from upstep_fast.data.labeled.splits import HeldOut, train_and_test
from upstep_fast.data.sources.part import Columns
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import DataError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def csv_of(rows, header="file_name,label"):
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]).encode()


def jsonl_of(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def pixels(source) -> list[int]:
    return [Image.open(io.BytesIO(data)).getpixel((0, 0))[0] for data in contents(source)]


def pairs(part) -> list[tuple[int, str]]:
    return sorted(zip(pixels(part.source), (part.classes[i] for i in part.y.tolist()), strict=True))


IMAGES = {"train/1.png": png(1), "train/2.png": png(2), "train/sub/3.png": png(3), "test/4.png": png(4)}
LAYOUTS = {
    "csv in each split": {
        **IMAGES,
        "train/metadata.csv": csv_of([("1.png", "b"), ("2.png", "a"), ("sub/3.png", "b")]),
        "test/metadata.csv": csv_of([("4.png", "a")]),
    },
    "jsonl in each split, numbers": {
        **IMAGES,
        "train/metadata.jsonl": jsonl_of(
            [{"file_name": "1.png", "label": 7}, {"file_name": "2.png", "label": 8}, {"file_name": "sub/3.png"}]
        ).replace(b'{"file_name": "sub/3.png"}', b'{"label": 7, "file_name": "sub/3.png"}'),
        "test/metadata.jsonl": jsonl_of([{"file_name": "4.png", "label": 8}]),
    },
    "validation, other columns": {
        **{name.replace("test/", "validation/"): data for name, data in IMAGES.items()},
        "train/metadata.csv": csv_of(
            [("x, y", "1.png", "b"), ("", "2.png", "a"), ("", "sub/3.png", "b")], "text,file_name,label"
        ).replace(b"x, y", b'"x, y"'),
        "validation/metadata.csv": csv_of([("q", "4.png", "a")], "text,file_name,label"),
    },
    "images that it does not name": {
        **IMAGES,
        "train/metadata.csv": csv_of([("1.png", "b"), ("sub/3.png", "a")]),
        "test/metadata.csv": csv_of([("4.png", "a")]),
    },
    "folders of classes": {
        **{f"train/{c}/{i}.png": png(i) for i, c in enumerate("aabb")},
        **{f"test/{c}/{i}.png": png(9 - i) for i, c in enumerate("ab")},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_folders_are_read_as_datasets_reads_them(tmp_path, layout):
    datasets = pytest.importorskip("datasets")
    root = write_tree(tmp_path / "data", LAYOUTS[layout])
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    ours = dict(zip(("train", "test"), train_and_test([str(root)], "eval"), strict=True))
    assert len(theirs) == 2
    for split, part in ours.items():
        rows = theirs.get(split) or theirs["validation"]
        feature = rows.features["label"]
        name = feature.int2str if hasattr(feature, "int2str") else str
        assert pairs(part) == sorted((row["image"].getpixel((0, 0))[0], name(row["label"])) for row in rows)
        if "metadata" not in "".join(LAYOUTS[layout]):
            continue
        assert "names " in open_source(root, split).summary and "left out: 1 .csv" not in open_source(root).summary
    assert sorted(pixels(open_source(root))) == sorted(
        row["image"].getpixel((0, 0))[0] for s in theirs.values() for row in s
    )


def test_metadata_without_splits_is_split_by_seed_or_by_its_column(tmp_path):
    images = {f"images/{i}.png": png(i) for i in range(10)}
    rows = [(f"images/{i}.png", "ab"[i % 2]) for i in range(10)]
    root = write_tree(tmp_path / "one", {**images, "metadata.csv": csv_of(rows)})
    train, test = train_and_test([str(root)], "eval", without_test=HeldOut(0.2, 0))
    assert len(train.y) == 8 and sorted(pairs(train) + pairs(test)) == [(i, "ab"[i % 2]) for i in range(10)]
    split = [(*row, "test" if i > 6 else "train") for i, row in enumerate(rows)]
    root = write_tree(tmp_path / "two", {**images, "metadata.csv": csv_of(split, "file_name,label,split")})
    train, test = train_and_test([str(root)], "eval", without_test=HeldOut(0.2, 0))
    assert pairs(test) == [(7, "b"), (8, "a"), (9, "b")] and len(train.y) == 7


def test_metadata_at_the_top_names_images_of_both_splits(tmp_path):
    # datasets 5.2.0 finds this file for no split of data_dir and gives other labels
    tree = {**IMAGES, "metadata.csv": csv_of([(name, "ab"[i % 2]) for i, name in enumerate(IMAGES)])}
    train, test = train_and_test([str(write_tree(tmp_path, tree))], "eval")
    assert pairs(train) == [(1, "a"), (2, "b"), (3, "a")] and pairs(test) == [(4, "b")]
    assert not train.source.problems


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"metadata.csv": csv_of([("1.png", "a")], "file_name,species")},
            r"has file_name, species; name one with --la",
        ),
        ({"metadata.csv": csv_of([("1.png", "a"), ("2.png", "")])}, "has 1 images without a label in metadata.csv"),
        ({"metadata.csv": csv_of([("1.png", -1), ("2.png", -1)])}, "has 2 images without a label in metadata.csv"),
        (
            {"metadata.csv": csv_of([("1.png", "a"), ("1.png", "b")])},
            "1.png has two labels: a in line 2 and b in line 3",
        ),
        (
            {"metadata.csv": csv_of([("1.png", "a")]), "metadata.jsonl": b""},
            "metadata.csv and metadata.jsonl; keep one",
        ),
        ({"metadata.jsonl": b'{"file_name": "1.png"}\n{'}, "metadata.jsonl, line 2: not valid JSON"),
        ({"metadata.jsonl": b'{"file_name": "1.png"}\n[1]'}, "line 2: not a JSON object; write one object a line"),
        ({"metadata.jsonl": b'{"file_name": "\\ud800"}'}, "metadata.jsonl, line 1: not valid JSON"),
        ({"metadata.jsonl": b"[" * 100_000}, "metadata.jsonl, line 1: not valid JSON"),
        ({"metadata.jsonl": b'{"file_name": null, "label": 1}'}, "line 1: the path is empty"),
        ({"metadata.csv": csv_of([("other.png", "a")])}, "outside class folders"),  # read without it, said below
    ],
)
def test_metadata_that_gives_no_classes_is_refused_in_a_line(tmp_path, files, message):
    root = write_tree(tmp_path / "data", {"1.png": png(1), "2.png": png(2), **files})
    with pytest.raises(DataError, match=message) as error:
        train_and_test([str(root)], "eval", without_test=HeldOut(0.2, 0))
    assert "\n" not in str(error.value)


def test_what_metadata_does_not_cover_is_said(tmp_path):
    rows = [("1.png", "a"), ("gone.png", "a"), ("../secret.png", "a")]
    root = write_tree(tmp_path / "data", {"1.png": png(1), "2.png": png(2), "metadata.csv": csv_of(rows)})
    write_tree(tmp_path, {"secret.png": png(3)})
    source = open_source(root)
    assert pixels(source) == [1] and source.labels == ["a"] and len(source.problems) == 2
    assert reasons(source)["metadata.csv, line 3: gone.png"] == "no such image"
    assert source.summary == (
        f"1 image; {root}/metadata.csv names 1 images, classes in its column label; left out: 1 that it does not name"
    )
    for text, said in (
        (b"id,age\n1,2\n", "has no column file_name"),
        (csv_of([("x", "a")]), "names none of the images"),
    ):
        (root / "metadata.csv").write_bytes(text)
        source = open_source(root)
        assert len(source) == 2 and said in source.summary and "left out: 1 .csv" in source.summary


def test_metadata_with_captions_leaves_the_classes_to_the_folders(tmp_path):
    tree = {"a/1.png": png(1), "b/2.png": png(2)}
    root = write_tree(tmp_path, {**tree, "metadata.csv": csv_of([(n, "text") for n in tree], "file_name,caption")})
    assert open_source(root).labels == ["a", "b"]
    assert open_source(root, columns=Columns(label="caption")).labels == ["text", "text"]


def in_all_kinds(tmp_path, tree):
    yield write_tree(tmp_path / "tree", tree)
    yield write_tar(tmp_path / "tree.tar", tree)
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    yield tmp_path / "tree.zip"


CLASSES = {f"{c}/{i}.jpg": f"{c}{i}".encode() for c in ("ash", "elm") for i in range(4)}


@pytest.mark.parametrize("around", ["photos", "photos/2019", "données/images"])
def test_folders_around_a_tree_are_entered(tmp_path, around):
    whole = {f"{around}/{name}": data for name, data in CLASSES.items()}
    split = {f"{around}/{s}/{name}": s.encode() + data for s in ("train", "val") for name, data in CLASSES.items()}
    mac = {f"__MACOSX/{around}/ash/._0.jpg": b"mac"}
    for path in in_all_kinds(tmp_path / "whole", whole | mac):
        source = open_source(path)
        assert source.labels == [name.split("/")[0] for name in sorted(CLASSES)], path
        assert f"{path}: its only folder {around}/ is entered" in source.summary
    for path in in_all_kinds(tmp_path / "split", split | {"README.txt": b"x"}):
        train, test = train_and_test([str(path)], "eval", without_test=HeldOut(0.2, 0))
        assert all(data.startswith(b"train") for data in contents(train.source)) and len(train.y) == 8, path
        assert all(data.startswith(b"val") for data in contents(test.source)) and len(test.y) == 8
        assert train.classes == ("ash", "elm")
        assert len(open_source(path)) == 16 and open_source(path).labels.count("ash") == 8


def test_metadata_in_a_folder_around_the_images_is_found(tmp_path):
    for folder in ("", "data/", "data/images/"):
        rows = [(f"data/images/{c}/1.png".removeprefix(folder), c.upper()) for c in "ab"]
        tree = {f"data/images/{c}/1.png": png(1) for c in "ab"} | {f"{folder}metadata.csv": csv_of(rows)}
        assert open_source(write_tree(tmp_path / f"at {len(folder)}", tree)).labels == ["A", "B"]


@pytest.mark.parametrize("around", ["", "data/"])
def test_splits_in_every_class_are_read(tmp_path, around):
    tree = {
        f"{around}{c}/{s}/{i}.jpg": f"{s} {c} {i}".encode()
        for c in ("ash", "elm", "oak")
        for s in ("train", "test", "more")
        for i in range(2)
        if (c, s) != ("oak", "test")
    }
    for path in in_all_kinds(tmp_path, tree):
        train, test = train_and_test([str(path)], "eval", without_test=HeldOut(0.2, 0))
        found = [sorted(x.decode() for x in contents(part.source)) for part in (train, test)]
        assert found == [
            [f"train {c} {i}" for c in train.classes for i in (0, 1)],
            [f"test {c} {i}" for c in ("ash", "elm") for i in (0, 1)],
        ], path
        assert train.classes == ("ash", "elm", "oak")
        assert "CLASS: train/ is read; left out: more/, test/" in open_source(path, "train").summary
        assert len(open_source(path)) == len(tree)


def test_splits_in_some_classes_are_refused(tmp_path):
    tree = {"ash/train/1.jpg": b"1", "ash/test/2.jpg": b"2", "elm/3.jpg": b"3", "elm/4.jpg": b"4"}
    for path in in_all_kinds(tmp_path, tree):
        with pytest.raises(DataError, match="ash/ has splits in it and elm/ has none; write train/CLASS/"):
            train_and_test([str(path)], "eval", without_test=HeldOut(0.2, 0))
        assert "ash/ looks split" in open_source(path, "train").summary and len(open_source(path)) == 4


def test_a_link_of_a_folder_to_itself_ends(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match="no images in"):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("command", ["eval", "finetune"])
def test_one_class_is_refused_with_a_test_part_too(tmp_path, command):
    root = write_tree(tmp_path, {"train/ash/1.jpg": b"1", "train/ash/2.jpg": b"2", "test/ash/3.jpg": b"3"})
    with pytest.raises(DataError, match=f"{root}: train/ has one class, ash; a classifier needs at least 2$"):
        train_and_test([str(root)], command, without_test=HeldOut(0.2, 0))
