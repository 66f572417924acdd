"""Files of several pictures: which ones are images, what they are called, and that those of a file stay together."""

from __future__ import annotations

import errno
import io
import pickle
import struct
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.photos import blurred_noise
from upstep_fast.config.reading import Reading
from upstep_fast.data.formats import kinds
from upstep_fast.data.labeled.splits import HeldOut, Labeled, choose_test, held_out
from upstep_fast.data.loading.eval_transform import EvalTransform
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading import retries
from upstep_fast.data.reading.axes import label, pieces, read
from upstep_fast.data.reading.stored import Layout, Piece, Stored
from upstep_fast.data.sources import open_source
from upstep_fast.data.sources.series import gaps
from upstep_fast.data.sources.subset import split_by_file
from upstep_fast.errors import BadImage, DataError
from upstep_fast.evaluation.figures import data_notes


def photo() -> Image.Image:
    return blurred_noise(torch.Generator().manual_seed(0), 24)


def stack_values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def stacks(monkeypatch):
    """A kind of file, .fits, whose bytes are `np.save`d arrays with the axes in front: b"SIMPLE  =ZYX\\n"."""

    def split(file) -> tuple[str, np.ndarray]:
        data = Path(file).read_bytes() if isinstance(file, str) else bytes(file)
        axes, _, array = data.removeprefix(b"SIMPLE  =").partition(b"\n")
        if not axes.isalpha():
            raise BadImage("no axes")
        return axes.decode(), np.load(io.BytesIO(array))

    def layout(file) -> Layout:
        axes, array = split(file)
        return Layout(axes, array.shape, "stack")

    def read(file, piece) -> Stored:
        axes, array = split(file)
        for axis in axes:
            if axis not in "YXC":
                array = array.take(piece.index(axis), axes.index(axis))
                axes = axes.replace(axis, "")
        if "C" not in axes:
            array, axes = array[None], "C" + axes
        array = array.transpose([axes.index(axis) for axis in "CYX"])
        return Stored(array, 0, 255)

    monkeypatch.setattr(kinds, "missing", lambda kind: "")
    monkeypatch.setattr(kinds, "module", lambda kind: types.SimpleNamespace(layout=layout, read=read))


def write_stack(path: Path, axes: str, array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"SIMPLE  =" + axes.encode() + b"\n" + file.getvalue())


@pytest.mark.parametrize(
    ("axes", "shape", "slices", "given", "expected"),
    [
        ("YX", (4, 5), "auto", None, [""]),
        ("ZYX", (3, 4, 5), "all", None, ["z=0", "z=1", "z=2"]),
        ("ZYX", (4, 4, 5), "middle", None, ["z=2"]),
        ("TZYX", (2, 3, 4, 5), "middle", None, ["t=0,z=1", "t=1,z=1"]),
        ("TZYX", (2, 3, 4, 5), "max", None, ["t=0", "t=1"]),
        ("TYX", (3, 4, 5), "middle", None, ["t=1"]),
        ("PCYX", (2, 3, 4, 5), "middle", None, ["p=0", "p=1"]),
        ("FYX", (3, 4, 5), "max", None, [""]),
        ("ZYX", (3, 4, 5), "auto", "CYX", [""]),
        ("ZCYX", (2, 3, 4, 5), "auto", "CZYX", ["c=0", "c=1", "c=2"]),
    ],
)
def test_pieces_of_a_layout(axes, shape, slices, given, expected):
    assert [label(p) for p in pieces(Layout(axes, shape, "x"), Reading(slices=slices, axes=given))] == expected


@pytest.mark.parametrize(("given", "said"), [("TZYX", "names 4"), ("XYZ", "moves Y or X")])
def test_axes_that_do_not_fit(given, said):
    with pytest.raises(BadImage, match=said):
        pieces(Layout("ZYX", (3, 4, 5), "x"), Reading(axes=given))


