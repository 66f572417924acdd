"""Labels and splits: the right ones, or a line that says why there are none; never another image's."""

from __future__ import annotations

import io
import os
import random
import re

import numpy as np
import pytest
from PIL import Image
from trees import contents, reasons, write_tar, write_tree

from upstep_fast.data.labeled.copies import copies
from upstep_fast.data.labeled.splits import train_and_test
from upstep_fast.data.sources.part import Columns
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import DataError


def names(source) -> list[str]:
    return [source.name(i).rsplit("/", 1)[-1] for i in range(len(source))]


# splits


def tree_of(root, splits):
    return write_tree(root, {f"{s}/{c}/{i}.jpg": f"{s}{c}{i}".encode() for s in splits for c in "ab" for i in range(2)})


@pytest.mark.parametrize("kind", ["folder", "tar", "csv", "hf"])
@pytest.mark.parametrize(
    ("splits", "train", "test"),
    [
        (("train", "test", "val"), "train", "test"),
        (("train", "val"), "train", "val"),
        (("TRAIN", "Validation"), "TRAIN", "Validation"),
        (("train", "valid", "validation", "extra"), "train", "valid"),
        (("Training", "Testing"), "Training", "Testing"),
        (("training", "train", "testing", "val"), "train", "testing"),
        (("train", "extra"), None, None),
        (("val", "test"), None, None),
    ],
)
def test_every_layout_has_the_same_splits(tmp_path, kind, splits, train, test):
    folder = tree_of(tmp_path / "tree", splits)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg"))
    if kind == "folder":
        path = folder
    elif kind == "tar":
        path = write_tar(tmp_path / "tree.tar", {name: (folder / name).read_bytes() for name in files})
    elif kind == "csv":
        path = folder / "list.csv"
        path.write_text("path,label,split\n" + "".join(f"{f},{f.split('/')[1]},{f.split('/')[0]}\n" for f in files))
    else:
        datasets = pytest.importorskip("datasets")
        rows = {s: {"image": [], "label": []} for s in splits}
        for name in files:
            rows[name.split("/")[0]]["image"].append({"bytes": (folder / name).read_bytes(), "path": None})
            rows[name.split("/")[0]]["label"].append(name.split("/")[1])
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        sets = {s: datasets.Dataset.from_dict(r, features=features) for s, r in rows.items()}
        datasets.DatasetDict(sets).save_to_disk(str(tmp_path / "saved"))
        path = f"hf:{tmp_path / 'saved'}"
    if train is None:
        if kind == "csv" and "train" not in splits:
            with pytest.raises(DataError, match="its column split holds test, val; it must hold train or training and"):
                open_source(path, "train")
        else:
            assert len(open_source(path, "train")) == 4 * len(splits)
        with pytest.raises(DataError, match=r"no test images in .*; it must .*test"):
            open_source(path, "test")
        return
    for asked, name in (("train", train), ("test", test)):
        source = open_source(path, asked)
        assert sorted(contents(source)) == sorted(f"{name}{c}{i}".encode() for c in "ab" for i in range(2))
        assert source.labels == ["a", "a", "b", "b"]
        assert f"{name}{'' if kind in ('csv', 'hf') else '/'} is read; left out: " in source.summary
        assert all(other in source.summary for other in splits)
    if kind != "csv":
        assert len(open_source(path)) == 4 * len(splits)  # embed


