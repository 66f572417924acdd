"""The verdict of a run: what is held out, what it costs, what it says, and where it is written."""

import json
import shutil
from pathlib import Path

import pytest
from adapt_configs import upstep_config
from photos import save_photos

import upstep_fast
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import CheckFailedError, ConfigError, DataError
from upstep_fast.evaluation.verdict import Verdict
from upstep_fast.model import pooling
from upstep_fast.report.page import write
from upstep_fast.train import validator, verdict


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("many"), 80)


@pytest.fixture
def options(options, many):
    return options | dict(data=many, steps=4, gate="none", verdict=16)


def entries(out):
    return json.loads((out / "verdict.json").read_text())


def test_a_run_that_changes_nothing_says_so(options, tmp_path):
    result = upstep_fast.adapt(**options | {"lr": 1e-9})
    given, out = result.verdict, tmp_path / "out"
    assert given.outcome == "no measurable change" and given.kind == "label-free" and given.images == 16
    assert given.low < 0 < given.high and abs(given.gain) < 0.01
    assert entries(out) == {"verdict": vars(given), "measured": None} and result.measured is None
    assert "label-free: no measurable change: " in result._repr_html_()
    body = (out / "report.html").read_text().split("<h1>")[1]
    assert body.index("<b>verdict</b> no measurable change: ") < body.index("<dl>")


def test_a_wrecked_run_is_worse_and_refused(options, tmp_path):
    wild = {"lr": 10.0, "clip": 0.0, "warmup": 0.0, "lora_targets": ("q", "k", "v", "proj", "fc1", "fc2"), "steps": 8}
    wild["seed"] = 9  # worse by 30 to 39, whatever the last bits
    out = tmp_path / "out"
    for resume in (False, True):
        with pytest.raises(CheckFailedError, match=r"refused: worse: .*use the base model.*adapter-refused") as error:
            upstep_fast.adapt(**options | wild, resume=resume)
        assert error.value.exit_code == 4 and entries(out)["verdict"]["outcome"] == "worse"
        assert error.value.verdict.text.startswith("worse: base kept; ") and error.value.verdict.text in str(
            error.value
        )
        assert entries(out)["verdict"] == vars(error.value.verdict)
        assert "| verdict | label-free: worse: base kept; " in (out / "adapter-refused" / "README.md").read_text()
        assert not (out / "adapter").exists() and (out / "adapter-refused").is_dir()
        assert "<b>verdict</b> worse: " in (out / "report.html").read_text()


def labeled(folder, many):
    for i, path in enumerate(sorted(many.iterdir())):
        place = folder / ("train" if i < 64 else "test") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


def test_it_costs_a_twentieth_of_the_run_and_measures_where_there_are_labels(options, many, tmp_path, monkeypatch):
    passed, judging = [], []
    real_features, real_judge = pooling.features, verdict.judge_written

    def features(vit, x):
        passed.extend([len(x)] if judging else [])
        return real_features(vit, x)

    def judge(*args):
        judging.append(True)
        return real_judge(*args)

    monkeypatch.setattr(pooling, "features", features)
    monkeypatch.setattr(verdict, "judge_written", judge)
    options |= {"data": labeled(tmp_path / "labeled", many), "verdict": "auto", "steps": 60, "batch_size": 16}
    result = upstep_fast.adapt(**options, report_images=False)
    assert result.verdict.images == 16 and sum(passed) == 16 * verdict.PASSES <= verdict.SHARE * 60 * 16 * 2
    schema = json.loads((Path(__file__).parents[2] / "docs" / "verdict.schema.json").read_text())
    pytest.importorskip("jsonschema").Draft202012Validator(schema).validate(entries(tmp_path / "out"))
    assert result.measured.kind == "measured" and result.measured.images == 16
    assert entries(tmp_path / "out")["measured"] == vars(result.measured)
    assert "<b>measured</b>" in (tmp_path / "out" / "report.html").read_text()


def of(outcome, kind):
    return Verdict(f"{outcome}: planted", 1.0, 1.0, 1.0, kind, outcome, 16)


