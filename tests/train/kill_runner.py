"""Kills runs and lets them go on: a process of its own that imports once and forks one child a run.

    python kill_runner.py JOB.json

JOB: {"options": {...of adapt...}, "seed": 0, "random": N, "points": [...]}. A kill at a point comes before the
point-th call that orders what is on disk (fsync, replace, unlink, rmdir); a random one at any moment of the run.
One JSON line a kill.
"""

import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
import tomllib
from pathlib import Path

import torch

import upstep_fast
from upstep_fast.runtime import checkpoint
from upstep_fast.train.adapt import run  # noqa: F401  (imported before the forks)

CLOCK = ("images_per_s", "data_wait", "forward_s", "backward_s", "other_s")  # no two runs agree on these


def child(options, point=None):
    """Forks a run, which kills itself before its `point`-th call if one is given. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    # torch makes its thread pool anew after a fork, at the next call of this and not safely from two threads at once:
    # without it autograd's threads would race for it ("Invalid thread pool!", an abort)
    torch.set_num_threads(1)
    try:
        if point is not None:
            calls = iter(range(10**9))
            for name in ("fsync", "replace", "unlink", "rmdir"):
                patch(name, calls, point)
        upstep_fast.adapt(**options)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def patch(name, calls, point):
    real = getattr(os, name)

    def counted(*args, **kwargs):
        if next(calls) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, name, counted)


def rows(out):
    try:
        return sum(line.endswith(b"\n") for line in (out / "metrics.jsonl").read_bytes().splitlines(keepends=True))
    except FileNotFoundError:
        return 0


def one(options, kill):
    """Kill a run once. Returns the files left by the kill and the result of the resumed run."""
    out = Path(options["out"])
    pid = child(options, kill.get("point"))
    if "delay" in kill:
        # counted in steps first, so that on a busy machine too the kills fall into the run
        while rows(out) < kill["after"] and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        time.sleep(kill["delay"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    done, left = rows(out), len(list((out / "checkpoints").glob(".tmp-*")))
    found = checkpoint.newest(out / "checkpoints")  # raises if what is there is not whole
    alphas = sorted({json.loads(path.read_text())["lora_alpha"] for path in out.rglob("adapter_config.json")})
    told = (out / "config.toml").is_file() and tomllib.loads((out / "config.toml").read_text())["lora"]["r"]
    _, resumed = os.waitpid(child(options | {"resume": True}), 0)
    return {
        **kill,
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "ended": os.waitstatus_to_exitcode(status),
        "checkpoint": found.step if found else 0,
        "steps_done": done,
        "half_written": left,
        "alphas": alphas,  # of the adapters that the kill leaves
        "told": told,  # --lora-r by config.toml; False before there is one
        "resumed": os.waitstatus_to_exitcode(resumed),
        "left_over": [p.name for p in out.rglob("*") if ".tmp-" in p.name or p.name == "run.lock"],
    }


def evidence(out):
    """All that must be bit for bit the unbroken run's: the state's tensors and numbers, the adapter, the metrics."""
    found = checkpoint.newest(out / "checkpoints")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    exact = [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return found.step, found.files, found.manifest["state"], found.manifest["loader"], exact, adapter


def main(job):
    torch.set_num_threads(1)
    options, folder = job["options"], Path(job["options"]["out"])
    assert os.waitpid(child(options | {"out": str(folder / "whole")}), 0)[1] == 0
    draw = random.Random(job["seed"])
    # at any moment of any step but the last, by the time that a step took: a run may be faster than a fixed delay
    whole = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
    step_seconds = statistics.median(options["batch_size"] / json.loads(line)["images_per_s"] for line in whole)
    kills = [
        {"after": draw.randrange(options["steps"] - 1), "delay": draw.uniform(0, step_seconds)}
        for _ in range(job["random"])
    ]
    kills += [{"point": point} for point in job["points"]]
    for at, kill in enumerate(kills):
        out = folder / str(at)
        row = one(options | {"out": str(out)}, kill)
        print(json.dumps(row | {"same": evidence(out) == evidence(folder / "whole")}), flush=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