@pytest.mark.parametrize(
    ("tops", "said"),
    [
        (("training_set/a", "test_set/a"), "test_set/, training_set/ are read as classes, all for training"),
        (("train2017", "val2017"), "train2017/, val2017/ are read as classes"),
        (
            ("train2/train/a", "train2/test/a", "b/x"),
            "b/, train2/ are read as classes, all for training (train2/ looks ",
        ),
        (("one/train", "one/dev", "two/x"), "one/, two/ are read as classes, all for training (one/ looks split; "),
        (("test/a",), "test/ are read as classes"),
        (("train/a", "train/b"), ""),
        (("car", "plane", "train"), ""),
        (("attest/x", "restrain/y"), ""),
        (("train/a", "test/a"), "train/ is read; left out: test/"),
    ],
)
def test_folders_that_look_like_splits_are_said(tmp_path, tops, said):
    tree = {f"{top}/{i}.jpg": f"{top}{i}".encode() for top in tops for i in range(2)}
    for path in (write_tree(tmp_path / "tree", tree), write_tar(tmp_path / "tree.tar", tree)):
        summary = open_source(path, "train").summary
        assert said in summary and (said or summary == f"{2 * len(tops)} images"), path
        assert open_source(path).summary == f"{2 * len(tops)} images"


def test_splits_that_differ_in_case_only_are_refused(tmp_path):
    root = tree_of(tmp_path, ("train", "test", "Test"))
    if len(list(root.iterdir())) < 3:
        pytest.skip("this file system does not tell the case of names")
    with pytest.raises(DataError, match="the splits Test and test, equal but for case; rename one"):
        open_source(root, "train")


def test_names_of_splits_are_no_classes(tmp_path):
    root = write_tree(tmp_path, {"train/1.jpg": b"1", "train/2.jpg": b"2"})
    source = open_source(root)
    assert source.labels is None and "(train/1.jpg) has images outside class folders" in source.unlabeled()


def test_what_a_tree_with_splits_leaves_out_is_said(tmp_path):
    root = tree_of(tmp_path, ("train", "val", "test", "more"))
    assert open_source(root, "train").summary == f"4 images; {root}: train/ is read; left out: more/, test/, val/"


# webdataset


def dotted(count, split):
    images = {f"{split}/scan_2.{i:02d}.jpg": f"{split}{i}".encode() for i in range(count)}
    return images | {f"{split}/scan_2.{i:02d}.cls": str(i % 3).encode() for i in range(count)}


def test_labels_of_names_with_dots(tmp_path):
    path = write_tar(tmp_path / "dots.tar", dotted(12, "train") | dotted(7, "test"))
    assert open_source(path, "train").labels == [str(i % 3) for i in range(12)]
    assert open_source(path, "test").labels == [str(i % 3) for i in range(7)]


def test_no_image_takes_the_label_of_another(tmp_path):
    """Random names with dots and folders, each with its own label: its name."""
    rng = random.Random(0)
    for case in range(60):
        names = {".".join(rng.choices(["a", "b", "22", "00", "v1"], k=rng.randint(1, 4))) for _ in range(12)}
        names |= {f"{rng.choice(['x', 'x.0', 'y'])}/{name}" for name in list(names)[:6]}
        tree = {f"{name}.{end}": name.encode() for name in names for end in ("jpg", "cls")}
        shuffled = dict(rng.sample(sorted(tree.items()), len(tree)))
        source = open_source(write_tar(tmp_path / f"{case}.tar", shuffled))
        assert len(source) == len(names) and source.labels == [data.decode() for data in contents(source)]


def test_labels_in_capitals(tmp_path):
    tree = {"0.JPG": b"a", "0.CLS": b"1", "1.Jpg": b"b", "1.Cls": b"0"}
    assert open_source(write_tar(tmp_path / "a.tar", tree)).labels == ["1", "0"]


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path):
    marks = (b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf ")
    tree = {f"{i}.jpg": b"x" for i in range(3)} | {f"{i}.cls": mark + b"cat\n" for i, mark in enumerate(marks)}
    assert open_source(write_tar(tmp_path / "a.tar", tree)).labels == ["cat"] * 3


def test_two_labels_of_one_key_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"a", "0.cls": b"1", "0.CLS": b"2"})
    with pytest.raises(DataError, match=r"0\.CLS and 0\.cls are two labels of one key; keep one"):
        open_source(path)


