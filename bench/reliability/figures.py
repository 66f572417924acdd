"""Fill the table in bench/results/reliability_figures.md from real runs of the tests: make figures.

    python bench/reliability/figures.py [--long] [PART ...]        run these parts (all) and write the table
    python bench/reliability/figures.py --table                    write the table from what is stored
    python bench/reliability/figures.py --long PART --junit FILE   take a report of pytest in place of running it

Tests report what they tried with record_property; a figure is the sum (or the largest) over the tests that passed, and
says how many of its part did not. Each part's result is kept in bench/results/figures_PART.json with its command,
commit, date and machine, the long form beside the short one, so a short run does not erase what a long one measured.
A figure that no run reported is "not measured".

Sweeps over kinds of inputs report their counts with tests/helpers/tally.py; the table of docs/reliability.md sums them
by area, whichever part they ran in.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upstep_fast.runtime.machine import processor_name

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = RESULTS / "reliability_figures.md"
SWEEPS_PAGE = ROOT / "docs" / "reliability.md"
SAVES = RESULTS / "checkpoint_cost_cpu2.json"  # bench/reliability/checkpoint_cost.py
BEGIN, END = "<!-- figures: written by make figures -->", "<!-- end of figures -->"

COUNTS = ("tried", "wrong", "tracebacks")
COVERED = {
    "gate": "methods/gate.py",
    "checkpoint": "runtime/checkpoint.py",
    "loader": "data/loading/loader.py",
}


@dataclass(frozen=True)
class Figure:
    """One row: what is counted, in which part, how, and what we aim at."""

    name: str
    part: str
    properties: list[str]  # as the tests call them; `show` formats their values
    show: str
    how: str
    target: str


_SETTINGS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
PARTS: dict[str, list[str]] = _SETTINGS["parts"]  # what pytest is told for each
FIGURES = [Figure(**row) for row in _SETTINGS["figures"]]


def main() -> int:
    """Run the parts, stores their results, writes the table; returns the worst of pytest's exit codes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none is named")
    parser.add_argument("--long", action="store_true", help="with the long forms of the tests")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--junit", type=Path, help="pytest's report of the one part, run on this machine and commit")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.junit and len(args.parts) != 1:
        parser.error("--junit is the report of one PART")
    codes = [0]
    for part in () if args.table else args.parts or PARTS:
        codes.append(measure(part, args.long, args.junit))
        write_table()  # after each: what was measured stays if a later part is stopped
    write_table()
    return max(codes)


def measure(part: str, long: bool, junit: Path | None) -> int:
    """Run a part (or reads its report) and stores what it found; returns pytest's exit code."""
    long = long and part != "coverage"  # which is of the short forms
    command = ["pytest", "-m", "not gpu and not interp" + ("" if long else " and not long"), *PARTS[part]]
    with tempfile.TemporaryDirectory() as folder:
        result, coverage, code = junit or Path(folder) / "junit.xml", Path(folder) / "coverage.json", 0
        tally = Path(folder) / "tally.jsonl"
        if junit is None:
            # bare pytest, not `python -m pytest`, which would put the checkout's kernels/ on the path
            program = Path(sys.executable).with_name("pytest")
            more = [f"--cov-report=json:{coverage}"] if part == "coverage" else []
            report = ["-o", "junit_family=xunit1", "--junitxml", str(result)]
            environment = os.environ | {"UPSTEP_FAST_TALLY": str(tally)}
            code = subprocess.run(
                [program, *command[1:], "-q", "--timeout=900", *more, *report], cwd=ROOT, env=environment
            ).returncode
        counts, values = read(result)
        sweeps = read_tally(tally)
        if coverage.exists():
            values |= covered(coverage)
    run = {"command": " ".join(map(_quoted, command)), "commit": _commit(), "date": str(datetime.date.today())}
    file = RESULTS / f"figures_{part}.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    stored["long" if long else "short"] = {**run, "machine": _machine(), **counts, "values": values}
    if sweeps:
        stored["long" if long else "short"]["sweeps"] = sweeps
    file.write_text(json.dumps(stored, indent=1) + "\n")
    return code


def read(report: Path) -> tuple[dict[str, int], dict[str, float]]:
    """How many tests passed, failed and were skipped, and the sums of what those that passed recorded."""
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    ends = [{child.tag for child in case} for case in cases]
    failed = sum(bool({"failure", "error"} & end) for end in ends)
    skipped = sum("skipped" in end for end in ends)
    values: dict[str, float] = defaultdict(float)
    for case, end in zip(cases, ends, strict=True):
        for item in () if {"failure", "error", "skipped"} & end else case.iter("property"):
            name, value = item.attrib["name"], float(item.attrib["value"])
            values[name] = max(values[name], value) if name.endswith("_max") else values[name] + value
    counts = {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}
    return counts, {name: int(value) if value.is_integer() else value for name, value in values.items()}


