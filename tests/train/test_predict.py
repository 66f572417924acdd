"""The predict command: classes, probabilities and figures against scikit-learn, what is measured, what is written."""

import copy
import csv
import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

import upstep_fast
from upstep_fast.cli import commands
from upstep_fast.data.loading.skipped_images import csv_cell
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.evaluation import confusion
from upstep_fast.train.finetune import classifier as finetuned
from upstep_fast.train.finetune.learned import are_among, fingerprints

COLORS = {"ash": (200, 90, 90), "birch": (90, 200, 90), "cedar": (90, 90, 200)}
FLAGS = ["--device", "cpu", "--precision", "fp32", "--num-workers", "0"]


def draw(path, color, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-90, 90, (36, 36, 3))
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """CLASS/image, 10 of each of three classes; not to be written to."""
    folder = tmp_path_factory.mktemp("flat")
    for c, (name, color) in enumerate(COLORS.items()):
        for i in range(10):
            draw(folder / name / f"{i:02}.png", color, 100 * c + i)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, model, labeled):
    """A run of finetune on `labeled`, and its result; not to be written to."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    more = dict(method="linear", lr=5e-2, epochs=5, batch_size=8, preset_views="none", cache="memory")
    done = upstep_fast.finetune(model, labeled, out, device="cpu", precision="fp32", num_workers=0, **more)
    return out, done


def call(capsys, *args, code=0):
    with pytest.raises(SystemExit) as stop:
        commands.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert (stop.value.code or 0) == code, err
    return out, err


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def reference(run, files):
    """Return probabilities [N, K] by the loaded model and timm's transform of its base model."""
    from timm.data import create_transform

    net, backbone = finetuned.load(run)
    transform = create_transform(
        (3, *backbone.img_size), interpolation=backbone.interpolation, crop_pct=backbone.crop_pct,
        mean=backbone.mean, std=backbone.std,
    )  # fmt: skip
    with torch.no_grad():
        x = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        return net(x).softmax(1), net.classes


def test_new_images_are_classified_and_measured_as_scikit_learn_does(tuned, tmp_path, capsys):
    run, _ = tuned
    data, out = tmp_path / "new", tmp_path / "p.csv"
    for c, color in enumerate(COLORS.values()):
        for i in range(8):
            draw(data / list(COLORS)[(c + (i == 0)) % 3] / f"{c}{i}.png", color, 5000 + 10 * c + i)  # some are wrong
    text, _ = call(capsys, "predict", run, "--data", data, "--out", out, "--top", 2, *FLAGS)
    header, *rows = read(out)
    assert header == ["path", "class", "probability", "top"] and len(rows) == 24
    expected, classes = reference(run, [row[0] for row in rows])
    for row, p in zip(rows, expected, strict=True):
        assert row[1] == classes[p.argmax()] and float(row[2]) == pytest.approx(p.max().item(), abs=0.02)
        top = json.loads(row[3])
        assert list(top) == [classes[i] for i in p.topk(2).indices] and next(iter(top.values())) == float(row[2])
    truth, predicted = [row[0].split("/")[-2] for row in rows], [row[1] for row in rows]
    assert f"accuracy: {100 * accuracy_score(truth, predicted):.1f} % (95 % interval" in text
    assert f"balanced {100 * balanced_accuracy_score(truth, predicted):.1f}, on 24 labeled images" in text
    header, *table = read(tmp_path / "p-classes.csv")
    assert header == ["class", "images", "predicted", "precision", "recall"]
    precision, recall, _, count = precision_recall_fscore_support(truth, predicted, labels=classes)
    for i, row in enumerate(table):
        assert row[:2] == [classes[i], str(count[i])] and int(row[2]) == predicted.count(classes[i])
        assert [float(x) for x in row[3:]] == pytest.approx([precision[i], recall[i]], abs=1e-5)
    header, *matrix = read(tmp_path / "p-confusion.csv")
    assert header == ["true class", *classes] and [row[0] for row in matrix] == list(classes)
    assert np.array_equal(
        np.array([row[1:] for row in matrix], int), confusion_matrix(truth, predicted, labels=classes)
    )
    assert not list(tmp_path.glob(".*"))


