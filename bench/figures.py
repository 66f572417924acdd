"""Fills the table in docs/reliability.md from a real run of the fault tests: make figures.

    python bench/figures.py [--long] [PYTEST ARGUMENTS]

Tests report what they tried with record_property; a figure is the sum (or the largest) over the tests that passed. A
figure that no test reported is "not measured".
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
TESTS = (
    "tests/test_checkpoint.py",
    "tests/test_resume.py",
    "tests/test_faults.py",
    "tests/test_out_of_memory.py",
    "tests/test_distributed.py",
)
BEGIN, END = "<!-- figures: written by make figures -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Figure:
    """One row: what is counted, how, and what we aim at."""

    name: str
    properties: tuple[str, ...]  # as the tests call them; `show` formats their values
    show: str
    how: str
    target: str


FIGURES = (
    Figure(
        "kill -9 survived",
        ("kills",),
        "{kills} of {kills}",
        "random moments of a run and every call that orders what is on disk; a whole checkpoint is found, and the "
        "resumed run equals the unbroken one bit for bit",
        "200 of 200",
    ),
    Figure(
        "steps lost to a kill",
        ("kills", "lost_steps_max", "lost_steps_sum"),
        "at most {lost_steps_max:.0f}, mean {lost_mean:.2f}",
        "rows of metrics.jsonl beyond the checkpoint found; an interval is 3 steps, each of some 20 ms, so steps are "
        "made while a save waits for the disk",
        "less than two intervals",
    ),
    Figure(
        "bit-exact resumes",
        ("exact_resumes",),
        "{exact_resumes} of {exact_resumes}",
        "stopped by a signal and resumed, over gates, layouts, heads, prototypes, penalties, bf16: every tensor, the "
        "gate, the losses (CPU, one process)",
        "all",
    ),
    Figure(
        "bit-exact resumes on a GPU",
        ("exact_resumes_gpu",),
        "{exact_resumes_gpu} of {exact_resumes_gpu}",
        "the same on one GPU in fp32, bf16 and fp16 (run with -m gpu)",
        "all",
    ),
    Figure(
        "disk faults",
        ("disk_faults",),
        "{disk_faults} of {disk_faults}",
        "no space, quota, EIO, read-only at fsync and rename, once and for good: one line, exit 1, exact resume",
        "all",
    ),
    Figure(
        "non-finite steps",
        ("number_faults",),
        "{number_faults} of {number_faults}",
        "NaN or infinity in images, loss or gradient: no weight, moment or running value moves; three in a row stop",
        "all",
    ),
    Figure(
        "damaged checkpoint files",
        ("mutated_files",),
        "{mutated_files}; 0 accepted with other contents",
        "bit flips and truncations of every file of a checkpoint",
        "0 accepted",
    ),
    Figure(
        "hostile checkpoint files",
        ("hostile_files",),
        "{hostile_files}; 0 ran code or were used in part",
        "manifests with right hashes and wrong contents, links, pipes, devices, pickles, tensors of another run",
        "0",
    ),
    Figure(
        "bad images", ("bad_images",), "{bad_images}", "broken, truncated, hostile and mutated image files", "10,000"
    ),
    Figure(
        "bit-exact resumes of several ranks",
        ("exact_resumes_ranks",),
        "{exact_resumes_ranks} of {exact_resumes_ranks}",
        "2 gloo ranks, stopped by a signal to one of them while gradients wait, or killed and restarted by torchrun",
        "all",
    ),
    Figure(
        "rank faults",
        ("rank_faults", "rank_fault_seconds_max"),
        "{rank_faults} of {rank_faults}, the slowest gone after {rank_fault_seconds_max:.0f} s",
        "a rank is killed, stopped, sleeps, exits, raises, gets a signal or differs, on 2 and 4 gloo ranks: all end, "
        "one line names the first cause",
        "all, < 60 s",
    ),
    Figure(
        "soak",
        ("soak_steps", "soak_drift"),
        "{soak_steps} steps, memory {soak_drift:+.2f} %",
        "small steps in one run; resident memory after a tenth of them against the end",
        "20,000 steps, < 1 %",
    ),
)


def main() -> int:
    """Runs the tests, writes the table; returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="with the long forms of the tests")
    args, more = parser.parse_known_args()
    chosen = "not gpu and not interp" + ("" if args.long else " and not long")
    command = ["pytest", "-m", chosen, *TESTS, *more]
    report = ["-o", "junit_family=xunit1", "--junitxml"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "junit.xml"
        # bare pytest, not `python -m pytest`, which would put the checkout's kernels/ on the path
        program = Path(sys.executable).with_name("pytest")
        done = subprocess.run([program, *command[1:], *report, str(result)], cwd=ROOT)
        cases = ElementTree.parse(result).getroot().findall(".//testcase")
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(cases, ' '.join(map(_quoted, command)))}\n{END}{after}")
    return done.returncode


def table(cases: list[ElementTree.Element], command: str) -> str:
    """The table in Markdown, under a line that says from what run it is."""
    passed = [case for case in cases if not {"failure", "error", "skipped"} & {child.tag for child in case}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    values: dict[str, float] = defaultdict(float)
    for case in passed:
        for item in case.iter("property"):
            name, value = item.attrib["name"], float(item.attrib["value"])
            values[name] = max(values[name], value) if name.endswith(("_max", "_drift")) else values[name] + value
    lines = [
        f"{len(passed)} of {len(cases)} tests passed, {skipped} skipped; commit {_commit()}, {datetime.date.today()}, "
        f"{_cpu()}, torch {torch.__version__}, Python {platform.python_version()}; `{command}`",
        "",
        "| figure | result | how counted | target |",
        "| --- | --- | --- | --- |",
    ]
    for figure in FIGURES:
        result = "not measured"
        if all(name in values for name in figure.properties):
            whole = {name: int(v) if v.is_integer() else v for name, v in values.items()}
            mean = values["lost_steps_sum"] / max(1.0, values["kills"])
            result = figure.show.format(**whole, lost_mean=mean)
        lines.append(f"| {figure.name} | {result} | {figure.how} | {figure.target} |")
    return "\n".join(lines)


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "upstep_fast", "tests"]).returncode
    return commit + (" with changes" if changed else "")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _quoted(part: str) -> str:
    return f'"{part}"' if " " in part else part


if __name__ == "__main__":
    sys.exit(main())
