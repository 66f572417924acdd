"""Image panels of the report: compared with scikit-learn, escaped, small and deterministic."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapt_configs import upstep_config
from markupsafe import escape
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

import upstep_fast
from upstep_fast.data.loading.skipped_images import write_skipped
from upstep_fast.report import charts, image_panels, neighbors, pca_plot, run_record
from upstep_fast.report import page as report_page
from upstep_fast.report.charts import Bar

ROWS = [dict(step=i, loss=5.0, center=0.5, open=i % 2 == 0, lr=1e-3, bad=None, images_per_s=10.0, data_wait=0.1,
             forward_s=0.2, backward_s=0.6, other_s=0.1, epoch=0, replaced=0) for i in range(4)]  # fmt: skip


def some_features(n=40, d=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator) * torch.linspace(3, 0.1, d)
    return torch.nn.functional.normalize(x, dim=-1)


def test_pca_matches_scikit_learn():
    x = some_features()
    ours, theirs = pca_plot.principal(x).numpy(), PCA(2, svd_solver="full").fit_transform(x.double().numpy())
    # an axis has no direction of its own
    for axis in range(2):
        sign = np.sign(ours[:, axis] @ theirs[:, axis])
        np.testing.assert_allclose(ours[:, axis], sign * theirs[:, axis], atol=1e-9)


def test_pca_does_not_depend_on_the_signs_of_svd():
    x = some_features()
    turned = pca_plot.principal(torch.cat([x[20:], x[:20]]))
    torch.testing.assert_close(torch.cat([turned[20:], turned[:20]]), pca_plot.principal(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("x", [torch.ones(5, 3), torch.ones(1, 3), torch.eye(2), torch.tensor([[1.0], [2.0], [3.0]])])
def test_features_without_two_directions_have_points(x):
    points = pca_plot.principal(x)
    assert points.shape == (len(x), 2) and points.isfinite().all()
    assert "nan" not in pca_plot.plot(points.tolist(), points.tolist(), ["n"] * len(x))


def test_neighbors_match_scikit_learn():
    x = some_features()
    queries = [0, 7, 39]
    theirs = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x.numpy()).kneighbors(x[queries].numpy())[1]
    for query, ours, found in zip(queries, neighbors.nearest(x, queries, 5), theirs, strict=True):
        assert ours == [i for i in found.tolist() if i != query][:5]
    # equal images: the lower number first, never the image itself
    assert neighbors.nearest(torch.ones(4, 2), [1], 5) == [[0, 2, 3]]
    assert neighbors.nearest(x[:1], [0], 5) == [[]] and neighbors.nearest(x, [], 5) == []


def test_the_images_are_spread_evenly():
    assert image_panels.spread(5, 512) == [0, 1, 2, 3, 4]
    assert image_panels.spread(1000, 4) == [0, 250, 500, 750] and image_panels.spread(0, 8) == []
    assert len(set(image_panels.spread(1465, 512))) == 512


def test_a_thumbnail_is_a_small_copy_of_the_image():
    image = torch.zeros(3, 100, 50, dtype=torch.uint8)
    image[0, :50] = 255
    data = io.BytesIO(base64.b64decode(image_panels.thumbnail(image)))
    small = np.asarray(Image.open(data).convert("RGB")).astype(int)
    assert small.shape == (64, 32, 3)
    assert np.abs(small[8] - [255, 0, 0]).max() < 24 and small[-8].max() < 24
    for channels in (1, 2, 5):
        assert image_panels.thumbnail(torch.zeros(channels, 8, 8, dtype=torch.uint8))


def test_a_dot_has_the_place_and_color_of_its_point():
    points = [[0.0, 0.0], [1.0, 2.0], [4.0, 1.0]]
    svg = pca_plot.plot(points, [[3.0, 0], [2.0, 0], [1.0, 0]], ["a", "<b>", "c"])
    dots = re.findall(r'class="dot c(\d)" cx="([\d.]+)" cy="([\d.]+)"', svg)
    x, y = ([float(d[i]) for d in dots] for i in (1, 2))
    assert x[0] < x[1] < x[2] and x[1] - x[0] == pytest.approx((x[2] - x[0]) / 4, abs=0.1)
    assert y[0] > y[2] > y[1]  # up is more
    assert [int(d[0]) for d in dots] == [4, 2, 0] and "<b>" not in svg
    assert re.findall(r'href="#t(\d)"', svg) == ["0", "1", "2"]


def test_bars_and_their_errors_have_their_lengths():
    svg = charts.bar_chart("%", [Bar("k-NN", "base", 50.0, 10.0), Bar("k-NN", "adapted", 100.0, None)])
    heights = [float(h) for h in re.findall(r'class="bar c\d"[^>]*height="([\d.]+)"', svg)]
    assert heights[0] == pytest.approx(heights[1] / 2, abs=0.1)
    high, low = map(float, re.search(r'class="whisker" d="M[\d.]+,([\d.]+)V([\d.]+)', svg).groups())
    assert low - high == pytest.approx(0.2 * heights[1], abs=0.2) and svg.count("whisker") == 1
    assert "base: 50.0 ± 10.0" in svg


def test_time_shares_of_the_steps(tmp_path):
    folder = a_run(tmp_path)
    shares = run_record.time_shares(run_record.read_record(folder))
    assert shares == pytest.approx({"data": 0.1, "forward": 0.2, "backward": 0.6, "gaps": 0.1})
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="24"', charts.share_bar(list(shares.items())))]
    assert [w / sum(widths) for w in widths] == pytest.approx(list(shares.values()), abs=1e-3)
    # runs of versions that did not measure it
    old = [{k: v for k, v in row.items() if k not in ("forward_s", "backward_s", "other_s")} for row in ROWS]
    assert run_record.time_shares(run_record.read_record(a_run(tmp_path / "old", old))) == {}


def a_run(folder, rows=ROWS):
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text('model = "m"\ndata = ["d"]\nout = "o"\nsteps = 4\nbatch_size = 10\n')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(model, photos, tmp_path_factory):
    """A real run on data with copies, a blank image and a damaged one."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "photos"
    shutil.copytree(photos, data)
    shutil.copy(data / "00.png", data / "copy.png")
    Image.new("RGB", (40, 40), (9, 9, 9)).save(data / "blank.png")
    (data / "broken.png").write_text("no image")
    options = dict(model=model, data=data, out=folder / "out", steps=2, batch_size=8, prototypes=8, precision="fp32")
    upstep_fast.adapt(**options, device="cpu", num_workers=0, max_bad_fraction=0.5, triage=True)
    return folder