def read_tally(file: Path) -> list[dict[str, Any]]:
    """Return one row per area and kind of what `tally` wrote: area, kind, tried, wrong, tracebacks."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        total = rows.setdefault((row["area"], row["kind"]), row | dict.fromkeys(COUNTS, 0))
        for name in COUNTS:
            total[name] += row[name]
    return list(rows.values())


def sweeps_table(runs: dict[str, dict[str, Any]]) -> str:
    """Return the table of docs/reliability.md in Markdown: the sweeps of all parts, by area."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs.values():
        for row in run.get("sweeps", ()):
            key = row["area"], row["kind"]
            # a sweep that ran in two parts counts once
            rows[key] = max(row, rows.get(key, row), key=lambda one: one["tried"])
    areas: dict[str, dict[str, int]] = {}
    for (area, _), row in sorted(rows.items()):
        total = areas.setdefault(area, dict.fromkeys(("kinds", *COUNTS), 0))
        total["kinds"] += 1
        for name in COUNTS:
            total[name] += row[name]
    lines = ["| area | kinds | inputs | silent wrong results | tracebacks and hangs |", "|---|--:|--:|--:|--:|"]
    lines += [f"| {area} | {' | '.join(f'{count:,}' for count in total.values())} |" for area, total in areas.items()]
    return "\n".join(lines if areas else [*lines, "| not measured | | | | |"])


def covered(report: Path) -> dict[str, float]:
    """Branches taken of those there are, and the percentage of lines run, of each module in COVERED."""
    files = json.loads(report.read_text())["files"]
    found: dict[str, float] = {}
    for name, file in COVERED.items():
        (summary,) = (facts["summary"] for path, facts in files.items() if path.endswith(f"upstep_fast/{file}"))
        found[f"branches_{name}"], found[f"of_branches_{name}"] = summary["covered_branches"], summary["num_branches"]
        found[f"lines_{name}"] = 100 * summary["covered_lines"] / summary["num_statements"]
    return found


def stored_runs() -> dict[str, dict[str, Any]]:
    """Return the run of each part that the table shows: the long one if there is one."""
    runs = {}
    for part in PARTS:
        file = RESULTS / f"figures_{part}.json"
        if file.exists():
            forms = json.loads(file.read_text())
            runs[part] = forms.get("long") or forms["short"]
    if SAVES.exists():
        cost = json.loads(SAVES.read_text())
        machine = f"{cost['device']['processor']}, torch {cost['device']['torch']}"
        facts = {"command": cost["command"], "commit": "", "date": cost["date"], "machine": machine}
        runs["saves"] = {**facts, "failed": 0, "values": {"share_percent": cost["run"]["share_percent"]}}
    return runs


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return the tables in Markdown: the results, and the runs they come from."""
    lines = ["| figure | result | how counted | target | run |", "| --- | --- | --- | --- | --- |"]
    for figure in FIGURES:
        run = runs.get(figure.part)
        values = dict(run["values"]) if run else {}
        result, how = "not measured", figure.how.partition(" {")[0] if "{" in figure.how else figure.how
        if run and all(name in values for name in figure.properties):
            values["lost_mean"] = values.get("lost_steps_sum", 0) / max(1, values.get("kills", 0))
            result, how = figure.show.format(**values), figure.how.format(**values)
            if run["failed"]:
                result += f"; {run['failed']} of the run's tests failed"
        lines.append(f"| {figure.name} | {result} | {how} | {figure.target} | {figure.part} |")
    lines += ["", "| run | tests | commit | date | machine | command |", "| --- | --- | --- | --- | --- | --- |"]
    for part, run in runs.items():
        tests = "" if part == "saves" else f"{run['passed']} passed, {run['failed']} failed, {run['skipped']} skipped"
        facts = (run["commit"], run["date"], run["machine"])
        lines.append(f"| {part} | {tests} | {' | '.join(facts)} | `{run['command']}` |")
    return "\n".join(lines)


def write_table() -> None:
    """Put the tables of what is stored into their pages."""
    runs = stored_runs()
    for page, text in ((PAGE, table(runs)), (SWEEPS_PAGE, sweeps_table(runs))):
        before, rest = page.read_text().split(BEGIN)
        _, after = rest.split(END)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "upstep_fast", "tests"]).returncode
    return commit + (" with changes" if changed else "")


def _machine() -> str:
    return f"{processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def _quoted(part: str) -> str:
    return f'"{part}"' if " " in part else part


if __name__ == "__main__":
    sys.exit(main())
