"""Run folders that a stranger forged: one line or a page without the damaged part, never a hang or a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
from tally import tally

from upstep_fast.cli.commands import main
from upstep_fast.errors import ConfigError
from upstep_fast.report import page as report_page
from upstep_fast.report.run_record import read_record, summary

CONFIG = 'model = "m"\ndata = ["d"]\nout = "o"\nsteps = 2\nbatch_size = 8\n'
ROWS = '{"step": 0, "loss": 1.5, "center": 0.5, "open": true, "bad": null, "images_per_s": 9, "data_wait": 0.1}\n' * 2
FILES = {
    "config.toml": CONFIG,
    "metrics.jsonl": ROWS,
    "train.log": "2026-11-30 10:00:00,000 WARNING a warning\n",
    "skipped.csv": "name,reason\na.jpg,broken\n",
    "eval.json": '{"base": {"knn": 50.0}, "n_test": 10, "k": 3}',
    "pictures.json": "{}",
}
ODD = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    -1e308,
    5e-324,
    "",
    "x",
    "\x1b[2J",
    "n" * 9000,
    [],
    [1, "a"],
    {},
    {"a": {}},
    [[]],
)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "checkpoints" / "step-00000001" / "manifest.json").write_text('{"environment": {"torch": "2.14"}}')
    return folder


@pytest.mark.parametrize("name", [*FILES, "checkpoints/step-00000001/manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "sparse", "deep"])
def test_files_that_are_none_are_left_out_or_named(run, name, kind, capsys):
    path = run / name
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
        case "folder":
            path.mkdir()
        case "sparse":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        case "deep":
            path.write_text("a = " * name.endswith("toml") + "[" * 100_000)
    if name == "config.toml":
        with pytest.raises(SystemExit) as stop:
            main(["report", str(run)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("upstep-fast: report: ") and error.count("\n") == 1
        assert str(path) in error
    else:
        text = report_page.write(run).read_text()
        assert "a.jpg" in text or name == "skipped.csv"


@pytest.mark.parametrize("seed", range(4))
def test_forged_values_are_left_out_or_shown(run, seed):
    rng, tried = random.Random(seed), 50
    for _ in range(tried):
        rows = [json.loads(line) for line in ROWS.splitlines()]
        for row in rows:
            row[rng.choice(list(row))] = rng.choice(ODD)
        scores = {"base": {"knn": rng.choice(ODD)}, "source": rng.choice(ODD), "n_test": rng.choice(ODD)}
        scores |= {rng.choice(("base", "adapted", "k", "n_test")): rng.choice(ODD)}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "eval.json").write_text(json.dumps(scores))
        manifest = {"environment": {"torch": rng.choice(ODD), rng.choice(("a", "\x1b[2J")): rng.choice(ODD)}}
        (run / "checkpoints" / "step-00000001" / "manifest.json").write_text(json.dumps(manifest))
        fields = {name: rng.choice(ODD[1:14]) for name in rng.sample(("steps", "batch_size", "model", "data", "lr"), 3)}
        config = "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items() if value != 10**30)
        (run / "config.toml").write_text(config)
        text = report_page.write(run).read_text()
        assert "\x1b" not in text and "nan" not in " ".join(summary(read_record(run)).values())
        report_page.comparison_page([read_record(run)] * 2)
    tally("hostile files", "values in a run folder", tried)


def test_integers_that_python_cannot_print_are_refused(run):
    (run / "config.toml").write_text(f"steps = 0x{'F' * 5000}\n")
    with pytest.raises(ConfigError, match=r"^report: .*config\.toml is not valid TOML \(an integer has 20000 bits"):
        read_record(run)


def test_a_folder_without_a_run_is_named(run):
    shutil.rmtree(run)
    with pytest.raises(ConfigError, match="holds no run of upstep-fast"):
        read_record(run)