@pytest.mark.parametrize(
    ("score", "measured", "is_refused"),
    [
        ("better", "worse", True),
        ("no measurable change", "worse", True),
        ("worse", "no measurable change", True),
        ("worse", "better", False),
        ("better", "no measurable change", False),
    ],
)
def test_measured_changes_go_before_the_score(options, many, tmp_path, monkeypatch, score, measured, is_refused):
    monkeypatch.setattr(verdict, "label_free_verdict", lambda *_: of(score, "label-free"))
    monkeypatch.setattr(verdict, "measured_verdict", lambda *_: of(measured, "measured"))
    options |= {"data": labeled(tmp_path / "labeled", many), "steps": 2, "report_images": False}
    out = tmp_path / "out"
    if not is_refused:
        assert upstep_fast.adapt(**options).measured.outcome == measured and (out / "adapter").is_dir()
        return
    with pytest.raises(CheckFailedError, match="refused: worse: base kept; planted; use the base model"):
        upstep_fast.adapt(**options)
    texts = [entry["text"] for entry in entries(out).values()]
    assert texts.count("worse: base kept; planted") == 1 and not (out / "adapter").exists()


def held_out(images, **options):
    config = upstep_config(**{"model": "m", "data": ("d",), "out": "", "batch_size": 64} | options)
    return verdict.with_held_out(config, images, 1).validation.verdict


def test_the_number_of_images_is_bounded_by_the_run():
    assert held_out(1000, steps=1000) == 100 and held_out(100_000, steps=1000) == validator.LARGEST
    assert held_out(100_000, steps=60) == 60 * 64 * 2 * 0.05 // 6
    assert held_out(100_000, steps=60, layout="asymmetric") == 60 * 64 * 0.05 // 6
    assert held_out(1000, steps=14) == "off" and held_out(63, steps=1000) == "off"
    assert held_out(1000, steps=1000, verdict="off") == "off" and held_out(1000, steps=5, verdict=40) == 40
    assert held_out(1000, steps=1000, judge_every=5) == "auto"


def test_held_out_images_are_not_trained_on(many):
    source = open_source(many)
    config = upstep_config(model="m", data=("d",), out="", verdict=20)
    parts = validator.hold_out(source, config)
    names = [{part.name(i) for i in range(len(part))} for part in parts]
    assert [len(n) for n in names] == [60, 20] and not names[0] & names[1]


def test_a_resumed_run_holds_out_what_it_did_before(options, tmp_path):
    config = tmp_path / "out" / "config.toml"
    upstep_fast.adapt(**options)
    assert "verdict = 16" in config.read_text()
    # other values, such as those of a longer run, do not change what the run was trained on
    for given in ("auto", "off"):
        assert upstep_fast.adapt(**options | {"verdict": given}, resume=True).verdict.images == 16


def test_a_run_of_an_earlier_version_goes_on_without_a_verdict(options, tmp_path):
    config = tmp_path / "out" / "config.toml"
    upstep_fast.adapt(**options | {"verdict": "off"})
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "verdict" not in line))
    options |= {"verdict": "auto"}
    assert upstep_fast.adapt(**options, resume=True).verdict is None
    assert not (tmp_path / "out" / "verdict.json").exists()


def test_the_validations_images_serve_the_verdict_too(options, tmp_path):
    result = upstep_fast.adapt(**options | {"judge_every": 2, "verdict": "auto", "lr": 1e-9})
    assert result.verdict.images == 16 and result.verdict.outcome == "no measurable change"
    assert upstep_fast.adapt(**options | {"judge_every": 2, "verdict": "off", "out": tmp_path / "no"}).verdict is None


def test_a_verdict_that_fails_does_not_lose_the_run(options, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(verdict, "label_free_verdict", fail)
    result = upstep_fast.adapt(**options)
    assert result.verdict is None and result.adapter.is_dir() and "verdict: none (out of memory)" in caplog.text


def test_wrong_settings_are_one_line(options):
    with pytest.raises(ConfigError, match="verdict: got 3"):
        upstep_fast.adapt(**options | {"verdict": 3})
    with pytest.raises(DataError, match="verdict: 41 images cannot be held out of 80"):
        upstep_fast.adapt(**options | {"verdict": 41})


@pytest.mark.parametrize("content", ["[]", '{"verdict": 3}', '{"verdict": {"text": ["x"]}}', "{", '{"verdict": {}}'])
def test_a_damaged_verdict_leaves_the_page_whole(options, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.toml").write_text("steps = 3\n")
    (out / "verdict.json").write_text(content)
    assert "<b>verdict</b>" not in write(out).read_text()
    (out / "verdict.json").write_text(json.dumps({"verdict": {"text": "better: <script>\x1b[2J"}}))
    page = write(out).read_text()
    assert "&lt;script&gt;" in page and "<script>" not in page and "\x1b" not in page
