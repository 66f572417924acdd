"""Operators and bytes of a training step's forward and backward, counted on tensors without content: no device needed.

    python bench/engine/launches.py [--model vit_large_patch14_dinov2] [--views 128] [--json FILE]

An operator is one launch or more (attention's backward is two); views and empty tensors are none. Bytes: what the
operators that are no matrix products or attention read and write, which is what their time goes to on a GPU; their
estimated milliseconds are those of the bytes and of a launch each, on an H200. The engine is counted in the form it has
there, PEFT and the reference eager with autocast.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upstep_fast.cli.benchmark import peft_of
from upstep_fast.engine import vit as engine
from upstep_fast.model import backbone, lora, pooling
from upstep_fast.train.memory.count import without_bytes

NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
}
# of an H200, as bench/kernels/static.py has them: 4.3 TB/s, and 2 us from one kernel's end to the next one's start
GIGABYTES_PER_S, LAUNCH_S = 4300, 2e-6
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "scaled_dot_product", "attention", "convolution")


class Count(TorchDispatchMode):
    """What runs while this is active."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operator and counts it."""
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if space != "prim" and not func.is_view and name not in NO_LAUNCH:
            self.operators[name] += 1
            if not any(part in name for part in PRODUCTS):
                tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
                self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        return out


def count(model: str, views: int, rank: int, variant: str) -> dict[str, Any]:
    """Operators and bytes of both halves of a step of `views` images."""
    with torch.device("meta"):
        vit, plain = (backbone.load(model, img_size=224, pretrained=False).vit for _ in range(2))
        adapters = lora.inject(vit, lora.LoraSpec(r=rank, alpha=rank, targets=("qkv",)))
        if variant == "peft":
            vit, _ = peft_of(plain, adapters)
    with FakeTensorMode(), torch.device("cpu"):
        without_bytes(vit)
        for name, parameter in vit.named_parameters():
            parameter.requires_grad_("lora_" in name)
        built = engine.build(vit, torch.bfloat16, fused=True) if variant == "engine" else None
        if built is not None:  # on a CPU the last block goes on with the class token alone, on a GPU with all
            built = dataclasses.replace(built, first=lambda: None)
        images = torch.empty(views, 3, 224, 224)

        def features() -> Tensor:
            if built is not None:
                return built.features(images)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return pooling.features(vit, images)

        with Count() as forward:
            f = features()
        with Count() as backward, torch.autograd.set_multithreading_enabled(False):
            f.float().backward(torch.empty_like(f, dtype=torch.float32))
    return {
        half: {
            "operators": sum(c.operators.values()),
            "gigabytes": c.bytes / 1e9,
            "estimated_ms": 1e3 * (c.bytes / 1e9 / GIGABYTES_PER_S + LAUNCH_S * beside_products(c.operators)),
            "by_name": dict(c.operators.most_common()),
        }
        for half, c in (("forward", forward), ("backward", backward))
    }


def beside_products(operators: Mapping[str, int]) -> int:
    """Return how many operators are no matrix products or attention."""
    return sum(count for name, count in operators.items() if not any(part in name for part in PRODUCTS))


def main() -> None:
    """Count, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch14_dinov2")
    parser.add_argument("--views", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {variant: count(args.model, args.views, args.rank, variant) for variant in ("peft", "reference", "engine")}
    print("| | operators, forward | backward | GB beside products, forward | backward | their ms, forward | backward |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for variant, halves in found.items():
        operators = " | ".join(f"{halves[half]['operators']:,}" for half in ("forward", "backward"))
        moved = " | ".join(f"{halves[half]['gigabytes']:.1f}" for half in ("forward", "backward"))
        times = " | ".join(f"{halves[half]['estimated_ms']:.1f}" for half in ("forward", "backward"))
        print(f"| {variant} | {operators} | {moved} | {times} |")
    if args.json:
        card = {"torch": torch.__version__, "timm": timm.__version__, "machine": platform.machine(), "device": "none"}
        args.json.write_text(
            json.dumps({"card": card, "options": vars(args) | {"json": None}, **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