@pytest.mark.parametrize(
    ("label", "reason"),
    [(None, r"1 of 3 images without a label KEY\.cls, e\.g\. .*a\.tar/1\.jpg"), (b" \n", r"empty labels.*1\.cls")],
)
def test_an_image_without_a_label_is_named(tmp_path, label, reason):
    tree = {f"{i}.{end}": str(i).encode() for i in range(3) for end in ("jpg", "cls")} | {"1.cls": label}
    source = open_source(write_tar(tmp_path / "a.tar", {k: v for k, v in tree.items() if v is not None}))
    assert source.labels is None and re.search(reason, source.unlabeled())


def test_masks_beside_images_are_left_out_and_said(tmp_path):
    tree = {f"{i}.{end}": f"{i}{end}".encode() for i in range(3) for end in ("jpg", "seg.png", "cls")}
    source = open_source(write_tar(tmp_path / "a.tar", tree))
    assert contents(source) == [b"0jpg", b"1jpg", b"2jpg"] and source.labels == ["0cls", "1cls", "2cls"]
    assert reasons(source).keys() == {"0.seg.png", "1.seg.png", "2.seg.png"}
    assert "--image-column" in reasons(source)["0.seg.png"]
    masks = open_source(tmp_path / "a.tar", columns=Columns("seg.png"))
    assert contents(masks) == [b"0seg.png", b"1seg.png", b"2seg.png"]


@pytest.mark.parametrize("ends", [("left.jpg", "right.jpg"), ("jpg", "png")])
def test_a_key_with_two_images_is_refused(tmp_path, ends):
    path = write_tar(tmp_path / "a.tar", {f"{i}.{e}": f"{i}{e}".encode() for i in range(2) for e in (*ends, "cls")})
    with pytest.raises(DataError, match=rf"2 images have the key 0 .*{ends[0]}, {ends[1]}; .*--image-column {ends[0]}"):
        open_source(path)
    chosen = open_source(path, columns=Columns(ends[1]))
    assert contents(chosen) == [f"{i}{ends[1]}".encode() for i in range(2)] and chosen.labels == [
        f"{i}cls" for i in range(2)
    ]
    with pytest.raises(DataError, match=r"no images in .* with the suffix up\.jpg"):
        open_source(path, columns=Columns("up.jpg"))


def test_photos_with_dots_in_their_names_are_all_read(tmp_path):
    tree = {f"2024.{i:02d}.jpg": str(i).encode() for i in range(4)}
    source = open_source(write_tar(tmp_path / "a.tar", tree))
    assert len(source) == 4 and source.labels is None
    assert "4 images share their key with another (2024.00.jpg, 2024.01.jpg) and all are read" in source.summary


def test_labels_by_webdataset_itself(tmp_path):
    """The oracle: webdataset's own reader, on names without and with folders, dots and several parts."""
    webdataset = pytest.importorskip("webdataset")
    tree = {}
    for i in range(9):
        tree |= {f"v1.0/{i}.{end}": f"{i}{end}".encode() for end in ("jpg", "cls", "seg.png", "json")}
    path = write_tar(tmp_path / "a.tar", tree)
    expected = {s["jpg"]: s["cls"].decode() for s in webdataset.WebDataset(str(path), shardshuffle=False)}
    source = open_source(path)
    assert dict(zip(contents(source), source.labels, strict=True)) == expected


# lists


@pytest.fixture
def listed(tmp_path):
    return write_tree(tmp_path, {f"img/{i}.jpg": str(i).encode() for i in range(6)})


def write_list(root, name, *lines):
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


ROWS = [f"img/{i}.jpg,{'abc'[i % 3]}" for i in range(6)]


