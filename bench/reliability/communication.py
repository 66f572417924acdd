"""What two ranks say to each other: bytes a step and their share of it, from metrics.jsonl of a run under torchrun.

    python bench/reliability/communication.py [--steps 60] [--ranks 2] [--json bench/results/communication_cpu2.json]

The demo's model and photographs, gloo, one thread a rank. The share holds the wait for the slower rank, so on a busy
machine it says more of that than of the network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from upstep_fast.cli import demo
from upstep_fast.runtime.machine import device_card

BATCH = 64


def rows(folder: str, steps: int, ranks: int) -> list[dict[str, Any]]:
    """metrics.jsonl of a run on `ranks` processes."""
    model, data = demo.assets()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run = ["-m", "upstep_fast", "adapt", "--model", model, "--data", data, "--out", f"{folder}/out"]
    options = ["--steps", str(steps), "--batch-size", str(BATCH), "--device", "cpu"]
    options += ["--no-report-images", "--verdict", "off"]
    subprocess.run([*launch, *run, *options], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [json.loads(line) for line in Path(folder, "out", "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Measures and prints; writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # the first steps hold what the ranks agree on at the start
        found = rows(folder, args.steps, args.ranks)[2:]
    result: dict[str, Any] = {
        "device": device_card(torch.device("cpu")) | {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "ranks": args.ranks,
        "batch_size": BATCH,
    }
    for name, kind in (("open", True), ("closed", False)):
        chosen = [row for row in found if row["open"] is kind]
        result[name] = {
            "steps": len(chosen),
            "bytes": statistics.median(row["comm_bytes"] for row in chosen),
            "share_median": statistics.median(row["comm_share"] for row in chosen),
            "seconds_median": statistics.median(BATCH / row["images_per_s"] for row in chosen),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