def test_a_run_writes_image_panels(finished):
    found = image_panels.read_panels(finished / "out")
    # 24 photographs; triage left the copy and the blank one out
    assert found is not None and len(found.names) == 24 and len(found.queries) == 8
    assert found.points["before"] != found.points["after"]
    assert all(len(row) == 5 for rows in found.neighbours.values() for row in rows)
    odd = {name.rsplit("/", 1)[-1] for name in found.odd}
    assert {"blank.png", "copy.png"} <= odd and "broken.png" not in odd
    assert (finished / "out" / image_panels.NAME).stat().st_size < 200_000


def test_the_page_is_rendered_again_without_model_and_images(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "moved")
    before = (tmp_path / "moved" / "report.html").read_text()
    after = report_page.write(tmp_path / "moved").read_text()

    def but_for_the_folder(page):
        for folder in (tmp_path / "moved", finished / "out"):
            page = page.replace(str(folder), "FOLDER").replace(f">{folder.name}<", ">NAME<")
        return re.sub("<title>.*?</title>", "", page)

    assert but_for_the_folder(before) == but_for_the_folder(after)
    for title in ("Nearest neighbors", "Images in feature space", "Where the time went", "Skipped images"):
        assert f"<h2>{title}" in after
    assert after.count('class="hover"') == 2 * 24 and "copy" in after and len(after) < 3e6


def test_image_panels_are_deterministic(finished, monkeypatch):
    from upstep_fast.config.adapt import AdaptConfig
    from upstep_fast.config.files import read_toml
    from upstep_fast.data.sources.source import open_source
    from upstep_fast.runtime.device import resolve

    values = read_toml(finished / "out" / "config.toml", AdaptConfig)
    config = upstep_config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    source, compute = open_source(config.data.paths), resolve("cpu", "fp32")
    looks = [image_panels.compute_panels(config, compute, source, finished / "out") for _ in range(2)]
    assert looks[0] == looks[1] and looks[0].odd == image_panels.read_panels(finished / "out").odd
    # an error is logged and does not end the run
    monkeypatch.setattr(image_panels, "compute_panels", lambda *a, **k: 1 / 0)
    image_panels.collect(config, compute, source, finished / "out")


