"""Cost of `embed`: processor seconds and peak memory over the number of images, the model's width and the batch.

    python bench/evaluation/embed_cost.py bench/results/embed_cost_cpu2.json

Each run is a process of its own: ViTs of patch 16 at 224 pixels with random weights, on JPEGs of 400 x 300 pixels, in
the precision that `auto` chooses. cpu_s: processor time of all threads, import and start included. wall_s: from the
call to the file. peak_mb: largest resident memory.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from embed_speed import mosaic, photographs

from upstep_fast.runtime.machine import device_card

WIDTHS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}
# width, batch size, images
RUNS = [
    (384, 32, 32),
    (384, 32, 64),
    (384, 32, 128),
    (192, 32, 64),
    (768, 32, 64),
    (384, 1, 64),
    (384, 8, 64),
    (384, 64, 64),
]


def child(model: str, images: str, out: str, batch: int) -> None:
    """Embed and print what it took."""
    import upstep_fast

    began = time.perf_counter()
    upstep_fast.embed(model, images, out, batch_size=batch, device="cpu", overwrite=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "cpu_s": used.ru_utime + used.ru_stime,
                "wall_s": time.perf_counter() - began,
                "peak_mb": used.ru_maxrss / 1024,
            }
        )
    )


def main() -> None:
    out = Path(sys.argv[1])
    record: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "command": f"python bench/evaluation/embed_cost.py {out}",
        "machine": device_card(torch.device("cpu"))
        | {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 1)},
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        work, tiles = Path(folder), photographs()
        torch.manual_seed(0)
        for width in sorted({width for width, *_ in RUNS}):
            timm.models.save_for_hf(
                timm.create_model(WIDTHS[width], num_classes=0), str(work / str(width)), safe_serialization=True
            )
        for count in sorted({count for *_, count in RUNS}):
            (work / f"images{count}").mkdir()
            for i in range(count):
                mosaic(tiles, i).save(work / f"images{count}" / f"{i:05d}.jpg", quality=90)
        for width, batch, count in RUNS:
            paths = [f"local-dir:{work / str(width)}", str(work / f"images{count}"), str(work / "x.npy")]
            done = subprocess.run(
                [sys.executable, __file__, "--child", *paths, str(batch)], stdout=subprocess.PIPE, text=True, check=True
            )
            found = {key: round(value, 1) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
            record["runs"].append({"width": width, "batch_size": batch, "images": count} | found)
            print(record["runs"][-1], file=sys.stderr)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
