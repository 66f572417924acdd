"""One training step of LoSA beside LoRA's and full fine-tuning's: time, and bytes kept for backward.

    python bench/engine/bench_methods.py --json bench/results/bench_methods_cpu_b16.json                (B/16, batch 4)
    python bench/engine/bench_methods.py --model vit_large_patch14_dinov2 --img-size 224 --batch-size 64 --json FILE
    python bench/engine/bench_methods.py --model vit_e --batch-size 16 --methods losa --json FILE     (a GPU of 80 GB)

A step is forward, loss and backward, without the optimizer. `eager` is the plain timm model under autocast. Kept bytes
are what autograd holds between forward and backward, each memory once, parameters left out; on a GPU the peak of the
allocator beyond what was there before is given as well. Variants alternate within one process. Times are the GPU's, or
on a CPU the process's own (with one thread a neighbor's work does not count).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from upstep_fast.methods.supervised.baselines import Baseline
from upstep_fast.methods.supervised.losa import Losa, LosaSpec
from upstep_fast.model import backbone as backbones
from upstep_fast.model.lora import LoraSpec
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.machine import device_card, extra_peak_bytes
from upstep_fast.runtime.timing import alternate

CLASSES = 100
METHODS = ("full eager", "lora eager", "losa eager", "lora", "losa")


def load(name: str, img_size: int | None, depth: int) -> backbones.Backbone:
    """Return a backbone of random weights; vit_e: ViT-e of PaLI (arXiv 2209.06794), 3.9 billion parameters."""
    if name != "vit_e":
        return backbones.load(name, img_size=img_size, pretrained=False)
    size = img_size or 224
    vit = VisionTransformer(
        size, patch_size=14, embed_dim=1792, depth=depth, num_heads=16, mlp_ratio=15360 / 1792, num_classes=0
    )
    like = backbones.load("vit_tiny_patch16_224", img_size=size, pretrained=False)
    return replace(like, vit=vit, name=name, width=1792)


def models(
    names: Sequence[str], backbone: backbones.Backbone, compute: Compute, rank: int, lora_r: int
) -> dict[str, nn.Module]:
    """Each method on a copy of the backbone, on the engine and, for comparison, eager."""

    def made(name: str) -> nn.Module:
        # one alone needs no copy, and there may be no room for it
        own = copy.deepcopy(backbone) if len(names) > 1 else backbone
        if name.startswith("losa"):
            return Losa(own, LosaSpec(rank=rank, token_rank=rank), CLASSES)
        return Baseline(own, name.split()[0], CLASSES, spec=LoraSpec(lora_r, lora_r, ("q", "v")))

    found = {name: made(name) for name in names}
    for name, model in found.items():
        model.to(compute.device).train()
        for parameter in (p for p in model.parameters() if p.requires_grad and p.dim() > 1):
            if not parameter.any():  # zero factors would leave others without gradient
                nn.init.normal_(parameter, std=0.02)
        if not name.endswith("eager"):
            model.accelerate(compute.dtype or torch.float32)
    return found


def loss_of(model: nn.Module, x: Tensor, y: Tensor, compute: Compute) -> Tensor:
    """Return the loss of a step, under autocast."""
    with compute.autocast():
        return F.cross_entropy(model(x).float(), y)


def step_of(model: nn.Module, x: Tensor, y: Tensor, compute: Compute) -> Callable[[], object]:
    """One step: gradients of everything that trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(loss_of(model, x, y, compute), parameters, allow_unused=True)


def kept_bytes(model: nn.Module, x: Tensor, y: Tensor, compute: Compute) -> int:
    """Bytes that autograd holds after forward."""
    of_parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_parameters:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, x, y, compute)
    return sum(found.values())


def main() -> None:
    # lizard forgives: the arguments, then the measurement in its order
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--depth", type=int, default=56, help="of vit_e")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="LoSA's, on both axes")
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    compute = resolve("auto", "auto")
    backbone = load(args.model, args.img_size, args.depth)
    x = torch.randn(args.batch_size, 3, *backbone.img_size, device=compute.device)
    y = torch.arange(args.batch_size, device=compute.device) % CLASSES
    found = models(args.methods, backbone, compute, args.rank, args.lora_r)
    steps = {name: step_of(model, x, y, compute) for name, model in found.items()}
    kept = {name: kept_bytes(model, x, y, compute) for name, model in found.items()}
    times = alternate(steps, compute.device, runs=args.runs, warmup=1)
    rows = []
    for name, model in found.items():
        low, median, high = statistics.quantiles(times[name], n=4)
        row = {
            "name": name,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "median_ms": median,
            "low_ms": low,
            "high_ms": high,
            "kept_bytes": kept[name],
            "peak_bytes": extra_peak_bytes(steps[name], compute.device),
        }
        rows.append(row)
        print(f"{name:<12} {median:9.1f} ms ({low:.1f}..{high:.1f})  kept {kept[name] / 1e6:9.1f} MB", flush=True)
    median = {row["name"]: row["median_ms"] for row in rows}
    pairs = (("losa eager", "lora eager"), ("losa", "lora"), ("losa", "lora eager"))
    ratios = {
        f"{a} / {b}, {what}": of[a] / of[b]
        for what, of in (("time", median), ("kept", kept))
        for a, b in pairs
        if {a, b} <= set(of)
    }
    print(json.dumps(ratios, indent=1))
    if args.json is not None:
        config = {name: value for name, value in vars(args).items() if name != "json"}
        card = device_card(compute.device) | {"precision": compute.precision}
        text = json.dumps({"device": card, "config": config, "rows": rows, "ratios": ratios}, indent=1)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
