"""Labeled images without a test part: which are held out, in every layout, whatever their order and place."""

import random

import pytest
from trees import write_tar, write_tree

from upstep_fast.data.labeled.splits import HeldOut, choose_test, train_and_test
from upstep_fast.errors import DataError

BY = HeldOut(0.2, 0)
COUNTS = {"ash": 10, "birch": 5, "cedar": 2, "elm": 1}
TREE = {f"{c}/{i}.jpg": f"{c}{i}".encode() for c, count in COUNTS.items() for i in range(count)}


def parts(path, by=BY):
    """Return the content of train and test, and the classes."""
    train, test = train_and_test(
        [str(p) for p in (path if isinstance(path, list) else [path])], "eval", without_test=by
    )
    assert train.classes == test.classes
    for part in (train, test):
        assert [part.classes[i] for i in part.y.tolist()] == part.source.labels
        assert part.source.summary == f"{len(part.y)} images"
    return *({part.source.read(i) for i in range(len(part.source))} for part in (train, test)), train.classes


def in_layout(kind, root):
    if kind == "folder":
        return write_tree(root, TREE)
    if kind == "train alone":
        write_tree(root / "Train", TREE)
        return root
    if kind == "tar":
        return write_tar(root.with_suffix(".tar"), TREE)
    if kind == "tar, train alone":
        return write_tar(root.with_suffix(".tar"), {f"train/{name}": data for name, data in TREE.items()})
    if kind == "csv":
        write_tree(root, TREE)
        (root / "list.csv").write_text("path,label\n" + "".join(f"{f},{f.split('/')[0]}\n" for f in TREE))
        return root / "list.csv"
    datasets = pytest.importorskip("datasets")
    write_tree(root, {name: image for name, image in TREE.items()})
    return f"hf:{root}" if datasets else None


@pytest.mark.parametrize("kind", ["folder", "train alone", "tar", "tar, train alone", "csv", "hf image folder"])
def test_a_fraction_of_each_class_is_held_out(tmp_path, kind, caplog):
    caplog.set_level("INFO", logger="upstep_fast")
    path = in_layout(kind, tmp_path / "data")
    train, test, classes = parts(path)
    assert not train & test and train | test == set(TREE.values()) and classes == tuple(COUNTS)
    held = {c: sum(data.startswith(c.encode()) for data in test) for c in COUNTS}
    assert held == {"ash": 2, "birch": 1, "cedar": 1, "elm": 0}
    assert f"{path} has no test part: 20 % of each of 4 classes held out, seed 0" in caplog.text
    assert parts(path, HeldOut(0.2, 1))[1] != test and parts(path)[1] == test


def test_neither_order_nor_place_matters(tmp_path):
    names, labels = list(TREE), [name.split("/")[0] for name in TREE]
    chosen = {n for n, held in zip(names, choose_test(names, labels, BY), strict=True) if held}
    rows = list(zip(names, labels, strict=True))
    for seed in range(20):
        random.Random(seed).shuffle(rows)
        mixed = [f"/some/place{seed}/{name}" for name, _ in rows]
        mask = choose_test(mixed, [label for _, label in rows], BY)
        assert {n.split("/", 3)[3] for n, held in zip(mixed, mask, strict=True) if held} == chosen
    folders = [write_tree(tmp_path / "one", TREE), write_tree(tmp_path / "deep" / "two", TREE)]
    listed = tmp_path / "one" / "list.csv"
    listed.write_text("path,label\n" + "".join(f"{f},{f.split('/')[0]}\n" for f in reversed(TREE)))
    assert parts(folders[0]) == parts(folders[1]) == parts(f"{folders[0]}//") == parts(listed)


def test_new_files_move_few_others():
    names = [f"{c}/{i}" for c in "ab" for i in range(500)]
    before = choose_test(names, [n[0] for n in names], BY)
    more = [*names, *(f"{c}/{i}" for c in "ab" for i in range(500, 550))]
    after = choose_test(more, [n[0] for n in more], BY)[: len(names)]
    assert (before != after).float().mean() < 0.05 and before.sum() == 200


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"ash/1.jpg": b"1", "ash/2.jpg": b"2"}, "has one class, ash; eval needs at least 2 classes"),
        ({"ash/1.jpg": b"1", "elm/2.jpg": b"2"}, "has one image of each class; eval needs .* 2 images of one"),
        ({"ash/1.jpg": b"1", "2.jpg": b"2"}, "outside class folders; eval needs train/CLASS/image, CLASS/image or a"),
        ({"val/a/1.jpg": b"1", "test/a/2.jpg": b"2"}, "is a split, not a class"),
        ({"all/ash/1.jpg": b"1", "all/ash/2.jpg": b"2"}, "has one class, ash; eval needs at least 2 classes"),
        ({"all/train/ash/1.jpg": b"1", "all/test/ash/2.jpg": b"2"}, "train/ has one class, ash; a classifier nee"),
        (
            {"1.jpg": b"1", "2.jpg": b"2", "metadata.csv": b"file_name,species\n1.jpg,a\n2.jpg,b\n"},
            "metadata.csv.; it has file_name, species; name one with --label-column; eval needs",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, tree, message):
    with pytest.raises(DataError, match=message) as error:
        parts(write_tree(tmp_path / "data", tree))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["valid", "dev", "eval", "Evaluation", "holdout"])
def test_a_test_part_is_used_whatever_it_is_called(tmp_path, name):
    tree = {"train/a/1.jpg": b"1", "train/b/2.jpg": b"2", f"{name}/a/3.jpg": b"3"}
    train, test = train_and_test([str(write_tree(tmp_path / "data", tree))], "eval", without_test=BY)
    assert train.classes == ("a", "b") and len(train.y) == 2 and len(test.y) == 1


def test_a_test_part_is_used_as_it_is(tmp_path):
    tree = {"train/a/1.jpg": b"1", "train/b/2.jpg": b"2", "valid/a/3.jpg": b"3"}
    train, test = train_and_test([str(write_tree(tmp_path / "data", tree))], "eval", without_test=BY)
    assert len(train.y) == 2 and len(test.y) == 1
    # an empty test part is no reason to take images from train
    (tmp_path / "data" / "valid" / "a" / "3.jpg").unlink()
    with pytest.raises(DataError, match="no images in"):
        train_and_test([str(tmp_path / "data")], "eval", without_test=BY)


def test_without_a_fraction_such_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="no test images in"):
        train_and_test([str(write_tree(tmp_path / "data", TREE))], "eval")
