"""bench/reliability/figures.py: what a report becomes, what is kept of earlier runs, and what the page says of it."""

import json
from pathlib import Path

import pytest
from tally import tally

REPORT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="kills" value="8"/><property name="lost_steps_max" value="3"/>
<property name="lost_steps_sum" value="10"/></properties></testcase>
<testcase name="b"><properties><property name="kills" value="2"/><property name="lost_steps_max" value="5"/>
<property name="lost_steps_sum" value="5"/></properties></testcase>
<testcase name="c"><properties><property name="kills" value="100"/></properties>{end}</testcase>
</testsuite></testsuites>"""


@pytest.fixture
def figures(bench, tmp_path, monkeypatch):
    module = bench("figures")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    for page, name in (("PAGE", "page.md"), ("SWEEPS_PAGE", "sweeps.md")):
        monkeypatch.setattr(module, page, tmp_path / name)
        (tmp_path / name).write_text(f"before {module.BEGIN}\nformer\n{module.END} after")
    return module


def row(figures, name):
    figures.write_table()
    page = figures.PAGE.read_text()
    assert page.startswith("before ") and page.endswith(" after") and "former" not in page
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def take(figures, tmp_path, *, long, end=""):
    (tmp_path / "junit.xml").write_text(REPORT.format(end=end))
    assert figures.measure("kills", long, tmp_path / "junit.xml") == 0


def test_what_has_not_run_says_so(figures, monkeypatch):
    monkeypatch.setattr(figures, "SAVES", Path("none"))
    for figure in figures.FIGURES:
        cells = row(figures, figure.name)
        assert cells[1] == "not measured" and "{" not in cells[2]


def test_sums_and_maxima_of_the_tests_that_passed_and_how_many_did_not(figures, tmp_path):
    take(figures, tmp_path, long=False, end="<failure/>")
    assert row(figures, "kill -9 survived")[1] == "10 of 10; 1 of the run's tests failed"
    assert row(figures, "steps lost to a kill")[1].startswith("at most 5, mean 1.50")
    take(figures, tmp_path, long=False, end="<skipped/>")
    assert row(figures, "kill -9 survived")[1] == "10 of 10"


def test_a_short_run_does_not_erase_a_long_one(figures, tmp_path):
    take(figures, tmp_path, long=True)
    take(figures, tmp_path, long=False, end="<failure/>")
    assert row(figures, "kill -9 survived")[1] == "110 of 110"
    stored = json.loads((tmp_path / "figures_kills.json").read_text())
    assert stored["short"]["values"]["kills"] == 10 and stored["short"]["failed"] == 1
    assert all(stored["long"][fact] for fact in ("command", "commit", "date", "machine"))


def test_branches_are_those_of_the_report(figures, tmp_path):
    summary = {"covered_branches": 9, "num_branches": 10, "covered_lines": 1, "num_statements": 4}
    files = {f"/x/upstep_fast/{file}": {"summary": summary} for file in figures.COVERED.values()}
    (tmp_path / "coverage.json").write_text(json.dumps({"files": files | {"/x/upstep_fast/cli.py": {}}}))
    found = figures.covered(tmp_path / "coverage.json")
    assert found["branches_gate"] == 9 and found["of_branches_loader"] == 10 and found["lines_checkpoint"] == 25


def test_sweeps_are_summed_by_area_and_counted_once(figures, tmp_path, monkeypatch):
    monkeypatch.setenv("UPSTEP_FAST_TALLY", str(tmp_path / "tally.jsonl"))
    tally("pixels", "16 bit", 100)
    tally("pixels", "16 bit", 20, wrong=1)
    tally("pixels", "planar", 7, tracebacks=2)
    tally("options", "pissa", 1)
    sweeps = figures.read_tally(tmp_path / "tally.jsonl")
    assert sweeps[0] == {"area": "pixels", "kind": "16 bit", "tried": 120, "wrong": 1, "tracebacks": 0}
    lines = figures.sweeps_table({"a": {"sweeps": sweeps}, "b": {"sweeps": sweeps[:1]}, "c": {}}).splitlines()
    assert lines[2:] == ["| options | 1 | 1 | 0 | 0 |", "| pixels | 2 | 127 | 1 | 2 |"]
    monkeypatch.delenv("UPSTEP_FAST_TALLY")
    tally("options", "olora", 1)
    assert len((tmp_path / "tally.jsonl").read_text().splitlines()) == 4
    assert "not measured" in figures.sweeps_table({}) and not figures.read_tally(tmp_path / "none")