@pytest.mark.parametrize("kind", ["int16", "float32"])
@pytest.mark.parametrize("inverted", [False, True])
def test_maximum_is_the_brightest_valid_value(kind, inverted):
    rng = np.random.default_rng(0)
    values = rng.integers(-99, 99, (5, 2, 6, 7)).astype(kind)
    valid = rng.random((5, 6, 7)) > 0.4
    valid[:, 0, 0] = False
    if kind == "float32":
        values[rng.random(values.shape) > 0.8] = np.nan

    def one(piece: Piece) -> Stored:
        z = piece.index("Z")
        return Stored(values[z], -99 - z, 99 + z, valid[z], inverted)

    best = read(one, Piece(maximum=("Z", 5)))
    masked = np.where(valid[:, None], values.astype(np.float64), np.nan)
    filled = np.where(np.isfinite(masked), masked, np.inf if inverted else -np.inf)
    expected = filled.min(0) if inverted else filled.max(0)
    known = np.isfinite(expected)
    assert np.array_equal(best.values[known], expected[known].astype(kind))
    if kind == "float32":
        assert best.valid is None and np.array_equal(np.isfinite(best.values), known)
    else:
        assert np.array_equal(best.valid, known.all(0))
    assert (best.low, best.high) == (-103, 103)


@pytest.mark.usefixtures("stacks")
@pytest.mark.parametrize("container", ["folder", "tar", "list", "file"])
def test_each_slice_is_an_image(container, tmp_path):
    array = stack_values((3, 20, 24))
    write_stack(tmp_path / "in/a/scan.fits", "ZYX", array)
    if container != "file":
        photo().save(tmp_path / "in/b.png")
    path = {"folder": tmp_path / "in", "file": tmp_path / "in/a/scan.fits"}.get(container)
    if container == "tar":
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "in", "")
    if container == "list":
        path = tmp_path / "x.txt"
        path.write_text("in/a/scan.fits\nin/b.png\n")
    source = open_source(path)
    assert [source.name(i).rpartition("scan.fits")[2] for i in range(3)] == ["#z=0", "#z=1", "#z=2"]
    assert len(source) == (3 if container == "file" else 4)
    for index in range(3):
        assert torch.equal(read_image(source, index), torch.from_numpy(array[index]).expand(3, -1, -1))
    kinds_found = "3 images (1 .fits)" if container == "file" else "4 images (1 .fits, 1 .png)"
    assert source.summary == f"{kinds_found}; stack ZYX 3x20x24: 3 images of 1 channel"
    assert source.groups().tolist()[:3] == [0, 0, 0]
    assert len({source.digest(i) for i in range(len(source))}) == len(source)
    sent = pickle.loads(pickle.dumps(source))  # as to the workers of a DataLoader
    assert sent.fingerprint() == source.fingerprint() and torch.equal(read_image(sent, 2), read_image(source, 2))


@pytest.mark.usefixtures("stacks")
def test_a_header_that_cannot_be_read_is_a_problem(tmp_path):
    write_stack(tmp_path / "a.fits", "ZYX", stack_values((2, 8, 8)))
    (tmp_path / "b.fits").write_bytes(b"SIMPLE  =\0\n")
    source = open_source(tmp_path)
    assert len(source) == 2 and source.problems == ((f"{tmp_path}/b.fits", "no axes"),)
    (tmp_path / "a.fits").unlink()
    with pytest.raises(DataError, match=r"that can be used; the first of 1 problems: .*b\.fits: no axes$"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"^data: \S*b\.fits: no axes$"):
        open_source(tmp_path / "b.fits")


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "missing", lambda kind: f"pip install 'upstep_fast[{kind.extra}]'")
    photo().save(tmp_path / "a.png")
    (tmp_path / "b.nii.gz").write_bytes(b"x")
    (tmp_path / "c.dcm").write_bytes(b"x")
    assert "left out: 1 .nii.gz (pip install 'upstep_fast[medical]'), 1 .dcm" in open_source(tmp_path).summary
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"without the packages that read them; it holds 1 .nii.gz \(pip install"):
        open_source(tmp_path)


