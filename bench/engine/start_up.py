"""Modules and processor seconds of a command's imports, and of `adapt` until its first step has ended.

    python bench/engine/start_up.py OUT.json [--before CHECKOUT] [--runs 5]

Each figure is the median of so many processes of their own, those of an earlier build in turn with today's. Processor
seconds (user and system) hardly depend on what else runs; the first process of each is left out, as it warms the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from upstep_fast.runtime.machine import processor_name

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {  # with arguments that are complete; what they name is not looked at
    "adapt": ("--model", "demo", "--data", "x", "--out", "x"),
    "eval": ("--model", "demo", "--data", "x"),
    "embed": ("--model", "demo", "--data", "x", "--out", "x.npy"),
    "explore": ("x",),
    "search": ("x", "y"),
}
# as the program itself does it: `main` without arguments
PROGRAM = """
import json, sys, time
from pathlib import Path
def tell(): print(json.dumps([len(sys.modules), time.process_time()]), flush=True)
from upstep_fast.cli import main
what, sys.argv = sys.argv[1], ["upstep-fast", *sys.argv[2:]]
import upstep_fast.cli.commands as commands
from importlib import import_module
real = commands.import_module
def stop():
    tell()
    import os
    os._exit(0)
def imported(name):
    module = real(name)
    if what == "adapt":
        loop = real("upstep_fast.train.loop")
        step = loop.step
        def first(*args, **options):
            step(*args, **options)
            stop()
        loop.step = first
    else:
        stop()
    return module
commands.import_module = lambda name: real(name) if ".config." in name else imported(name)
main()
"""


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--before", type=Path, help="checkout of an earlier build, with its compiled library")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    builds = {"today": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    result: dict[str, Any] = {"processor": processor_name(), "runs": options.runs}
    cases = {f"imports of {name}": ("import", name) for name in COMMANDS} | {"adapt, first step": ("adapt", "adapt")}
    for case, (what, command) in cases.items():
        seen: dict[str, list[list[float]]] = {build: [] for build in builds}
        for _ in range(options.runs + 1):
            for build, root in builds.items():
                seen[build].append(measured(root, what, command))
        result[case] = {
            build: {"modules": rows[-1][0], "seconds": round(statistics.median(row[1] for row in rows[1:]), 2)}
            for build, rows in seen.items()
        }
        print(case, result[case], flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measured(root: Path, what: str, command: str) -> list[float]:
    """Return the number of modules and the processor seconds of one process. Raises CalledProcessError."""
    assets = root / "upstep_fast" / "assets"
    with tempfile.TemporaryDirectory() as out:
        arguments = COMMANDS[command]
        if what == "adapt":
            data = str(assets / "sign_digits_64.tar")
            arguments = ("--model", "demo", "--data", data, "--out", f"{out}/run", "--preset", "fast", "--quiet")
        line = [sys.executable, "-c", PROGRAM, what, command, *arguments]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, env=environment, cwd=out, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
