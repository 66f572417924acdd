"""The study: grids, resuming, the split that configurations are chosen on, figures, the dense check."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from adapt_configs import upstep_config
from PIL import Image
from scipy.stats import spearmanr

from upstep_fast.data.sources.source import open_source
from upstep_fast.evaluation import whitening

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Two colors, 24 and 12 images of each."""
    folder = tmp_path_factory.mktemp("labeled")
    generator = np.random.default_rng(0)
    for split, num in (("train", 24), ("test", 12)):
        for name, color in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(num):
                pixels = np.clip(np.array(color) + 40 * generator.standard_normal((40, 40, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:02}.png")
    return folder


@pytest.fixture
def grid(model, labeled, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(f"""
        model = "{model}"
        data = ["{labeled}"]
        source = "{labeled}"
        seeds = [0, 1]
        strengths = [0.5]
        probes = [4.0]
        k = 3
        [base]
        steps = 3
        batch_size = 8
        prototypes = 4
        head_hidden = 16
        head_dim = 8
        gate = "none"
        num_workers = 0
        [configs.plain]
        cvr = "off"
        [configs.cvr]
        cvr = "sq"
        cvr_weight = [1, 5]
        lora_targets = [["q", "v"], ["qkv"]]
    """)
    return path


def test_a_list_is_a_sweep_and_every_job_has_its_own_key(bench, grid):
    jobs = bench("study").read_grid(grid)
    names = [job.name for job in jobs if job.seed == 0]
    assert names[0] == "plain" and len(names) == 5 and len(jobs) == 10
    assert names[1] == "cvr cvr_weight=1 lora_targets=['q', 'v']"
    assert jobs[1].options["lora_targets"] == ["q", "v"] and jobs[1].options["steps"] == 3
    assert len({job.key for job in jobs}) == 10
    assert all(job.strengths == (0.5, 1.0) for job in jobs)


def test_the_key_is_of_configuration_data_and_seed_not_of_the_name(bench, grid):
    study = bench("study")
    before = [job.key for job in study.read_grid(grid)]
    grid.write_text(grid.read_text().replace("[configs.plain]", "[configs.renamed]"))
    assert [job.key for job in study.read_grid(grid)] == before
    grid.write_text(grid.read_text().replace("steps = 3", "steps = 4"))
    assert not {job.key for job in study.read_grid(grid)} & set(before)


def test_unknown_keys_are_refused(bench, grid):
    text = grid.read_text()
    grid.write_text(text.replace("seeds", "sedes"))
    with pytest.raises(ValueError, match="unknown sedes"):
        bench("study").read_grid(grid)
    grid.write_text(text.replace("prototypes = 4", "prototype = 4"))
    with pytest.raises(ValueError, match="prototype"):
        bench("study").read_grid(grid)


def test_configurations_are_chosen_on_a_third_of_train_and_see_no_test_image(bench, labeled, tmp_path):
    path = bench("study").selection(str(labeled), tmp_path)
    parts = {split: open_source(path, split=split) for split in ("train", "test")}
    contents = {s: {parts[s].read(i) for i in range(len(parts[s]))} for s in parts}
    train = {file.read_bytes() for file in (labeled / "train").rglob("*.png")}
    assert contents["train"] | contents["test"] == train and not contents["train"] & contents["test"]
    assert 5 <= len(contents["test"]) <= 27  # of 48: 16 expected, a standard deviation is 3.3
    assert sorted(set(parts["test"].labels)) == ["blue", "red"]
    assert bench("study").selection(str(labeled), tmp_path) == path


def test_rows_are_kept_and_what_has_one_is_not_run_again(bench, grid, tmp_path, capsys, monkeypatch):
    study = bench("study")
    grid.write_text(grid.read_text().replace("seeds = [0, 1]", "seeds = [0]").replace("[1, 5]", "5"))
    grid.write_text(grid.read_text().replace('[["q", "v"], ["qkv"]]', '["q"]'))
    out, work = tmp_path / "rows.jsonl", tmp_path / "work"
    monkeypatch.setattr(study, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(sys, "argv", ["study.py", str(grid), "--out", str(out), "--work", str(work)])
    assert study.main() == 0
    rows = study.read_rows(out)
    assert {(row["name"], row["split"]) for row in rows} == {("plain", "select"), ("cvr", "select")}
    for row in rows:
        assert row["skip_rate"] == 0 and row["backward_passes"] == 3 and row["images_seen"] == 24
        assert row["n_bank"] + row["n_queries"] == 48
        at = row["at"]["1.0"]
        assert {"adapted", "ensemble", "source", "judgement"} <= at.keys() and at["adapted"].keys() == {"knn", "linear"}
        assert row["base_whitened"]["knn"] == at["ensemble_whitened"]["knn"] == 100
        assert {"ensemble_whitened", "ensemble_whitened_se", "adapted_whitened"} <= at["source"].keys()
        # two colors: any features tell them apart
        assert row["base"]["knn"] == at["ensemble"]["knn"] == 100
        assert row["at"]["4.0"].keys() == {"judgement", "adapted"}
    # a killed study leaves half a line behind
    with out.open("a") as file:
        file.write('{"key": "half')
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--test", "cvr"])
    assert study.main() == 0
    assert "3 rows asked for, 1 to run" in capsys.readouterr().out
    rows = study.read_rows(out)
    assert (rows[2]["name"], rows[2]["split"], rows[2]["n_bank"], rows[2]["n_queries"]) == ("cvr", "test", 48, 24)
    selected = next(row for row in rows if row["name"] == "cvr")
    assert rows[2]["seconds"] == selected["seconds"], "the adapter was made again"


def test_a_failed_run_is_a_row_and_is_tried_again(bench, grid, tmp_path, monkeypatch):
    study = bench("study")
    monkeypatch.setattr(study, "ProcessPoolExecutor", InThisProcess)
    tried = []

    def measure(job, split, work):
        tried.append(job.name)
        if len(tried) == 1:
            raise ValueError("no luck")
        return {"key": job.key, "split": split, "name": job.name} | FINISHED

    monkeypatch.setattr(study, "measure", measure)
    jobs = [(job, "select") for job in study.read_grid(grid)[:2]]
    out = tmp_path / "rows.jsonl"
    assert study.run(jobs, out, tmp_path, 1) == 1
    failed = {row["key"] for row in study.read_rows(out) if row.get("error") == "ValueError: no luck"}
    assert len(failed) == 1
    assert study.run(jobs, out, tmp_path, 1) == 0
    assert len(tried) == 3


FINISHED = json.loads("""{"seconds": 1, "base": {"knn": 50}, "at": {"1.0": {"adapted": {"knn": 51},
    "ensemble": {"knn": 52}}}}""")


class InThisProcess:
    """A pool of no processes."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def test_otsu_splits_two_groups(bench):
    values = np.concatenate([np.linspace(0, 0.2, 300), np.linspace(0.7, 1, 100)])
    assert 0.2 <= bench("dense").otsu(values) <= 0.7


def test_a_hand_is_cut_out_and_pasted(bench):
    hand = torch.full((1, 3, 16, 16), 0.5)
    hand[:, 0, 4:12, 4:12], hand[:, 2, 4:12, 4:12] = 0.9, 0.2
    hand[:, 0, 0, 0] = 0.51  # not one gray everywhere
    found = bench("dense").composites(hand, torch.zeros(1, 3, 16, 16))
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:12, 4:12] = True
    assert torch.equal(found.masks[0], expected)
    assert torch.equal(found.images[0, 0], torch.where(expected, hand[0, 0], torch.zeros(())))
    labels = bench("dense").patch_labels(found.masks.long(), (4, 4))
    assert labels.view(4, 4).tolist() == [
        [False] * 4,
        [False, True, True, False],
        [False, True, True, False],
        [False] * 4,
    ]


def test_mean_iou_and_segment(bench):
    truth = torch.tensor([True, True, False, False])
    assert bench("dense").mean_iou(truth, truth) == 100
    # hand: 1 of 3; background: 1 of 3
    assert bench("dense").mean_iou(torch.tensor([True, False, True, False]), truth) == pytest.approx(100 / 3)
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1, 0.2], [0.1, 1], [0.2, 1]]), dim=1)
    labels = torch.tensor([True, True, False, False])
    assert bench("dense").segment(bank, labels, torch.eye(2), k=2).tolist() == [True, False]


def test_what_has_no_row_is_named(bench, grid):
    study = bench("study")
    jobs = study.read_grid(grid)
    rows = [{"key": job.key, "split": "select"} for job in jobs if job.name != "plain"]
    rows += [{"key": jobs[0].key, "split": "select", "error": "no luck"}]
    assert study.missing(jobs, rows) == [f"plain on {study.label(jobs[0].data)} (2 seeds)"]


@pytest.mark.parametrize("name", ["study.toml", "study_cpu2.toml"])
def test_the_grids_that_are_shipped_are_valid(bench, shared, name, monkeypatch):

    monkeypatch.chdir(BENCH.parent)
    if not Path("../shared/data/gtsrb_32.tar").is_file():
        pytest.skip("the grids name ../shared/data")
    jobs = bench("study").read_grid(BENCH / "quality" / name)
    for job in jobs:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in job.options.items()}
        upstep_config(model=job.model, data=(job.data,), out="", seed=job.seed, **options)
    assert len({job.key for job in jobs}) == len(jobs)


def a_row(data, gain, score, seed=0, **more):
    at = {
        "adapted": {"knn": 50 + gain, "linear": 60 + gain},
        "ensemble": {"knn": 51 + gain, "linear": 61},
        "source": {"adapted": 40, "ensemble": 45},
        "judgement": {"good": score, "noise": (7 * score) % 3, "constant": 1.0}
        | {"view_agreement": score, "uniformity": 0.0, "effective_rank": 0.0, "base_cka": 0.9},
    }
    row = dict(key=f"{data}{gain}{seed}", split="select", name="plain", data=data, seed=seed, skip_rate=0.5)
    row |= dict(backward_passes=60, images_learnt=3840, centre_first=0.6, centre_last=0.2, cpu_seconds=100)
    return row | dict(commit="abc", device="CPU", base={"knn": 50, "linear": 60, "source": 46}, at={"1.0": at}) | more


def test_rank_correlations_are_of_score_and_true_gain(bench):
    predictor = bench("study_predictor")
    rows = [a_row("a", gain, score) for gain, score in ((1, 0.1), (3, 0.5), (2, 0.3), (-4, -8.0), (9, 0.51))]
    found = predictor.correlations(predictor.points(rows))
    assert found["good"] == pytest.approx(1) and found["constant"] is None and abs(found["noise"]) < 1
    assert found["predicted_gain"] == pytest.approx(1)
    flags, gains = [False, True, True, False, True], [-2, -0.6, 3, -0.4, -4]
    assert predictor.refused(flags, gains) == [(3, 2), (1, 1), (2, 1)]


def scored_rows(sets, num, wrong=()):
    """Rows whose gain is 40 x change of view agreement - 3 x drift; in the sets `wrong` it is the opposite."""
    generator = np.random.default_rng(0)
    rows = []
    for data in sets:
        for agreement, cka in zip(generator.normal(0, 0.1, num), generator.uniform(0.5, 1, num), strict=True):
            gain = (40 * agreement - 3 * (1 - cka)) * (-1 if data in wrong else 1)
            row = a_row(data, gain, agreement)
            row["at"]["1.0"]["judgement"] |= {"effective_rank": generator.normal(), "base_cka": cka}
            rows.append(row)
    return rows


def test_the_weight_ranks_best_and_the_floor_lies_below_what_lost_nothing(bench):
    predictor = bench("study_predictor")
    unlucky = a_row("a", 1.0, -0.04)  # gained a point, though predicted to lose: 100 x -.04 - weight x .1
    found = predictor.points([*scored_rows("ab", 20), unlucky])
    weight, floor = predictor.fit(found)
    assert weight in (5, 10)  # the rows' 40 : 3 is 100 : 7.5
    assert floor == pytest.approx(1.5 * (-4 - 0.1 * weight))
    assert predictor.fit(found[:-1])[1] == 0  # of these every one that lost nothing is predicted to gain


def test_a_set_is_judged_by_what_was_fitted_on_the_others(bench):
    predictor = bench("study_predictor")
    found = predictor.points(scored_rows("abc", 20))
    predicted = [value for value, _ in predictor.leave_one_out(found)]
    assert predictor.rank_correlation(predicted, [point.gain for point in found]) > 0.95
    # in "c" all is the other way round: a fit that had seen it would refuse nothing that gained there
    found = predictor.points(scored_rows("abc", 20, wrong="c"))
    both = zip(predictor.leave_one_out(found), found, strict=True)
    of_c = [(value, is_refused, point.gain) for (value, is_refused), point in both if point.data == "c"]
    assert spearmanr([v for v, _, _ in of_c], [g for _, _, g in of_c]).statistic < -0.95
    assert any(is_refused for _, is_refused, gain in of_c if gain > 0)


def test_the_predictor_is_reported_by_set_together_and_with_its_refusals(bench):
    predictor = bench("study_predictor")
    rows = scored_rows("abc", 8)
    for row in rows:  # pushed further: not an independent run
        row["at"]["4.0"] = {"adapted": {"knn": 30}, "judgement": row["at"]["1.0"]["judgement"]}
    text = predictor.report(rows)
    every = predictor.points(rows)
    found = [(p, f) for p, f in zip(every, predictor.leave_one_out(every), strict=True) if p.strength == "1.0"]
    gains = [p.gain for p, _ in found]
    rho = spearmanr([value for _, (value, _) in found], gains).statistic
    ours = predictor.refused([flag for _, (_, flag) in found], gains)
    shipped = predictor.refused([p.scores["predicted_gain"] < predictor.CLEARLY_WORSE for p, _ in found], gains)
    line = next(line for line in text.splitlines() if line.startswith("| all together | 24 |"))
    assert f"| {rho:+.2f} |" in line
    cells = [cell for (num, a), (_, b) in zip(ours, shipped, strict=True) for cell in (num, a, b)]
    assert line.endswith("| " + " | ".join(map(str, cells)) + " |") and sum(cells) > 24
    assert "| all together | 48 |" in text and "| b | 8 |" in text and "| b | 16 |" in text
    assert "Only 2 data sets" in predictor.report([row for row in rows if row["data"] != "c"])
    assert "Needs two data sets" in predictor.report([row for row in rows if row["data"] == "a"])


def test_the_plot_has_means_over_the_sets_names_on_the_frontier_and_the_targets(bench):
    plot = bench("study_plot")
    rows = [a_row(data, gain, 0.1, name=name) for name, gain in (("low", 1), ("high", 4)) for data in "ab"]
    rows.append(a_row("a", 9, 0.1, name="only <a>"))
    means = {(dot.name, dot.kind): (dot.x, dot.y) for dot in plot.dots(rows) if dot.group == plot.MEAN}
    assert means == {
        ("low", "adapted"): (-6, 1),
        ("low", "ensemble"): (-1, 2),
        ("high", "adapted"): (-6, 4),
        ("high", "ensemble"): (-1, 5),
    }
    found = [plot.Dot(x, y, "a", "adapted", f"{x} {y}") for x, y in ((-3, 9), (-1, 5), (-2, 4), (0, 1), (-1, 2))]
    assert [dot.name for dot in plot.frontier(found)] == ["-3 9", "-1 5", "0 1"]
    text = plot.plot(rows)
    root = ElementTree.fromstring(text)
    labels = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "high" in labels and "high, ens." in labels and "low" not in labels
    assert "target: ensemble +9" in labels and "gentle: adapted +5" in labels
    assert "only &lt;a&gt;, adapted, a: -6.0, +9.0" in text
    # "far" is beside "ab"; "c" would lie on it at 49 and 37
    labels = "".join(plot.names([(9, 50, "ab"), (9, 55, "c"), (90, 52, "far")]))
    assert re.findall(r'y="([^"]+)" font-size="11">(\w+)', labels) == [("44.0", "ab"), ("46.0", "far"), ("25.0", "c")]


def test_the_page_has_means_with_standard_errors_and_is_filled_between_its_markers(bench, tmp_path):
    study_page = bench("study_page")
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{study_page.BEGIN}\nold\n{study_page.END}\nafter\n")
    rows = [a_row("a", 1, 0.1, 0), a_row("a", 3, 0.2, 1), a_row("b", -2, 0.3), a_row("b", 5, 0.9, 1, name="gate")]
    study_page.fill(page, rows, tmp_path / "rows.jsonl")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    # 1 and 3: mean 2, standard error sqrt(2) / sqrt(2)
    gains = "| plain | a | 2 | 50.0 | +2.0 ± 1.0 | +3.0 ± 1.0 |  |  | +2.0 ± 1.0 | +1.0 ± 0.0 |  |  |"
    assert f"{gains} -6.0 ± 0.0 | -1.0 ± 0.0 |  |  |" in text and "Whitening alone" not in text
    # the mean of a's +2 and b's -2: one configuration has both sets
    means = text.split("Means over the sets:")[1].split("\n\n")[1].splitlines()[2:]
    assert [line[:31] for line in means] == ["| plain | +0.0 | +1.0 |  |  | +"] and "| 50 to 50 % |" in means[0]
    assert "| plain | a | 2 | 50 % | 60 | 3,840 | 0.60 to 0.20 | 100 |" in text
    assert "| gate | b | 1 | 50.0 | +5.0 | +6.0 |" in text and "50 %" in text
    plot = (tmp_path / "images" / "quality_frontier.svg").read_text()
    # three configurations and sets of each kind, and the mean over both sets of the one that both have
    assert plot.count("<title>") == 8 and "plain, adapted, a: -6.0, +2.0" in plot
    study_page.fill(page, rows, tmp_path / "rows.jsonl")
    assert page.read_text() == text
    whitened = a_row("c", 1, 0.1)
    whitened["base_whitened"] = {"knn": 54, "linear": 61, "source": 45.5}
    whitened["at"]["1.0"] |= {"adapted_whitened": {"knn": 57}, "ensemble_whitened": {"knn": 58, "linear": 63}}
    whitened["at"]["1.0"]["source"] |= {"adapted_whitened": 43, "ensemble_whitened": 46}
    study_page.fill(page, [*rows, whitened], tmp_path / "rows.jsonl", ["gate on c"])
    assert "| c | 50.0 | +4.0 | +1.0 | -0.5 |\n| mean |  | +4.0 | +1.0 | -0.5 |" in page.read_text()
    assert "| +1.0 | +2.0 | +7.0 | +8.0 | +1.0 | +1.0 |  | +3.0 | -6.0 | -1.0 | -3.0 | +0.0 |" in page.read_text()
    plot = (tmp_path / "images" / "quality_frontier.svg").read_text()
    assert "plain, ensemble_whitened, c: +0.0, +8.0" in plot and plot.count("</rect>") == 2
    assert "Of the grid: gate on c." in page.read_text()
    (tmp_path / "bare.md").write_text("nothing")
    with pytest.raises(ValueError, match="no lines"):
        study_page.fill(tmp_path / "bare.md", rows, tmp_path / "rows.jsonl")


def test_purity_and_nmi_by_hand_and_by_scikit_learn(bench):
    from sklearn.metrics import normalized_mutual_info_score

    clusters = bench("clusters")
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    assert clusters.purity(labels, labels) == 1 and clusters.nmi(labels, labels) == pytest.approx(1)
    one = torch.zeros(6, dtype=torch.int64)
    assert clusters.purity(one, labels) == 0.5 and clusters.nmi(one, labels) == pytest.approx(0)
    # clusters {0, 0, 1} and {0, 1, 2}: two of three and one of three
    assert clusters.purity(torch.tensor([0, 0, 1, 0, 1, 1]), labels) == 0.5
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(num, (200,), generator=generator) for num in (12, 5))
    assert clusters.nmi(a, b) == pytest.approx(normalized_mutual_info_score(b, a), abs=1e-12)


def test_a_runs_clusters_are_those_of_its_own_checkpoints(bench, model, labeled, tmp_path):
    import upstep_fast

    options = dict(steps=8, batch_size=8, prototypes=4, head_hidden=16, head_dim=8, num_workers=0, device="cpu")
    looks = bench("study").looked_at(8)
    assert looks == {"checkpoint_every": 2, "keep_checkpoints": 4}
    upstep_fast.adapt(model=model, data=str(labeled), out=tmp_path / "run", lr=1e-2, **options, **looks)
    found = bench("clusters").history(tmp_path / "run", str(labeled))
    assert [row["step"] for row in found] == [2, 4, 6, 8]
    assert found[0]["stability"] is None and all(0 <= row["stability"] <= 1 for row in found[1:])
    assert all(0.5 <= row["purity"] <= 1 and 0 <= row["nmi"] <= 1 + 1e-12 for row in found)


def test_an_adapter_is_weakened_by_thirds_of_its_blocks(bench, model):
    from upstep_fast.model import backbone

    scores, study = bench("study_scores"), bench("study")
    job = study.Job("a", {}, "m", "d", None, 0, 20, (0.5, 1.0), (4.0,))
    assert list(scores.variants(job, 9, by_depth=False)) == ["0.5", "1.0", "4.0"]
    found = scores.variants(job, 9, by_depth=True)
    assert set(found) == {"1.0"} | {f"{third} x {s}" for third in ("first", "middle", "last") for s in ("0", "0.5")}
    names = [f"blocks.{i}.attn.qkv.weight" for i in range(9)]
    assert [found["middle x 0.5"].strength(name) for name in names] == [1] * 3 + [0.5] * 3 + [1] * 3
    assert found["last x 0"].strength("norm.weight") == 1
    base, adapted = backbone.load(model).vit, backbone.load(model).vit
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(1)
    scores.between(base, adapted, lambda name: 0.25 if name.startswith("blocks.0.") else 4.0)
    for name, p in adapted.named_parameters():
        more = 0.25 if name.startswith("blocks.0.") else 4.0
        assert torch.allclose(p, base.get_parameter(name) + more, atol=1e-5), name


def test_the_standard_error_of_a_change_is_paired(bench):
    before, after = torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 0, 1, 1]).bool()
    differences = np.array([0, -1, 0, 1, 0])
    expected = 100 * differences.std(ddof=1) / 5**0.5
    assert bench("study_scores").paired_error(before, after) == pytest.approx(expected)
    assert bench("study_scores").paired_error(before, before) == 0


def test_the_page_has_clusters_depth_and_the_sources_errors(bench, tmp_path):
    study_page = bench("study_page")
    page = tmp_path / "quality.md"
    page.write_text(f"{study_page.BEGIN}\n{study_page.END}\n")
    looks = [{"step": 30, "purity": 0.4, "nmi": 0.3, "stability": None}]
    looks += [{"step": 60, "purity": 0.6, "nmi": 0.5, "stability": 0.75}]
    new = a_row("a", 3, 0.2, clusters=looks)
    new["at"]["1.0"]["source"] |= {"adapted_se": 1.1, "ensemble_se": 0.7}
    weak = a_row("a", 3, 0.2) | {"split": "depth"}
    weak["at"] = {"1.0": weak["at"]["1.0"], "last x 0": {"adapted": {"knn": 54}, "judgement": a_judgement(0.1)}}
    study_page.fill(page, [new, a_row("b", 1, 0.1), weak], tmp_path / "rows.jsonl")
    text = page.read_text()
    assert "| plain | a | 1 | 30 | 0.40 | 0.30 |  |" in text and "| plain | a | 1 | 60 | 0.60 | 0.50 | 0.75 |" in text
    assert "| -6.0 ± 1.1 | -1.0 ± 0.7 |" in text
    # unpaired, 46 and 40 % of 1,000: sqrt(.46 .54 + .40 .60) / sqrt(1000) = 2.2 points
    assert "1.1 points on average; in 1 of 2 measurements not paired" in text and "2.2 points" in text
    assert "| plain | a | 0 | all x 1 | +3.0 | -6.0 | +18.5 | chosen |" in text
    assert "| plain | a | 0 | last x 0 | +4.0 |  | +8.5 | best |" in text


def a_judgement(score):
    return {"view_agreement": score, "base_cka": 0.9}


def test_a_form_is_the_weighted_mean_of_its_parts_cosines(bench):
    forms = bench("feature_forms")
    x, bank = torch.randn(2, 40, 2, 6, generator=torch.Generator().manual_seed(0))
    x, bank = (torch.nn.functional.normalize(part, dim=-1) for part in (x, bank))
    by = whitening.fit(bank)
    parts = forms.of_parts(x, by)
    found = forms.weighted([parts], {"x": 2, "wp": 1})
    expected = (2 * parts["x"] @ parts["x"].T + parts["wp"] @ parts["wp"].T) / 3
    assert (found @ found.T - expected).abs().max() < 1e-6
    # the form that ships, and both models of an ensemble
    ours = whitening.append_whitened(x, by)
    found = forms.weighted([parts], forms.FORMS[forms.OURS])
    assert (found @ found.T - ours @ ours.T).abs().max() < 1e-6
    both = forms.weighted([parts, forms.of_parts(bank, by)], {"x": 1})
    assert (both @ both.T - (x[:, 0] @ x[:, 0].T + bank[:, 0] @ bank[:, 0].T) / 2).abs().max() < 1e-6
    row = {form: {"knn": 2.0, "source": -1.0} for form in ("a", "b")}
    sets = {name: dict.fromkeys(("base", "adapted", "ensemble"), row) for name in "st"}
    assert "| b | +2.0 | -1.0 | +2.0 | -1.0 | +2.0 | -1.0 |" in forms.table({"sets": sets})
