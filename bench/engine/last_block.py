"""A training step whose last block goes on behind attention with the class token alone, against one of all tokens.

    python bench/engine/last_block.py OUT.json [--blocks 3 9] [--views 64] [--repeats 7]

Forward and backward of the features of `base_tiny`, in alternation, in processor time of one thread; the two results
are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upstep_fast.engine.vit import build
from upstep_fast.model import backbone, lora
from upstep_fast.runtime.machine import processor_name

ASSET = Path(backbone.__file__).parents[1] / "assets" / "base_tiny"


def main() -> None:
    """Write a row for each dtype and number of adapted blocks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 9])
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measured(dtype, blocks, options.views, options.repeats)
        for dtype in (torch.float32, torch.bfloat16)
        for blocks in options.blocks
    ]
    facts = {"processor": processor_name(), "capability": torch.backends.cpu.get_cpu_capability()}
    options.out.write_text(json.dumps(facts | {"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def measured(dtype: torch.dtype, blocks: int, views: int, repeats: int) -> dict[str, Any]:
    """Return the medians of both forms in processor ms, their ratio, and how far their gradients are apart."""
    torch.manual_seed(0)
    vit = backbone.load(f"local-dir:{ASSET}").vit.eval().requires_grad_(False)
    spec = lora.LoraSpec(r=8, alpha=8, targets=("q", "k", "v"))
    for adapter in lora.inject(vit, spec, leave_out=range(len(vit.blocks) - blocks)).values():
        torch.nn.init.normal_(adapter.lora_b, std=0.02)
    engine, images = build(vit, dtype), torch.randn(views, 3, *vit.patch_embed.img_size)
    forms = {"class_token": engine, "all_tokens": replace(engine, first=lambda: None)}
    parameters = [p for p in vit.parameters() if p.requires_grad]

    def step(features: Callable[[Tensor], Tensor]) -> Tensor:
        f = features(images)
        grads = torch.autograd.grad(f, parameters, torch.linspace(-1, 1, f.numel()).view_as(f))
        return torch.cat([g.flatten() for g in grads])

    one, other = (step(form.features) for form in forms.values())
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            began = time.process_time()
            step(form.features)
            times[name].append(1e3 * (time.process_time() - began))
    medians = {name: statistics.median(values) for name, values in times.items()}
    row = {"dtype": str(dtype).removeprefix("torch."), "adapted_blocks": blocks, "views": views}
    ratio = medians["all_tokens"] / medians["class_token"]
    return row | medians | {"ratio": ratio, "gradient_difference": ((one - other).norm() / other.norm()).item()}


if __name__ == "__main__":
    main()
