"""A whole step of ExPLoRA with DINOv2's objective: ours against the official way of running it.

    python bench/engine/explora_step.py --json bench/results/explora_step_cpu.json
    python bench/engine/explora_step.py --model vit_large_patch14_dinov2 --batch-size 32 --runs 20 --json FILE   (a GPU)

The official way: the plain model under autocast, a pass for each size of crop, fused AdamW (--implementation
reference), with attention in two forms: `sdpa`, PyTorch's, as this package runs plain models, and `explicit`,
softmax(q k^T) v by products, as DINOv2's own code has it where xformers is missing. The faster one is what we are held
against. All take the same crops in turns, with the same first weights; their losses must agree before a time is given.
Times are the GPU's, or on a CPU the process's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from upstep_fast.config.explora import Dinov2Config
from upstep_fast.config.flat import from_flat
from upstep_fast.data.loading.loader import Batch
from upstep_fast.methods.gate import GateRule
from upstep_fast.model import backbone as backbones
from upstep_fast.runtime.device import resolve
from upstep_fast.runtime.machine import device_card
from upstep_fast.runtime.timing import alternate
from upstep_fast.train.state import fresh_state
from upstep_fast.train.step import flush, step

# what an operator's name says of it, the first that fits
KINDS = {
    "attention": ("attention", "softmax", "bmm"),
    "matrix products": ("mm", "linear"),
    "copies and casts": ("copy_",),
    "GELU": ("gelu",),
    "norms": ("layer_norm",),
    "other element-wise": ("::add", "::mul", "::sum", "::cat", "::where", "::ne", "::any", "::all", "::lerp", "::is"),
}


def shares(task: Callable[[], object]) -> dict[str, float]:
    """Percent of one run's time on the host, by kind of operator, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        task()
    of: Counter[str] = Counter()
    for event in seen.key_averages():
        found = (kind for kind, words in KINDS.items() if any(word in event.key for word in words))
        of[next(found, "rest")] += event.self_cpu_time_total
    return {kind: round(100 * time / of.total(), 1) for kind, time in of.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    compute, tasks, losses = resolve("auto", "auto"), {}, {}
    for name in ("official, sdpa", "official, explicit", "ours"):
        torch.manual_seed(0)
        backbone = backbones.load(args.model, img_size=224, pretrained=False)
        if name == "official, explicit":
            for module in backbone.vit.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
        config = from_flat(
Dinov2Config,
            args.model, ("none",), out="none", steps=1000, batch_size=args.batch_size, lora_r=64, prototypes=4096,
            implementation="auto" if name == "ours" else "reference", gate="none",
        )  # fmt: skip
        state = fresh_state(config, compute, backbone)
        generator = torch.Generator().manual_seed(0)
        pixels = [
            torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8, generator=generator) for _ in range(args.batch_size)
        ]
        views = state.method.views(Batch(pixels, torch.arange(args.batch_size), 0, 0), compute.device)

        def task(state=state, views=views, config=config) -> dict:
            row = step(state, views, GateRule("none"), config, compute)
            flush(state)
            return row

        tasks[name], losses[name] = task, task()["loss"]
    gap = max(losses.values()) / min(losses.values()) - 1
    assert gap < 2e-2, f"the first losses differ by {gap:.1e}: not timed"
    times = alternate(tasks, compute.device, runs=args.runs, warmup=1)
    medians = {name: statistics.median(of) for name, of in times.items()}
    official = min(median for name, median in medians.items() if name != "ours")
    result = {
        "device": device_card(compute.device) | {"precision": compute.precision},
        "config": {name: str(value) for name, value in vars(args).items()},
        "first_losses": losses,
        "milliseconds": times,
        "medians": medians,
        "official / ours": official / medians["ours"],
        "percent of a step": {name: shares(task) for name, task in tasks.items()},
    }
    print(json.dumps(result, indent=1))
    # lizard forgives: the arguments, then the measurement in its order
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