@pytest.mark.usefixtures("stacks")
def test_dicom_without_a_suffix_is_found(tmp_path):
    for name in ("IM_0001", "1.2.840.10008"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    (tmp_path / "README").write_text("x")
    with pytest.raises(DataError, match="2 problems"):
        open_source(tmp_path)


def test_pictures_of_a_file_stay_together():
    """Of every split: no file on both sides."""
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 12, 200))
    names = [f"in/{'ab'[g % 2]}/{g}.nii#z={i}" for i, g in enumerate(groups)]
    labels = ["ab"[g % 2] for g in groups]
    order = rng.permutation(200).tolist()
    chosen, rest = split_by_file(order, groups, 30)
    test = choose_test(names, labels, HeldOut(0.4), groups).numpy()
    tuning = held_out(torch.from_numpy(groups % 2), 0.4, 0, groups).numpy()
    assert len(chosen) == 30
    for held, kept in ((chosen, rest), (test, ~test), (tuning, ~tuning)):
        assert len(groups[held]) and len(groups[kept]) and not set(groups[held]) & set(groups[kept])
    shuffled = choose_test([names[i] for i in order], [labels[i] for i in order], HeldOut(0.4), groups[order]).numpy()
    assert np.array_equal(shuffled, test[order])
    assert len(set(groups[test & (groups % 2 == 0)])) == round(0.4 * 6)


def test_one_file_cannot_be_held_out():
    assert split_by_file(list(range(9)), np.zeros(9, np.int64), 2) == ([], list(range(9)))
    assert not choose_test(["a#z=0", "a#z=1"], ["x", "x"], HeldOut(0.5), np.zeros(2, np.int64)).any()
    assert not held_out(torch.zeros(2, dtype=torch.int64), 0.5, 0, np.zeros(2, np.int64)).any()


