"""What checkpoints cost: the time for which a save holds up the run, the time that its thread takes, and the share.

    python bench/reliability/checkpoint_cost.py [--json bench/results/checkpoint_cost_cpu2.json]

First the demo's model and photographs, the default batch and interval; then one save of a ViT-B and a ViT-L at their
default adapters. The share is that of the time in which the loop waits for saves, the last one's wait for the disk
included, in the time of the whole loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from upstep_fast.cli import demo
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.model import backbone
from upstep_fast.runtime import checkpoint
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.machine import device_card
from upstep_fast.train import adapt, resume, run_writer
from upstep_fast.train.identity import Identity
from upstep_fast.train.state import RunState, fresh_state


def timed(owner: Any, name: str, into: list[float]) -> None:
    """From now on `owner.name` notes the seconds that each call takes."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - began)

    setattr(owner, name, call)


def whole_run(steps: int) -> dict[str, Any]:
    """Time a run of the demo's model at the default checkpoint interval."""
    held: list[float] = []
    waited: list[float] = []
    written: list[float] = []
    timed(run_writer.RunWriter, "save", held)
    timed(run_writer.RunWriter, "wait", waited)
    timed(checkpoint, "save", written)
    model, data = demo.assets()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out")
        config = from_flat(
            AdaptConfig,
            model=model,
            data=(data,),
            out=out,
            steps=steps,
            batch_size=8,
            report_images=False,
            verdict="off",
        )
        result = adapt.run(config)
        newest = max((Path(out) / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "model": "base_tiny",
        "steps": steps,
        "batch_size": config.optimization.batch_size,
        "checkpoint_every": config.checkpoints.every,
        "saves": len(held),
        "bytes": size,
        "run_seconds": result.seconds,
        "held_ms": [1e3 * s for s in held],
        "last_wait_ms": 1e3 * sum(waited),
        "thread_ms": [1e3 * s for s in written],
        "share_percent": 100 * (sum(held) + sum(waited)) / result.seconds,
    }


def one_save(name: str, saves: int = 7) -> dict[str, Any]:
    """Save of a larger model's state, its moments included."""
    config = from_flat(AdaptConfig, model=name, data=("-",), out="-", steps=1)
    compute = resolve("cpu", "fp32")
    state = fresh(config, compute, name)
    identity = Identity({}, {}, {}, {})
    held: list[float] = []
    written: list[float] = []
    timed(checkpoint, "save", written)
    with tempfile.TemporaryDirectory() as folder, checkpoint.Writer() as writer:
        for step in range(saves):
            state.step = step
            began = time.perf_counter()
            resume.save(state, Path(folder), identity, writer)
            held.append(time.perf_counter() - began)
            writer.wait()
        size = sum(path.stat().st_size for path in max(Path(folder).glob("step-*")).iterdir())
    return {
        "model": name,
        "saves": saves,
        "bytes": size,
        "held_ms_median": 1e3 * statistics.median(held),
        "held_ms_max": 1e3 * max(held),
        "thread_ms_median": 1e3 * statistics.median(written),
    }


def fresh(config: AdaptConfig, compute: Compute, name: str) -> RunState:
    """Return a training state with random weights, after one update."""
    state = fresh_state(config, compute, backbone.load(name, pretrained=False))
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    return state


def main() -> None:
    """Measures and prints; writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    found = {
        "device": device_card(resolve("auto", "auto").device),
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "run": whole_run(args.steps),
        "saves": [one_save(name) for name in ("vit_base_patch16_224", "vit_large_patch16_224")],
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