@pytest.mark.parametrize(
    ("name", "header", "rows", "columns"),
    [
        ("no header.csv", [], ROWS, Columns()),
        ("header.csv", ["path,label"], ROWS, Columns()),
        ("hf.csv", ["file_name,label"], ROWS, Columns()),
        ("semicolon.csv", ["path;label"], [r.replace(",", ";") for r in ROWS], Columns()),
        ("tabs.tsv", ["path\tlabel"], [r.replace(",", "\t") for r in ROWS], Columns()),
        ("first.csv", ["label,filename"], [",".join(r.split(",")[::-1]) for r in ROWS], Columns()),
        ("kaggle.csv", ["id,image_path,target"], [f"{i},{r}" for i, r in enumerate(ROWS)], Columns(None, "target")),
        ("own.csv", ["id,where,what"], [f"{i},{r}" for i, r in enumerate(ROWS)], Columns("where", "what")),
        ("tabs.csv", ["path\tlabel"], [r.replace(",", "\t") for r in ROWS], Columns()),
        ("bars.csv", ["path|label"], [r.replace(",", "|") for r in ROWS], Columns()),
        ("trailing.csv", ["path,label,"], [f"{r}," for r in ROWS], Columns()),
    ],
)
def test_lists_as_people_have_them(listed, name, header, rows, columns):
    source = open_source(write_list(listed, name, *header, *rows), columns=columns)
    assert contents(source) == [str(i).encode() for i in range(6)] and source.labels == list("abcabc")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "a.csv",
            ["id,where", "0,img/0.jpg"],
            "it has id, where; name one with --image-column",
        ),
        ("a.csv", ["path", *(r.replace(",", " ") for r in ROWS)], "a path and a label; separate its columns by commas"),
        (
            "a.csv",
            ["filename,image,label", "img/0.jpg,0,a"],
            "read from the column image; it has filename, image, label; --image-column names another",
        ),
        ("a.txt", [r.replace(",", " ") for r in ROWS], "a path and a label; write a CSV instead"),
        ("a.txt", [r.split(",")[0].replace("/", "\\") for r in ROWS], r"write / instead of \\"),
        ("a.txt", ["ftp://example.org/1.jpg"], "addresses of this kind are not read"),
        (
            "a.csv",
            ["path,label", "img/0.jpg,a", "./img/0.jpg,b"],
            "has two labels: a in line 2 and b in line 3",
        ),
        ("a.csv", ["path,label", "img/0.jpg,a", ",b"], "line 3: the path is empty"),
    ],
)
def test_lists_that_are_refused_name_the_cure(listed, name, lines, message):
    with pytest.raises(DataError, match=message) as error:
        open_source(write_list(listed, name, *lines))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("first", ["img/gone.jpg,d", "img/gone.TIF,d"])
def test_a_list_without_header_whose_first_image_is_gone(listed, first):
    source = open_source(write_list(listed, "a.csv", first, *ROWS))
    assert source.labels == list("dabcabc") and source.name(0).endswith(first.split(",")[0])


@pytest.mark.parametrize("words", [("0", "1"), ("fit", "Test"), ("dev", "")])
@pytest.mark.parametrize("asked", ["train", "test"])
def test_a_column_split_in_other_words_is_refused(listed, words, asked):
    rows = [f"{row},{words[i % 2]}" for i, row in enumerate(ROWS)]
    path = write_list(listed, "a.csv", "path,label,split", *rows)
    have = ", ".join(sorted(filter(None, words)))
    with pytest.raises(DataError, match=f"no {asked} images in .*: its column split holds {have}; .*; rename them"):
        open_source(path, asked)
    assert len(open_source(path)) == len(ROWS)  # embed reads all


@pytest.mark.parametrize(("name", "said"), [("set", True), ("split", False)])
def test_splits_in_a_column_of_another_name_are_said(listed, name, said):
    rows = [f"{row},{('train', 'Test')[i % 2]}" for i, row in enumerate(ROWS)]
    source = open_source(write_list(listed, "a.csv", f"path,label,{name}", *rows), "train")
    assert ("the column set holds splits and is not read; call it split" in source.summary) is said
    assert len(source) == (6 if said else 3)