@pytest.mark.usefixtures("stacks")
def test_errors_of_the_machine_are_not_held_against_a_file(tmp_path, monkeypatch):
    write_stack(tmp_path / "a.fits", "ZYX", stack_values((2, 8, 8)))
    write_stack(tmp_path / "b.fits", "ZYX", stack_values((2, 8, 8)))
    source = open_source(tmp_path)
    monkeypatch.setattr(retries, "WAITS", ())
    real = Path.read_bytes

    def failing(error):
        def read(path):
            if path.name == "b.fits":
                raise error
            return real(path)

        monkeypatch.setattr(Path, "read_bytes", read)

    failing(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(DataError, match=r"cannot read .*b\.fits: Input/output error; mend"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*b\.fits#z=0: Input/output error"):
        read_image(source, 2)
    failing(OSError(errno.ENOENT, "No such file"))
    assert open_source(tmp_path).problems == ((f"{tmp_path}/b.fits", "cannot be read: No such file"),)
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        read_image(source, 2)
    failing(struct.error("odd"))
    assert open_source(tmp_path).problems == ((f"{tmp_path}/b.fits", "cannot be opened: error: odd"),)


def test_a_series_of_files_stays_together_and_its_gaps_are_said(tmp_path):
    """DICOM files with real headers: three slices of one series, of which one is missing, and one of another."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    for series, number in (("1.2.3", 1), ("1.2.3", 2), ("1.2.3", 4), ("1.2.4", 7), ("", 9), ("", 12)):
        data.SeriesInstanceUID, data.InstanceNumber = series, number
        data.save_as(tmp_path / f"{number:02}.dcm")
    source = open_source(tmp_path)
    assert source.groups().tolist() == [0, 0, 0, 3, 4, 5]
    assert "1 of 2 series have gaps: 1.2.3 lacks number 3" in source.summary


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([1, 3, 5], ""),  # numbers go up by 2
        ([1, 3, 7], "1 of 1 series have gaps: s lacks number 5"),
        ([1, 2, 3, 8], "1 of 1 series have gaps: s lacks number 4, 5, 6 and 1 more"),
        ([1, 2, 1 << 40], ""),  # some slices of many
        ([5], ""),
        ([None, 1, 1], ""),
    ],
)
def test_gaps(numbers, said):
    assert gaps([Layout("YX", (2, 2), "x", series="s", number=number) for number in numbers]) == said


def test_a_series_in_two_classes():
    """Of each class at least one file is for training, though a series has files in both."""
    groups, labels = np.array([0, 0, 0, 1, 2]), ["a", "b", "b", "b", "a"]
    test = choose_test([f"{i}.dcm" for i in range(5)], labels, HeldOut(0.5), groups).tolist()
    assert test[1] == test[2] and sum(test) in (2, 3) and len({test[0], test[4]}) == len({test[1], test[3]}) == 2


@pytest.mark.usefixtures("stacks")
@pytest.mark.parametrize("names", [["a.png", "scan.fits"], [None, None], ["scan.fits", None]])
def test_rows_of_a_dataset(tmp_path, names):
    """Kinds are told by the files' names; without them the first row tells whether the rows are photographs."""
    datasets = pytest.importorskip("datasets")
    write_stack(tmp_path / "scan.fits", "ZYX", stack_values((3, 8, 8)))
    photo().save(tmp_path / "a.png")
    stack, picture = (tmp_path / "scan.fits").read_bytes(), (tmp_path / "a.png").read_bytes()
    rows = [stack, picture] if names[0] == "scan.fits" or names[0] is None else [picture, stack]
    image = [{"bytes": data, "path": name} for data, name in zip(rows, names, strict=True)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": image, "label": ["x", "y"]}, features=features).save_to_disk(tmp_path / "set")
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert len(source) == 4 and sorted(source.labels).count("x" if rows[0] == stack else "y") == 3
    assert sum("#z=" in source.name(i) for i in range(4)) == 3


def test_a_path_is_read_by_the_reader_of_its_folder(stacks, tmp_path):
    transform = EvalTransform((8, 8), (0.5,) * 3, (0.25,) * 3)
    array = stack_values((3, 8, 8))
    write_stack(tmp_path / "one" / "a.fits", "ZYX", array[:1])
    write_stack(tmp_path / "three.fits", "ZYX", array)
    # told by its name
    (tmp_path / "one" / "a.fits").rename(tmp_path / "one" / "a.mgh")
    source = open_source(tmp_path / "one")
    expected = read_image(source, 0)
    assert torch.equal(expected[0], torch.from_numpy(array[0]))
    assert torch.equal(transform.pixels(tmp_path / "one" / "a.mgh"), expected)
    with pytest.raises(BadImage, match="stack ZYX 3x8x8 holds 3 images, one was asked for"):
        transform(tmp_path / "three.fits")


def test_eval_says_that_pictures_of_a_file_are_alike(stacks, tmp_path):
    for name, depth in (("a/1", 3), ("a/2", 3), ("b/3", 3), ("b/4", 1)):
        write_stack(tmp_path / f"{name}.fits", "ZYX", stack_values((depth, 8, 8)))
    source = open_source(tmp_path)
    part = Labeled(source, torch.zeros(len(source), dtype=torch.int64), ("a", "b"))
    features = torch.eye(len(source))
    said = list(data_notes(part, part.subset(torch.arange(7)), features.flip(0), features[:7], 1))
    (note,) = (line for line in said if "files or series" in line)
    assert note.startswith("the 7 measured images are pictures of 3 files or series") and "too narrow" in note
    assert not [
        note
        for note in data_notes(part, part.subset(torch.tensor([0, 3])), features, features[:2], 1)
        if "files or series" in note
    ]
