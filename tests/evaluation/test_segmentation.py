"""Segmentation by nearest neighbors: closed forms, and the measures of scikit-learn and torchmetrics."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from torchmetrics.functional import jaccard_index

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.data.labeled.masks import decode_mask
from upstep_fast.data.views.resize import eval_resize, eval_resize_labels
from upstep_fast.errors import BadImage, ConfigError, DataError
from upstep_fast.evaluation.dense.measure import _jackknife
from upstep_fast.evaluation.dense.segmentation import (
    IGNORED,
    counts_of,
    iou_of,
    knn_votes,
    label_maps,
    miou_of,
    on_grid_area,
    patch_labels,
    pixel_accuracy_of,
)


def random_maps(seed=0, classes=5, n=6):
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (n, 12, 10), generator=g)
    found = torch.where(
        torch.rand(truth.shape, generator=g) < 0.6, truth, torch.randint(0, classes, truth.shape, generator=g)
    )
    truth[torch.rand(truth.shape, generator=g) < 0.1] = IGNORED
    return found, truth


def test_iou_and_accuracy_are_those_of_scikit_learn_and_torchmetrics():
    found, truth = random_maps()
    counts = counts_of(found, truth, 7)  # classes 5 and 6 occur nowhere
    counted = truth != IGNORED
    y, p = truth[counted].numpy(), found[counted].numpy()
    expected = jaccard_score(y, p, average=None, labels=range(5))
    np.testing.assert_allclose(iou_of(counts)[:5], expected, atol=1e-12)
    assert iou_of(counts)[5:].isnan().all()
    assert float(miou_of(counts)) == pytest.approx(expected.mean(), abs=1e-12)
    assert float(pixel_accuracy_of(counts)) == pytest.approx(accuracy_score(y, p), abs=1e-12)
    theirs = jaccard_index(found, truth, "multiclass", num_classes=5, ignore_index=IGNORED)
    assert float(miou_of(counts)) == pytest.approx(float(theirs), abs=1e-6)


def test_a_class_that_is_only_predicted_counts_as_zero():
    counts = counts_of(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0]), 3)
    assert iou_of(counts)[[0, 2]].tolist() == [2 / 3, 0] and float(miou_of(counts)) == pytest.approx(1 / 3)


def test_counts_add_up_and_the_jackknife_leaves_one_out():
    found, truth = random_maps(1)
    each = torch.stack([counts_of(p, t, 5) for p, t in zip(found, truth, strict=True)])
    assert torch.equal(each.sum(0), counts_of(found, truth, 5))
    one = _jackknife(each, miou_of)
    assert one.value == pytest.approx(float(miou_of(counts_of(found, truth, 5))))
    expected = [
        float(miou_of(counts_of(found[torch.arange(6) != i], truth[torch.arange(6) != i], 5))) for i in range(6)
    ]
    assert one.without.tolist() == pytest.approx(expected)


def test_the_label_of_a_patch_is_its_most_frequent():
    mask = torch.tensor([[0, 0, 1, 2, 255, 255], [0, 1, 2, 1, 255, 255], [3, 255, 3, 3, 1, 1], [255, 255, 0, 3, 1, 0]])
    assert patch_labels(mask[None], (2, 2)).tolist() == [[[0, 1, IGNORED], [3, 3, 1]]]  # of 1 and 2, equal, the lower
    assert patch_labels(torch.full((1, 4, 4), IGNORED), (2, 2)).unique().tolist() == [IGNORED]
    assert patch_labels(mask[None], (4, 3)).shape == (1, 1, 2)


def test_the_area_of_the_grid():
    mask = torch.arange(12).view(1, 3, 4)
    assert torch.equal(on_grid_area(mask, (1, 2), (2, 2)), mask[:, :2])  # the last row is in no patch
    padded = on_grid_area(mask, (2, 3), (2, 2))
    assert padded.shape == (1, 4, 6) and torch.equal(padded[:, :3, :4], mask)
    assert (padded[:, 3] == IGNORED).all() and (padded[:, :, 4:] == IGNORED).all()


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("temperature", [0.07, math.inf])
def test_votes_are_those_of_the_definition(k, temperature):
    g = torch.Generator().manual_seed(k)
    bank, queries = (F.normalize(torch.randn(n, 8, generator=g, dtype=torch.float64), dim=-1) for n in (40, 9))
    labels = torch.randint(0, 4, (40,), generator=g)
    votes = knn_votes(bank.float(), labels, queries.float(), 4, k, temperature)
    for q, vote in zip(queries, votes, strict=True):
        similarity = bank @ q
        best = similarity.argsort(descending=True)[:k]
        weights = ((similarity[best] - 1) / temperature).exp() if temperature != math.inf else torch.ones(len(best))
        expected = torch.stack([weights[labels[best] == c].sum() for c in range(4)])
        np.testing.assert_allclose(vote, expected / expected.sum(), atol=1e-5)
    sklearn = pytest.importorskip("sklearn.neighbors")
    if temperature == math.inf and k < 40:
        model = sklearn.KNeighborsClassifier(k).fit(bank.numpy(), labels.numpy())
        np.testing.assert_allclose(votes[:, model.classes_], model.predict_proba(queries.numpy()), atol=1e-6)


def test_label_maps_interpolate_the_votes():
    votes = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])  # one row: class 0, then class 1
    assert label_maps(votes, (2, 8))[0].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (20, 21), (32, 32)])
def test_masks_are_cropped_as_images_are(size, mode, shape):
    """An image whose gray values are its classes, in large areas: away from their edges both are the same."""
    image = torch.zeros(1, *shape, dtype=torch.uint8)
    image[:, shape[0] // 3 :, : shape[1] // 2] = 200
    x = eval_resize(image, size, "bilinear", 0.875, mode)[0]
    y = eval_resize_labels(image[0], size, 0.875, mode, fill=0)
    assert y.shape == x.shape == size and set(y.unique().tolist()) <= {0, 200}
    flat = (x == 0) | (x == 200)
    assert flat.float().mean() > 0.7 and torch.equal(x[flat], y[flat])


def png(values, mode=None):
    file = io.BytesIO()
    image = Image.fromarray(values) if mode is None else Image.fromarray(values).convert(mode)
    image.save(file, "PNG")
    return file.getvalue()


def test_masks_hold_class_numbers():
    values = np.array([[0, 1, 2], [254, 255, 7]], np.uint8)
    palette = Image.fromarray(values, "P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    file = io.BytesIO()
    palette.save(file, "PNG")
    for data in (png(values), png(values.astype(np.uint16)), png(np.stack([values] * 3, -1)), file.getvalue()):
        assert decode_mask(data).tolist() == values.tolist()
    assert decode_mask(png(np.array([[True, False]]))).tolist() == [[1, 0]]
    for data, text in (
        (png(np.dstack([values, values, values + 1])), "has colors"),
        (png(np.full((2, 2), 300, np.uint16)), "has class 300"),
        (b"no image", "not an image"),
        (png(values)[:-30], "truncated|cannot"),
    ):
        with pytest.raises(BadImage, match=text):
            decode_mask(data)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Dark images with a bright rectangle, and its masks; an edge of 255 that does not count."""
    folder = tmp_path_factory.mktemp("scenes")
    g = np.random.default_rng(0)
    for i in range(20):
        mask = np.zeros((48, 40), np.uint8)
        y, x = g.integers(0, 3, 2) * 8
        mask[y : y + 24, x : x + 20] = 1
        image = g.integers(0, 40, (48, 40, 3)) + 180 * mask[..., None]
        mask[0] = 255
        for name, values in (
            (f"photos/{i % 2}/{i:02}.png", image.astype(np.uint8)),
            (f"masks/{i % 2}/{i:02}.png", mask),
        ):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    return folder


