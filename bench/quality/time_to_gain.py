"""Time until a label-free run reaches a gain of k-NN: a plain PEFT script, an earlier build and today's.

    python bench/quality/time_to_gain.py OUT.jsonl [--old CHECKOUT] [--data SET.tar ...] [--arms NAME ...]

Each row of OUT.jsonl is one run of so many steps, as its user would start it, with the process and wall seconds of the
whole command: start-up, data, training, and for upstep-fast the verdict and the whitening. The k-NN accuracy of its
adapter is measured afterwards, outside the time. Learning rates fall to 0 over the steps of a run, so that each point
of the curve gain over time is a run of its own. Rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upstep_fast.runtime.machine import processor_name

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SETS = ("sign_digits_64", "pacs_cartoon_64", "pacs_sketch_64", "gtsrb_32")
RECIPE = ("--batch-size", "64", "--lr", "3e-3", "--crop-min", "0.5")
PLAIN = ("--gate", "none", "--cvr", "off", "--verdict", "off", "--no-report-images", "--whitening", "off")
FAST = ("--objective", "vicreg", "--lora-blocks", "3", "--lr", "6e-3")
# not tuned; at the rate of fast, 6e-3, it lost 12.7 points on the hand signs (bench/results/rivals_cpu.jsonl)
DIET = ("--method", "diet", "--lora-blocks", "3", "--lr", "1e-3")
# name: (program, options, numbers of steps); the same recipe for all but those that say otherwise
ARMS: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "plain": ("script", RECIPE, (40, 80, 160)),
    "old": ("old", (*RECIPE, "--gate", "none", "--cvr", "off"), (40, 80, 160)),
    "engine": ("adapt", (*RECIPE, *PLAIN, "--objective", "clustering"), (40, 80, 160)),
    "fast": ("adapt", (*RECIPE, *PLAIN, *FAST), (20, 40, 80, 160, 320)),
    # rivals on the same adapters; a step of diet has one view of each image, and half the work
    "diet": ("adapt", (*RECIPE, *PLAIN, *DIET), (160,)),
    "simclr": ("script", (*RECIPE, "--objective", "simclr", "--blocks", "3", "--lr", "6e-3"), (80,)),
}


def main() -> None:
    """Run what is missing, a row each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--old", type=Path, help="checkout of the earlier build, with its compiled library")
    parser.add_argument("--model", default=f"local-dir:{SHARED / 'base_tiny'}")
    parser.add_argument("--data", nargs="+", type=Path, default=[SHARED / f"{name}.tar" for name in SETS])
    parser.add_argument("--source", type=Path, default=SHARED / "source_64.tar")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--bf16", type=int, default=0, help="1: autocast of the script, where the processor has bf16")
    options = parser.parse_args()
    done = {tuple(row["key"]) for row in rows(options.out)}
    for seed in options.seeds:
        for data in options.data:
            for arm in options.arms:
                for steps in ARMS[arm][2]:
                    key = (arm, data.stem, seed, steps)
                    if key in done or (arm == "old" and options.old is None):
                        continue
                    row = {"key": key, "processor": processor_name(), "load": os.getloadavg()[0]}
                    with options.out.open("a") as file:
                        file.write(json.dumps(row | measured(options, arm, data, seed, steps)) + "\n")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of this script; none if it is not there."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def measured(options: argparse.Namespace, arm: str, data: Path, seed: int, steps: int) -> dict[str, Any]:
    """Return the seconds of one run and the scores of its adapter. Raises CalledProcessError."""
    program, flags, _ = ARMS[arm]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "out")
        where = data
        if program == "script":  # torchvision reads folders
            with tarfile.open(data) as tar:
                tar.extractall(name, filter="data")
            where = Path(name, "train")
        start = [str(HERE / "plain_peft.py")] if program == "script" else ["-m", "upstep_fast", "adapt"]
        command = [sys.executable, *start, "--model", options.model, "--data", str(where), "--out", str(out), *flags]
        command += ["--steps", str(steps), "--seed", str(seed)]
        command += ["--bf16", str(options.bf16), "--workers", "1"] if program == "script" else ["--num-workers", "1"]
        env = os.environ | {"PYTHONPATH": str(options.old if program == "old" else ROOT)}
        began, spent = time.monotonic(), _process_seconds()
        subprocess.run(command, check=True, capture_output=True, env=env)
        wall, process = time.monotonic() - began, _process_seconds() - spent
        scores = _scores(options, out if program == "script" else out / "adapter", data)
    return {"wall": wall, "process": process, "gains": gains(scores), "scores": scores}


def gains(scores: dict[str, Any]) -> dict[str, float]:
    """Return the points of k-NN accuracy over the plain base features: whitening alone, and the four of an adapter."""
    plain = scores["base"]["knn"]
    forms = {"": "knn", " whitened": "knn_whitened"}
    every = {
        f"{name}{form}": scores[name][key] for name in ("base", "adapted", "ensemble") for form, key in forms.items()
    }
    return {name: round(value - plain, 2) for name, value in every.items() if name != "base"}


def _process_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _scores(options: argparse.Namespace, adapter: Path, data: Path) -> dict[str, Any]:
    """Return the scores of eval for an adapter, by today's build."""
    file = adapter.with_name("scores.json")
    k = "5" if "omniglot" in data.stem else "20"  # which has 20 images a class
    command = ["eval", "--model", options.model, "--data", str(data), "--adapter", str(adapter), "--k", k]
    command += ["--measures", "knn", "--source", str(options.source), "--json", str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "upstep_fast", *command], check=True, capture_output=True, env=env)
    scores = json.loads(file.read_text())
    return {name: scores[name] for name in ("base", "adapted", "ensemble", "source", "source_whitened")}


if __name__ == "__main__":
    main()