def test_no_accuracy_is_measured_on_what_the_model_has_learned_from(tuned, labeled, tmp_path, capsys):
    run, done = tuned
    # the folder of the training itself: the images that finetune held out for testing are left, as in its result
    text, err = call(capsys, "predict", run, "--data", labeled, "--out", tmp_path / "p.csv", *FLAGS)
    assert len(read(tmp_path / "p.csv")) == 31
    assert "24 of 30 labeled images are left out of the accuracy, as the model has learned from them" in err
    assert f"accuracy: {done.metrics['top1']:.1f} % (95 % interval" in text and "on 6 labeled images" in text
    # under other names and elsewhere
    for number, file in enumerate(sorted((labeled / "ash").iterdir())):
        (tmp_path / "copy" / "cedar").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "copy" / "cedar" / f"x{number}.png")
    text, err = call(capsys, "predict", run, "--data", tmp_path / "copy", "--out", tmp_path / "q.csv", *FLAGS)
    assert "8 of 10 labeled images are left out" in err and "on 2 labeled images" in text


def test_an_older_model_says_that_it_does_not_know(tuned, labeled, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(tuned[0] / "model", old)
    values = json.loads((old / finetuned.CONFIG).read_text())
    del values["learned_sha256"]
    (old / finetuned.CONFIG).write_text(json.dumps(values))
    (old / finetuned.LEARNED).unlink()
    text, err = call(capsys, "predict", old, "--data", labeled, "--out", tmp_path / "p.csv", *FLAGS)
    assert "does not tell which images it has learned from" in err and "on 30 labeled images" in text


def test_a_record_of_another_run_is_refused(tuned, labeled, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tuned[0] / "model", other)
    (other / finetuned.LEARNED).write_bytes(b"x" * 100)
    _, err = call(capsys, "predict", other, "--data", labeled, "--out", tmp_path / "p.csv", *FLAGS, code=2)
    assert "learned.safetensors is not what config.json was written for" in err and not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize("kind", ["no folders", "other folders", "list"])
def test_without_labels_of_the_model_nothing_is_measured(tuned, labeled, tmp_path, capsys, kind):
    data, out = tmp_path / "data", tmp_path / "p.csv"
    folder = data / "2021" if kind == "other folders" else data
    for i in range(3):
        draw(folder / f"{'=1+1' if i == 0 else i}.png", COLORS["ash"], 77 + i)
    if kind == "list":
        (data / "list.txt").write_text("1.png\n2.png\n")
    given = data / "list.txt" if kind == "list" else data
    # tables of an earlier command do not stay beside new predictions
    for name in ("p.csv", "p-classes.csv", "p-confusion.csv"):
        (tmp_path / name).write_text("old")
    _, err = call(capsys, "predict", tuned[0], "--data", given, "--out", out, *FLAGS, code=2)
    assert "exists; choose another name or add --overwrite" in err and out.read_text() == "old"
    text, err = call(capsys, "predict", tuned[0], "--data", given, "--out", out, "--overwrite", *FLAGS)
    assert "accuracy" not in text and sorted(p.name for p in tmp_path.glob("p*")) == ["p.csv"]
    assert ("no images of 2021 are measured, as no image has a class of the model" in err) == (kind == "other folders")
    files = ["1.png", "2.png"] if kind == "list" else ["1.png", "2.png", "=1+1.png"]
    assert [row[0] for row in read(out)[1:]] == [csv_cell(str(folder / file)) for file in files]


def test_cells_that_a_spreadsheet_would_run_are_text(tuned, tmp_path, capsys, monkeypatch):
    draw(tmp_path / "=1+1.png", COLORS["ash"], 1)
    draw(tmp_path / "a\n\x1b[2J.png", COLORS["ash"], 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("=1+1.png\n")
    call(capsys, "predict", tuned[0], "--data", ".", "--out", "p.csv", *FLAGS)
    cells = [row[0] for row in read(tmp_path / "p.csv")[1:]]
    assert cells == [csv_cell("./=1+1.png"), csv_cell("./a\n\x1b[2J.png")] and "\x1b" not in "".join(cells)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--out": "p.txt"}, 2, "out: got .*p.txt, must end in .csv"),
        ({"--out": "none/p.csv"}, 2, "out: no folder .*none"),
        ({"--top": "0"}, 2, "top: got 0, must be at least 1"),
        ({"--data": "nowhere"}, 3, "nowhere"),
        ({"run": "nowhere"}, 2, "nowhere holds no config.json; give the folder of a run of finetune"),
        ({"--model": "local-dir:nowhere"}, 2, "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line(tuned, labeled, tmp_path, capsys, change, code, message):
    values = {"run": tuned[0], "--data": labeled, "--out": "p.csv"} | change
    values["--out"] = tmp_path / values["--out"]
    args = [part for flag, value in values.items() if flag != "run" for part in (flag, value)]
    _, err = call(capsys, "predict", values["run"], *args, *FLAGS, code=code)
    assert re.search(message, err) and err.count("upstep-fast: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_names_the_command_that_works(model, labeled, tmp_path, capsys):
    data = tmp_path / "my photos"
    shutil.copytree(labeled, data)
    args = ["--method", "linear", "--epochs", "1", "--batch-size", "8", *FLAGS]
    text, _ = call(capsys, "finetune", "--model", model, "--data", data, "--out", tmp_path / "run", *args)
    command = next(line for line in text.splitlines() if line.startswith("next: upstep-fast predict "))
    text, _ = call(capsys, *shlex.split(command)[2:], *FLAGS)
    assert "on 6 labeled images" in text and (tmp_path / "run" / "predictions-confusion.csv").exists()


def test_figures_of_classes_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 5, 9):
        truth, predicted = (torch.randint(classes - 1, (60,), generator=generator) for _ in range(2))
        predicted[:5] = classes - 1  # a class without images
        got = confusion.class_figures(predicted, truth, classes)
        expected = precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=np.nan)
        for mine, other in zip((got.precision, got.recall, got.images), (*expected[:2], expected[3]), strict=True):
            assert np.allclose(mine, other, equal_nan=True)
        matrix = confusion.confusion_matrix(predicted, truth, classes)
        assert np.array_equal(matrix, confusion_matrix(truth, predicted, labels=range(classes)))
        assert math.isnan(got.recall[-1])


def test_images_are_known_again_by_content_alone(tmp_path):
    for name, data in (("a", b"one"), ("b", b"two"), ("c", b"four"), ("d", b"one")):
        (tmp_path / f"{name}.png").write_bytes(data)
    source = open_source(tmp_path)
    known = fingerprints(source, [0], 0)
    assert known.tolist()[0][0] == 3 and torch.equal(known, fingerprints(source, [3], 2))
    assert are_among(source, range(4), known, 0).tolist() == [True, False, False, True]
    (tmp_path / "d.png").unlink()
    assert fingerprints(source, [3], 0).tolist() == [[-1, 0]]
    assert are_among(source, [3, 0], torch.cat([known, torch.tensor([[-1, 0]])]), 0).tolist() == [False, True]
    assert are_among(source, [], known, 0).tolist() == []


def test_the_loaded_model_predicts_as_the_command(tuned, labeled, tmp_path, capsys):
    call(capsys, "predict", tuned[0], "--data", labeled, "--out", tmp_path / "p.csv", *FLAGS)
    _, *rows = read(tmp_path / "p.csv")
    net = copy.deepcopy(upstep_fast.load_finetuned(tuned[0]))
    found = net.train().predict(labeled, batch_size=7, num_workers=0)
    assert net.training and [(p.path, p.label) for p in found] == [(row[0], row[1]) for row in rows]
    assert [p.probability for p in found] == pytest.approx([float(row[2]) for row in rows], abs=1e-4)
    assert net.predict([labeled / "ash" / "01.png"])[0].path == str(labeled / "ash" / "01.png")
    net.frames = 4
    with pytest.raises(ConfigError, match="classifies clips"):
        net.predict(labeled)


def test_logits_that_are_not_finite_are_refused(tuned, labeled):
    net = upstep_fast.load_finetuned(tuned[0])
    net.head.bias[1] = torch.nan
    with pytest.raises(RunFailedError, match=r"logits of .*ash/00.png are not finite"):
        net.predict(labeled, num_workers=0)


def test_clips_are_refused_by_name(tuned, labeled, tmp_path, capsys, monkeypatch):
    real = finetuned.load

    def of_clips(*args, **keywords):
        net, backbone = real(*args, **keywords)
        net.frames = 4
        return net, backbone

    monkeypatch.setattr(finetuned, "load", of_clips)
    _, err = call(capsys, "predict", tuned[0], "--data", labeled, "--out", tmp_path / "p.csv", *FLAGS, code=2)
    assert "classifies clips" in err
