"""First run on a GPU: correctness of every op, then speed, in at most nine minutes; one JSON line per fact as it comes.

    python bench/gpu/first.py --out bench/results                 # on the GPU machine (make gpu-first)
    python bench/gpu/first.py --out DIR --device cpu --plant      # rehearsal: small shapes, and planted faults

Every task is a process of its own in its own session with a kill timer, so a hang, a crash or an illegal memory access
costs one task. Correctness runs many tasks at once, speed one at a time. OUT/gpu_first_NAME.jsonl is written while it
runs, OUT/gpu_first_NAME.md, one page, at the end (bench/gpu/summary.py). Exit code 1: a task failed that EXPECTED does
not name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(Path(__file__).parent))
FACT = "FACT "  # a line of a task's output that is a fact, as JSON
RESERVE_S = 5.0  # for the summary

# task -> reason of a failure that is known before the first run
EXPECTED: dict[str, str] = {}


@dataclass(frozen=True)
class Task:
    """Command of one or more facts, killed after `limit_s` seconds."""

    name: str
    part: str  # "build", "correctness" or "speed"
    command: tuple[str, ...]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    planted: str = ""  # status that a planted fault has to come out with


class Journal:
    """File of facts: one JSON line each, on disk before the next one."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._lock, self.rows = file, threading.Lock(), list[dict[str, Any]]()

    def write(self, task: Task, row: dict[str, Any]) -> None:
        """Append one fact of `task`."""
        row = {"task": task.name, "part": task.part, **row}
        with self._lock:
            self.rows.append(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            if "status" in row:
                print(f"{row['seconds']:7.1f} s  {row['status']:<12} {task.name}", flush=True)


def run_task(task: Task, journal: Journal, deadline: float) -> str:
    """Run `task` until it ends, or its limit or the deadline passes; write its facts and its status; return the status.

    status: "right"; "wrong" (exit code 1); "missing: PACKAGE"; "crashed: SIGNAL"; "timeout"; "not run: no time".
    """
    left = min(task.limit_s, deadline - time.monotonic())
    if left < 1:
        journal.write(task, {"status": "not run: no time", "seconds": 0.0})
        return "not run: no time"
    start = time.monotonic()
    process = subprocess.Popen(
        task.command, cwd=ROOT, env=_environment(task), start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
    )  # fmt: skip
    timer = threading.Timer(left, _kill, [process])
    timer.start()
    tail: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        if (fact := _fact(line)) is not None:
            journal.write(task, fact)
        else:
            tail = [*tail[-40:], line]
    code = process.wait()
    timed_out = not timer.is_alive()
    timer.cancel()
    _kill(process)  # what it started and left behind
    status, expected = _status(code, timed_out, "".join(tail)), EXPECTED.get(task.name)
    if task.planted and status == task.planted:
        expected = "planted"
    elif task.planted:
        status = f"planted {task.planted}, came out {status}"
    row = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "right":
        row |= {"expected": expected, "output": "".join(tail)[-3000:]}
    journal.write(task, row)
    return status


def _fact(line: str) -> dict[str, Any] | None:
    """Return the fact that a line is; None: other output, or a fact cut off by the end of its process."""
    if line.startswith(FACT):
        with contextlib.suppress(ValueError):
            fact = json.loads(line.removeprefix(FACT))
            return fact if isinstance(fact, dict) else None
    return None


def run(tasks: Sequence[Task], journal: Journal, limit_s: float, workers: int) -> None:
    """Run the tasks within `limit_s` seconds: the build, then correctness on `workers` threads, then speed in turn.

    Correctness gets at most 3/5 of the time, so that a slow one leaves some for speed.
    """
    start = time.monotonic()
    deadline = start + limit_s - RESERVE_S
    for part, share, threads in (("build", 0.4, 1), ("correctness", 0.6, workers), ("speed", 1.0, 1)):
        until = min(deadline, start + share * limit_s) if part != "speed" else deadline
        with ThreadPoolExecutor(threads) as pool:
            for task in tasks:
                if task.part == part:
                    pool.submit(run_task, task, journal, until)


def _environment(task: Task) -> dict[str, str]:
    # the package is found even where its build has failed
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **task.environment}


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of its session has ended
        os.killpg(process.pid, signal.SIGKILL)


def _status(code: int, timed_out: bool, tail: str) -> str:
    if timed_out and code == -signal.SIGKILL:
        return "timeout"
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    if code and (missing := re.search(r"No module named '([\w.]+)'", tail)):
        return f"missing: {missing[1]}"
    return "right" if code == 0 else "wrong"


def main(arguments: list[str] | None = None) -> int:
    """Run all tasks, write the facts and the page; return the exit code."""
    from summary import write_page  # these two beside this file
    from tasks import make_tasks, planted_tasks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the facts and the page")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: rehearsal on small shapes")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all")
    parser.add_argument("--patience", type=float, default=1, help="factor of the limits of tasks, on a slow machine")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="checks at once")
    parser.add_argument("--only", default="", help="run the tasks whose name this regular expression finds")
    parser.add_argument("--plant", action="store_true", help="add tasks with a fault each, which the run has to name")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"gpu_first_{options.device}_{time.strftime('%Y%m%d_%H%M')}"
    tasks = [*(planted_tasks() if options.plant else ()), *make_tasks(options.device, options.out)]
    tasks = [
        replace(task, limit_s=options.patience * task.limit_s) for task in tasks if re.search(options.only, task.name)
    ]
    with stem.with_suffix(".jsonl").open("w") as file:
        journal = Journal(file)
        run(tasks, journal, options.limit, options.workers)
    write_page(stem.with_suffix(".md"), journal.rows, options.device)
    print(f"summary: {stem.with_suffix('.md')}")
    ends = [row for row in journal.rows if "status" in row]
    return int(any(row["status"] != "right" and not row.get("expected") for row in ends))


if __name__ == "__main__":
    raise SystemExit(main())