def test_shards_of_both_splits_are_said(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.jpg": b"x"})
    said = "3 images; all 3 paths are for training, 2 named for training and 1 for testing"
    assert open_source(tmp_path / "*.tar", "train").summary == said
    assert open_source(tmp_path / "*.tar").summary == "3 images"
    assert open_source(tmp_path / "train-*.tar", "train").summary == "2 images"


def test_a_path_with_a_separator_in_it(listed):
    tree = {"a|b.jpg": b"bar", "a\tb.jpg": b"tab"}
    root = write_tree(listed / "odd", tree)
    for name, content in tree.items():
        assert contents(open_source(write_list(root, "a.csv", name))) == [content]


def test_an_empty_column_split_is_none(listed):
    source = open_source(write_list(listed, "a.csv", "path,label,split", *(f"{row}," for row in ROWS)), "train")
    assert len(source) == len(ROWS) and source.summary == "6 images"


@pytest.mark.parametrize("columns", [Columns("photo"), Columns(None, "photo")])
def test_a_column_that_is_not_there(listed, columns):
    with pytest.raises(DataError, match=r"has no column photo \(--(image|label)-column\); it has path, label"):
        open_source(write_list(listed, "a.csv", "path,label", *ROWS), columns=columns)


def test_empty_labels_are_none(listed):
    source = open_source(write_list(listed, "a.csv", "path,label", *ROWS[:3], "img/4.jpg,"))
    assert source.labels is None and source.unlabeled() == "has 1 images without a label (a.csv, first in line 5)"
    no_column = open_source(write_list(listed, "b.csv", "path,kind", *ROWS))
    assert no_column.labels is None and "it has path, kind; name one with --label-column" in no_column.unlabeled()


def test_the_same_line_twice_counts_once(listed):
    source = open_source(write_list(listed, "a.csv", "path,label", *ROWS, *ROWS))
    assert len(source) == 6 and len(source.problems) == 6 and source.labels == list("abcabc")


def test_odd_names_in_lists(listed):
    tree = {"#5.jpg": b"hash", "a\u2028b.jpg": b"separator", "\u00a0.jpg": b"space"}
    root = write_tree(listed / "odd", tree)
    assert contents(open_source(write_list(root, "a.txt", *tree, "# a remark"))) == list(tree.values())
    assert contents(open_source(write_list(root, "a.csv", "path", *tree))) == list(tree.values())


def test_labels_that_are_not_utf_8_can_be_written_everywhere(listed):
    path = listed / "latin1.csv"
    names = [row.split(",")[0] for row in ROWS]
    path.write_bytes(b"path,label\n" + b"".join(f"{name},z\xe9ro\n".encode("latin-1") for name in names))
    assert open_source(path).labels == ["z\\xe9ro"] * len(names)  # as for the names of class folders


# Hugging Face data sets


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def save_rows(folder, columns, features, split="train"):
    datasets = pytest.importorskip("datasets")
    kinds = {
        "image": datasets.Image(),
        "bytes": datasets.Value("binary"),
        "int": datasets.Value("int64"),
        "text": datasets.Value("string"),
        "class": datasets.ClassLabel(names=["cat", "dog"]),
        "list": datasets.List(datasets.Value("int64")),
    }
    features = datasets.Features({name: kinds[kind] for name, kind in features.items()})
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({split: rows, "test": rows}).save_to_disk(str(folder))
    return f"hf:{folder}"


def stored(values):
    return [{"bytes": png(v), "path": None} for v in values]


@pytest.mark.parametrize(
    ("features", "columns", "chosen"),
    [
        ({"mask": "image", "image": "image"}, Columns(), "image"),
        ({"mask": "image", "image": "image"}, Columns("mask"), "mask"),
        ({"id": "bytes", "photo": "image"}, Columns(), "photo"),
        ({"photo": "bytes"}, Columns(), "photo"),
        ({"thumb": "bytes", "jpg": "bytes"}, Columns("jpg"), "jpg"),
        ({"left": "image", "right": "image"}, Columns(), None),
        ({"thumb": "bytes", "jpg": "bytes"}, Columns(), None),
    ],
)
def test_the_image_column_is_no_guess(tmp_path, features, columns, chosen):
    data = {
        name: stored([10 * i]) if kind == "image" else [png(10 * i)] for i, (name, kind) in enumerate(features.items())
    }
    path = save_rows(tmp_path / "set", data, features)
    if chosen is None:
        with pytest.raises(
            DataError, match=rf"2 columns that may be the image: {', '.join(features)}; .*--image-column"
        ):
            open_source(path, columns=columns)
        return
    assert open_source(path, "train", columns).read(0) == png(10 * list(features).index(chosen))
    with pytest.raises(DataError, match=r"no column size of images \(--image-column\)"):
        open_source(path, columns=Columns("size"))


@pytest.mark.parametrize(
    ("kind", "values", "labels", "reason"),
    [
        ("class", [1, 0, 1], ["dog", "cat", "dog"], ""),
        ("class", [1, -1, 0], None, "1 of 3 rows without a label (none, or -1) in its column label, e.g. "),
        ("class", [1, None, 0], None, "1 of 3 rows without a label"),
        ("int", [-1, -1, -1], None, "3 of 3 rows without a label"),
        ("int", [-1, 1, 1], ["-1", "1", "1"], ""),
        ("int", [3, None, 4], None, "1 of 3 rows without a label"),
        ("text", ["a", "", "b"], None, "1 of 3 rows without a label"),
        ("text", ["test", "test", "test"], None, "its column label holds only the name of the split"),
        ("list", [[1], [2], [3]], None, "3 of 3 rows without a label"),
    ],
)
def test_labels_of_a_dataset(tmp_path, kind, values, labels, reason):
    path = save_rows(tmp_path / "set", {"image": stored([1, 2, 3]), "label": values}, {"image": "image", "label": kind})
    source = open_source(path, "test")
    assert source.labels == labels
    if labels is None:
        with pytest.raises(DataError) as error:
            train_and_test([path], "eval")
        assert reason in source.unlabeled() and reason in str(error.value) and "\n" not in str(error.value)


def test_the_label_column_is_no_guess(tmp_path):
    data = {"image": stored([1, 2]), "fine": [0, 1], "coarse": [1, 1], "target": [7, 8]}
    kinds = {"image": "image", "fine": "class", "coarse": "class", "target": "int"}
    path = save_rows(tmp_path / "set", data, kinds)
    assert open_source(path, "train").unlabeled() == "has the label columns fine, coarse; name one with --label-column"
    assert open_source(path, "train", Columns(None, "coarse")).labels == ["dog", "dog"]
    assert open_source(path, "train", Columns(None, "target")).labels == ["7", "8"]
    with pytest.raises(DataError, match=r"no column kind \(--label-column\); it has image, fine"):
        open_source(path, "train", Columns(None, "kind"))


# copies


@pytest.mark.parametrize("same_size", [False, True])
def test_copies_between_train_and_test_are_counted(tmp_path, same_size):
    def data(i):
        return bytes([i]) * (50 if same_size else i + 1)

    tree = {f"{s}/a/{i}.jpg": data(i) for s in ("train", "test") for i in range(40)}
    tree |= {f"test/a/{i}.jpg": data(i) for i in range(40, 50)}
    root = write_tree(tmp_path / "root", tree)
    train, test = (open_source(root, split) for split in ("train", "test"))
    found, looked_at = copies(train, test)
    assert looked_at == 50 and (30 <= found <= 40 if same_size else found == 40)  # of one size some are missed
    assert copies(train, open_source(write_tree(tmp_path / "other", {"1.jpg": b"y" * 50, "2.jpg": b"z"}))) is None
    os.remove(root / "test" / "a" / "0.jpg")
    assert copies(train, test)[0] == found - 1
