"""metrics.jsonl follows the schema in docs/reference.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from upstep_fast.errors import RunFailedError
from upstep_fast.train.adapt import adapt

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs/metrics.schema.json").read_text())
CHECK = jsonschema.Draft202012Validator(SCHEMA)


def rows_of(model, photos, out, **options):
    small = dict(batch_size=8, prototypes=8, head_hidden=32, head_dim=16, device="cpu", precision="fp32")
    adapt(model=model, data=photos, out=out, **{**small, "steps": 8, **options})
    return read(out)


def read(out: Path) -> list[dict]:
    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constants) for line in lines]


@pytest.mark.parametrize(
    "options",
    [{"gate": "none"}, {"gate": "alternate"}, {"gate": "ema", "layout": "asymmetric"}, {"cvr": "off", "head": "none"}],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_rows_of_real_runs_fit_the_schema(model, photos, tmp_path, options):
    rows = rows_of(model, photos, tmp_path / "out", **options)
    for row in rows:
        CHECK.validate(row)
    assert [row["step"] for row in rows] == list(range(8))
    assert all((row["loss"] is None) == (not row["open"]) for row in rows)
    # nothing that UpStep writes is left out of the page, and what the page promises for adapt is there
    promised = {name for name, part in SCHEMA["properties"].items() if part["description"].startswith("adapt: ")}
    assert set(SCHEMA["required"]) | promised <= set(rows[0]) <= set(SCHEMA["properties"])
    assert promised == {"center", *SCHEMA["dependentRequired"]["center"]}
    if options.get("gate") == "alternate":
        assert {row["open"] for row in rows} == {True, False}


def test_rows_of_a_run_that_breaks_down_fit_too(model, photos, tmp_path):
    with pytest.raises(RunFailedError):
        rows_of(model, photos, tmp_path / "out", gate="none", lr=1e30, clip=0.0, steps=40)
    rows = read(tmp_path / "out")
    for row in rows:
        CHECK.validate(row)
    assert all(isinstance(row["bad"], str) for row in rows[-3:])


def test_rows_of_finetune_fit_too(model, tmp_path):
    from PIL import Image

    from upstep_fast.cli.commands import main

    for part in ("train", "test"):
        for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
            (tmp_path / "labeled" / part / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (32, 32), color).save(tmp_path / "labeled" / part / name / f"{i}.png")
    paths = ["--data", str(tmp_path / "labeled"), "--out", str(tmp_path / "out")]
    more = ["--epochs", "2", "--batch-size", "4", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--model", model, *paths, "--method", "linear", *more])
    assert not stop.value.code
    rows = read(tmp_path / "out")
    for row in rows:
        CHECK.validate(row)
    assert [row["step"] for row in rows] == list(range(len(rows))) and rows


def test_rows_after_a_resume_have_every_step_once(model, photos, tmp_path):
    rows_of(model, photos, tmp_path / "out", steps=4)
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:  # made after the last checkpoint, then killed
        file.write((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1].replace('"step": 3', '"step": 4'))
    assert [row["step"] for row in rows_of(model, photos, tmp_path / "out", steps=4, resume=True)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": 1.5}, {"loss": "NaN"}, {"open": 1}, {"bad": False}, {"replaced": None}, {"extra": [1]}],
    ids=str,
)
def test_the_schema_refuses_what_it_should(change):
    row = {"step": 0, "loss": 1.0, "center": 0.1, "open": True, "lr": 0.1, "bad": None}
    row |= {"images_per_s": 1.0, "data_wait": 0.0, "epoch": 0, "replaced": 0}
    row |= {"forward_s": 0.1, "backward_s": 0.2, "other_s": 0.0}
    CHECK.validate(row)
    assert not CHECK.is_valid({**row, **change})
    for key in ("step", "open"):
        assert not CHECK.is_valid({name: value for name, value in row.items() if name != key})


def test_the_page_lists_the_schema():
    page = (ROOT / "docs/reference.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| ([\w ]+) \| (.*) \|$", page, re.M)
    parts = SCHEMA["properties"].items()
    types = [part["type"] if isinstance(part["type"], str) else " or ".join(part["type"]) for _, part in parts]
    wanted = [(name, kind, part["description"]) for (name, part), kind in zip(parts, types, strict=True)]
    assert listed == wanted
    # names appear once: json.loads keeps the last of two in silence
    names = re.findall(r'^    "(\w+)": \{', (ROOT / "docs/metrics.schema.json").read_text(), re.M)
    assert names == list(SCHEMA["properties"])