def test_patch_tokens_are_shown_before_and_after(finished):
    panels = image_panels.read_panels(finished / "out")
    assert len(panels.colored) == image_panels.COLORED and set(panels.tokens) == {"before", "after"}
    assert all(len(pictures) == image_panels.COLORED for pictures in panels.tokens.values())
    before, after = (Image.open(io.BytesIO(base64.b64decode(panels.tokens[when][0]))) for when in ("before", "after"))
    assert before.size == after.size == (32, 32)  # the model's input
    page = (finished / "out" / "report.html").read_text()
    assert "Patch tokens" in page and page.count("<title>tokens of") == 2 * image_panels.COLORED
    written = json.loads((finished / "out" / image_panels.NAME).read_text())
    earlier = {key: value for key, value in written.items() if key not in ("colored", "tokens")}
    assert image_panels._checked(earlier).colored == []  # of a run of an earlier version


def test_image_panels_can_be_turned_off(model, photos, tmp_path):
    options = dict(model=model, data=photos, out=tmp_path, steps=2, batch_size=8, prototypes=8, precision="fp32")
    upstep_fast.adapt(**options, device="cpu", report_images=False)
    assert not (tmp_path / image_panels.NAME).exists()
    assert "Nearest neighbors" not in (tmp_path / "report.html").read_text()


def good():
    thumb = image_panels.thumbnail(torch.zeros(3, 8, 8, dtype=torch.uint8))
    near = {"before": [[1]], "after": [[0]]}
    points = {"before": [[0.0, 1.0], [2.0, 1.0]], "after": [[0.0, 1.0], [2.0, 1.0]]}
    return image_panels.ImagePanels(["a", "b"], [thumb, thumb], points, [0], near, {"a": thumb})


@pytest.mark.parametrize(
    "wrong",
    [
        dict(thumbs=['"/><script>alert(1)</script>', "x"]),
        dict(thumbs=["AAAA" * 9]),
        dict(points={"before": [[0, 0]], "after": [[0, 0]]}),
        dict(points={"before": [[0, 0], [float("nan"), 0]], "after": [[0, 0], [0, 0]]}),
        dict(colored=[0]),
        dict(colored=[0], tokens={"before": [], "after": []}),
        dict(colored=[2], tokens={"before": ["A" * 16], "after": ["A" * 16]}),
        dict(colored=[0], tokens={"before": ['"><script>'], "after": ["A" * 16]}),
        dict(queries=[2]),
        dict(queries=["0"]),
        dict(neighbours={"before": [[9]], "after": [[0]]}),
        dict(neighbours={"before": [], "after": [[0]]}),
        dict(odd={"a": "javascript:"}),
        dict(names=[]),
        dict(names=None),
    ],
)
def test_a_damaged_file_gives_no_image_panels(tmp_path, wrong):
    (tmp_path / image_panels.NAME).write_text(json.dumps(vars(good())))
    assert image_panels.read_panels(tmp_path) == good()
    (tmp_path / image_panels.NAME).write_text(json.dumps(vars(replace(good(), **wrong))))
    assert image_panels.read_panels(tmp_path) is None
    (tmp_path / image_panels.NAME).write_text("[1, 2")
    assert image_panels.read_panels(tmp_path) is None and image_panels.read_panels(tmp_path / "none") is None


def test_untrusted_names_are_escaped(tmp_path):
    bad = '"><script>alert(1)</script>'
    folder = a_run(tmp_path)
    found = replace(good(), names=[bad, "b"], odd={bad: good().odd["a"]})
    (folder / image_panels.NAME).write_text(json.dumps(vars(found)))
    write_skipped(folder / "skipped.csv", [(bad, bad)])
    page = report_page.write(folder).read_text()
    assert "<script" not in page and str(escape(bad)) in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def test_a_browser_shows_the_page(finished, tmp_path):
    browser = os.environ.get("UPSTEP_FAST_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here (set UPSTEP_FAST_CHROMIUM to one)")
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1180,3000", f"--screenshot={shot}"]
    url = (finished / "out" / "report.html").resolve().as_uri()
    subprocess.run([browser, *flags, url], check=True, timeout=120, cwd=tmp_path)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (3000, 1180)
    # thumbnails are drawn: many colors that the page's own palette does not have
    assert len(np.unique(pixels.reshape(-1, 3) // 32, axis=0)) > 60
