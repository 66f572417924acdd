"""One training step's forward and backward of a large ViT: PEFT, the engine, its CUDA graphs; and its top kernels.

    python bench/gpu/step.py --device cuda --precision bf16 --form eager|graphed|compiled
    python bench/gpu/step.py --device cuda --profile 25

Variants alternate within one process; results are compared with fp32 first, and a wrong variant is not timed.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from facts import emit

from upstep_fast.cli.benchmark import TOLERANCE, error_of, make_variants, task_of
from upstep_fast.config.tools import BenchConfig
from upstep_fast.model import backbone as backbones
from upstep_fast.runtime.device import resolve
from upstep_fast.runtime.machine import extra_peak_bytes
from upstep_fast.runtime.timing import alternate, summarize

MODEL = {"cuda": ("vit_large_patch14_dinov2", 128), "cpu": ("vit_tiny_patch16_224", 2)}
FORMS = {
    "eager": ("peft", "engine"),
    "graphed": ("engine", "engine graphed"),
    "compiled": ("peft", "peft compiled", "engine"),
}


def main() -> int:
    """Time one form, or profile the engine; return 1 if a variant is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--form", choices=list(FORMS), default="eager")
    parser.add_argument("--profile", type=int, default=0, help="number of kernels to list instead of timing")
    options = parser.parse_args()
    name, views = MODEL[options.device]
    config = BenchConfig(model=name, batch_size=views, img_size=224, compile=options.form == "compiled")
    compute = resolve(options.device, options.precision)
    backbone = backbones.load(name, img_size=224, pretrained=False)
    images = torch.randn(views, 3, 224, 224, device=compute.device)
    variants, truth = make_variants(backbone, images, config, compute)
    if options.profile:
        return _profile(task_of("backward", variants["engine"]), images, options.profile)
    wrong = 0
    for kind in ("backward", "forward"):
        errors = {key: error_of(kind, variants[key], truth, images) for key in FORMS[options.form] if key in variants}
        right = {key: error for key, error in errors.items() if error <= TOLERANCE[compute.precision]}
        for key in errors.keys() - right.keys():
            wrong = 1
            emit(kind=kind, variant=key, error=errors[key], wrong=True)
        tasks = {key: partial(task_of(kind, variants[key]), images) for key in right}
        times = alternate(tasks, compute.device, runs=5)
        for key, task in tasks.items():
            timing = summarize(key, times[key], extra_peak_bytes(task, compute.device), right[key])
            emit(
                kind=kind,
                variant=key,
                precision=compute.precision,
                views=views,
                model=name,
                median_ms=timing.median_ms,
                low_ms=timing.low_ms,
                high_ms=timing.high_ms,
                peak_bytes=timing.peak_bytes,
                error=timing.error,
            )
    return wrong


def _profile(task, images: torch.Tensor, count: int) -> int:
    activity = torch.profiler.ProfilerActivity
    task(images)
    with torch.profiler.profile(activities=[activity.CUDA if images.is_cuda else activity.CPU]) as profile:
        task(images)
        if images.is_cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if images.is_cuda else "self_cpu_time_total"
    rows = sorted(profile.key_averages(), key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    emit(kernels=len(rows), launches=sum(row.count for row in rows), total_ms=total / 1e3)
    for row in rows[:count]:
        emit(kernel=row.key[:120], calls=row.count, ms=getattr(row, key) / 1e3, share=getattr(row, key) / total)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
