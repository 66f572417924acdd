"""Seconds of each measure of `eval --measures` on random unit features, the parts of equal size.

python bench/evaluation/measures_cost.py --json bench/results/measures_cpu.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from upstep_fast.config.evaluate import MEASURES
from upstep_fast.evaluation.features import Extracted, unwhitened
from upstep_fast.evaluation.measures.measure import measure
from upstep_fast.runtime.machine import device_card


def part(images: int, width: int, classes: int, seed: int) -> Extracted:
    """Return features of classes that overlap."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (images,), generator=generator)
    x = 0.3 * centers[y] + torch.randn(images, width, generator=generator)
    return Extracted({"base": F.normalize(x, dim=1)[:, None]}, y, tuple(map(str, range(classes))))


def main() -> None:
    """Time each measure alone, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("images", 10_000), ("width", 192), ("classes", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    train, test = (part(args.images, args.width, args.classes, seed) for seed in (1, 2))
    seconds: dict[str, float] = {}
    for name in MEASURES:
        start = time.process_time()
        measure(train, test, {"": unwhitened}, (name,) if name != "per-class" else ("knn", name), 20, None)
        seconds[name] = round(time.process_time() - start, 2)
    seconds["per-class"] = round(max(0.0, seconds["per-class"] - seconds["knn"]), 2)
    result = {
        "train": args.images,
        "test": args.images,
        "width": args.width,
        "classes": args.classes,
        "processor_seconds": seconds,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "device": device_card(torch.device("cpu")),
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
