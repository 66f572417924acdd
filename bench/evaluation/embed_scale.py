"""Processor time and peak memory of embedding 10,000 to 1,000,000 tiny images into a folder of shards.

    python bench/evaluation/embed_scale.py bench/results/embed_scale_cpu2.json [--counts 10000,100000,1000000]

The images are PNGs of 8 x 8 pixels in one tar file, made here. The model is a ViT of one block with 16 dimensions and
random weights, so that what grows with the number of images is not hidden behind the model. Each count is a process of
its own; its peak resident memory and its processor seconds, user and system, are those that the kernel gives for it.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from upstep_fast.runtime.machine import processor_name

MODEL = dict(img_size=8, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=0)
VARIANTS = 1000  # different pictures; the names differ


def write_model(folder: Path) -> str:
    """Write the model as a local-dir and return its name."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **MODEL)
    timm.models.save_for_hf(vit, folder, model_args=MODEL, safe_serialization=True)
    return f"local-dir:{folder}"


def write_tar(path: Path, count: int) -> None:
    """Write a tar of `count` PNGs."""
    rng = np.random.default_rng(0)
    pictures = []
    for image in rng.integers(0, 256, (VARIANTS, 8, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        pictures.append(buffer.getvalue())
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(count):
            member = tarfile.TarInfo(f"{i // 1000:04d}/{i:07d}.png")
            member.size = len(pictures[i % VARIANTS])
            tar.addfile(member, io.BytesIO(pictures[i % VARIANTS]))


# a small process between: the peak of a process counts from before its exec, when it was a copy of its parent
LAUNCHER = """
import json, os, sys, time
began = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ | {"OMP_NUM_THREADS": "1"})
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), *seconds, usage.ru_maxrss / 1024]))
"""


def measured(command: list[str]) -> dict[str, float]:
    """Run a command in a process of its own and return what it took."""
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], stdout=subprocess.PIPE, text=True, check=True)
    code, wall, processor, peak = json.loads(done.stdout.splitlines()[-1])
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return {"wall_s": round(wall, 1), "processor_s": round(processor, 1), "peak_rss_mb": round(peak, 1)}


def measure(root: Path, model: str, count: int, shard_size: int) -> dict[str, Any]:
    """Embed `count` images, and again when nothing is new: listing, loading and comparing the names."""
    write_tar(root / "images.tar", count)
    command = [sys.executable, "-m", "upstep_fast", "embed", "--model", model, "--data", str(root / "images.tar")]
    command += ["--out", f"{root}/{count}/", "--shard-size", str(shard_size), "--device", "cpu", "--quiet"]
    row = {"images": count, **measured(command)}
    shards = list((root / str(count)).glob("part-*.parquet"))
    row |= {"shards": len(shards), "bytes": sum(path.stat().st_size for path in shards), "repeated": measured(command)}
    return row | {"names_mb": round((24 + len("0000/0000000.png")) * count / 2**20, 1)}  # the names and their index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--counts", default="10000,100000,1000000")
    parser.add_argument("--shard-size", type=int, default=8192)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": f"{processor_name()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "load_average": os.getloadavg(),
        "command": "python bench/evaluation/embed_scale.py bench/results/embed_scale_cpu2.json",
        "model": MODEL,
        "shard_size": options.shard_size,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = write_model(root / "model")
        for count in map(int, options.counts.split(",")):
            record["rows"].append(measure(root, model, count, options.shard_size))
            options.out.write_text(json.dumps(record, indent=1) + "\n")
            print(json.dumps(record["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
