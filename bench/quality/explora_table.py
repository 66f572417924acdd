"""k-NN and linear probe of base, ExPLoRA-DINOv2 and ExPLoRA-MAE on real domains, one JSON line a run.

    python bench/quality/explora_table.py --data ../shared/data --sets sign_digits_64 pacs_cartoon_64 --out FILE.jsonl

Recipes are short, for a CPU: see RECIPES; any of their values can be replaced with --set name=value.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import upstep_fast
from upstep_fast.report.logs import setup_logging
from upstep_fast.runtime.machine import processor_name

RECIPES: dict[str, dict[str, Any]] = {
    "dinov2": dict(
        steps=120,
        batch_size=32,
        prototypes=1024,
        head_hidden=512,
        head_dim=64,
        local_views=2,
        lora_r=16,
        alpha="customary",
        lr=1e-3,
        momentum=0.98,
    ),
    "mae": dict(
        steps=200,
        batch_size=64,
        decoder_width=128,
        decoder_depth=2,
        decoder_heads=4,
        lora_r=16,
        alpha="customary",
        lr=1e-3,
    ),
}


def main() -> None:
    """One adaptation and one evaluation for each set and objective."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--objectives", nargs="+", default=list(RECIPES))
    parser.add_argument("--model", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = args.model or f"local-dir:{args.data / 'base_tiny'}"
    setup_logging()
    for name in args.sets:
        for objective in args.objectives:
            row = measure(model, args.data / f"{name}.tar", objective, args.seed, changes(args.set))
            with args.out.open("a") as file:
                file.write(json.dumps(row | {"set": name, "command": " ".join(sys.argv)}) + "\n")
            print(json.dumps({key: row[key] for key in ("base", "adapted", "ensemble", "seconds")}), flush=True)


def measure(model: str, data: Path, objective: str, seed: int, changed: dict[str, Any]) -> dict[str, Any]:
    """One run and its scores."""
    recipe = {"verdict": "off"} | RECIPES[objective] | changed
    out = Path(tempfile.mkdtemp(prefix="explora-"))
    try:
        began = time.monotonic()
        upstep_fast.adapt(model=model, data=data, out=out, method="explora", objective=objective, seed=seed, **recipe)
        seconds = time.monotonic() - began
        scores = upstep_fast.evaluate(model, data, adapter=out / "adapter")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        size = sum(path.stat().st_size for path in (out / "adapter").iterdir())
    finally:
        shutil.rmtree(out, ignore_errors=True)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    return {
        "objective": objective,
        "recipe": recipe,
        "seed": seed,
        **scores,
        "loss_first": sum(losses[:10]) / len(losses[:10]),
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        "center_last": rows[-1]["center"],
        "adapter_bytes": size,
        "seconds": round(seconds, 1),
        "load": os.getloadavg()[0],
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def changes(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, values as Python writes them or plain text."""
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


if __name__ == "__main__":
    main()
