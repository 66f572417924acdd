"""The first five minutes: the demo runs offline on what the package ships, and adapting real photographs helps."""

import json

import pytest

from upstep_fast import evaluate
from upstep_fast.cli import demo
from upstep_fast.cli.commands import main
from upstep_fast.train.adapt import adapt

MODEL, DATA = demo.assets()


def test_a_short_adaptation_improves_knn_on_real_hand_signs(tmp_path):
    result = adapt(
        model=MODEL,
        data=DATA,
        out=tmp_path / "out",
        steps=48,
        batch_size=48,
        lr=5e-3,
        gate="none",
        cvr="off",
        device="cpu",
    )
    scores = evaluate(MODEL, DATA, adapter=result.adapter, device="cpu")
    assert (scores["n_train"], scores["n_test"]) == (1465, 597)
    # METHODS section 6 gives 60.6 for the base model
    assert scores["base"]["knn"] == pytest.approx(60.6, abs=1.0)
    assert scores["adapted"]["knn"] > scores["base"]["knn"]
    assert scores["ensemble"]["knn"] > scores["base"]["knn"]


def test_the_demo_says_what_it_did_and_what_to_try_next(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path / "demo"), "--steps", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    scores = json.loads((tmp_path / "demo" / "eval.json").read_text())
    for kind in ("base", "adapted", "ensemble"):
        assert kind in out and f"{scores[kind]['knn']:.1f}" in out
    assert "upstep-fast adapt --model" in out and "forgetting: not measured" in out


def test_forgetting_is_measured_on_the_models_own_domain(tmp_path, shared):
    result = adapt(model=MODEL, data=DATA, out=tmp_path / "out", steps=2, batch_size=8, device="cpu")
    scores = evaluate(MODEL, DATA, adapter=result.adapter, source=shared / "source_64.tar", device="cpu")
    # METHODS section 6 gives 46.3 for the base model on its own domain
    assert scores["source"]["base"] == pytest.approx(46.3, abs=1.0)
    assert scores["source"].keys() == {"base", "adapted", "ensemble"}