def test_eval_measures_masks(scenes, model, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        args = ["--masks", str(scenes / "masks"), "--seed", "1", "--device", "cpu", "--json", str(tmp_path / "s.json")]
        main(["eval", "--model", model, "--data", str(scenes / "photos"), *args])
    assert stop.value.code == 0
    result, out = json.loads((tmp_path / "s.json").read_text()), capsys.readouterr().out
    assert "mIoU" in out and "pixel accuracy, whitened" in out
    assert result["n_train"] == 16 and result["n_test"] == 4 and result["k"] == 20
    assert result["base"]["miou"] == pytest.approx(sum(result["iou"]["base"].values()) / 2)
    assert 55 < result["base"]["miou"] < 100 and result["base"]["pixel_accuracy"] > 80  # far above chance
    low, high = result["intervals"]["base"]["miou"]
    assert low < result["base"]["miou"] < high


def test_train_and_test_folders_are_the_split(scenes, model, tmp_path):
    for kind in ("photos", "masks"):
        shutil.copytree(scenes / kind / "0", tmp_path / kind / "train" / "x")
        shutil.copytree(scenes / kind / "1", tmp_path / kind / "test" / "x")
    result = upstep_fast.evaluate(model, tmp_path / "photos", masks=tmp_path / "masks", k=5, device="cpu")
    assert (result["n_train"], result["n_test"], result["k"]) == (10, 10, 5)


def test_bad_masks_are_one_line(scenes, model, tmp_path):
    def run(**options):
        return upstep_fast.evaluate(model, scenes / "photos", device="cpu", **options)

    with pytest.raises(DataError, match=r"masks: .*nowhere"):
        run(masks=tmp_path / "nowhere")
    some = Path(shutil.copytree(scenes / "masks", tmp_path / "some"))
    (some / "0" / "04.png").unlink()
    with pytest.raises(
        DataError, match=r"1 of 16 images have none in .*some; the first, .*04.png, needs 0/04.png there"
    ):
        run(masks=some)
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(some / "0" / "04.png")
    with pytest.raises(DataError, match=r"04.png is 48 x 40 pixels, .*04.png is 40 x 48, upright"):
        run(masks=some)
    (some / "0" / "04.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"masks: .*04.png: .*repair it"):
        run(masks=some)
    for path in some.glob("*/*.png"):
        Image.fromarray(np.zeros((48, 40), np.uint8)).save(path)
    with pytest.raises(DataError, match="the train part has 1 classes"):
        run(masks=some)
    with pytest.raises(ConfigError, match="source: forgetting is not measured with --masks"):
        run(masks=some, source=str(scenes / "photos"))


def test_the_study_check_is_what_it_was(bench):
    """Its recorded figures are of code of its own: majority of patches and neighbors, mean IoU of two classes."""
    dense = bench("dense")
    g = torch.Generator().manual_seed(0)
    bank, queries = (F.normalize(torch.randn(n, 4, generator=g), dim=-1) for n in (300, 200))
    masks = torch.rand(5, 16, 16, generator=g) < 0.5
    labels = torch.rand(300, generator=g) < 0.5
    assert torch.equal(patch_labels(masks.long(), (4, 4)).bool(), F.avg_pool2d(masks[:, None].float(), 4)[:, 0] > 0.5)
    found = dense.segment(bank, labels.long(), queries, 20)
    assert torch.equal(found.bool(), labels[(queries @ bank.T).topk(20).indices].float().mean(1) > 0.5)
    truth = torch.rand(200, generator=g) < 0.5
    parts = [(found.bool() == c, truth == c) for c in (True, False)]
    expected = 100 * sum(float((f & t).sum() / (f | t).sum()) for f, t in parts) / 2
    assert dense.mean_iou(found, truth.long()) == pytest.approx(expected, abs=1e-4)
