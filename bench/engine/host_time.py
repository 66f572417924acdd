"""Host time of a training step's forward and backward on the engine as on a GPU, without one: launches do nothing.

    python bench/engine/host_time.py [--against OTHER_CHECKOUT] [--depth 24] [--json FILE]

A ViT of the depth of ViT-L and tiny widths runs on CPU tensors in the form it has on a GPU: our kernels by Triton,
whose own launch code runs up to the call of the driver, which is empty. What is left is Python, torch's dispatcher and
the launch code; torch's operators also compute, on a few numbers. Processor time, medians; quote ratios of two
builds in one run. GPU times are not part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from upstep_fast.engine import vit as engine
from upstep_fast.kernels import _triton
from upstep_fast.kernels._dispatch import forced
from upstep_fast.model import lora

WIDTH, SIDE, VIEWS, RANK = 16, 28, 1, 4
ROUNDS = 25


@contextlib.contextmanager
def empty_driver() -> Iterator[None]:
    """Let Triton see an sm_90 device whose launches do nothing, and our ops take CPU tensors for its."""
    properties = {"max_shared_mem": 232_448, "multiprocessor_count": 132}
    utils = SimpleNamespace(
        get_device_properties=lambda device: properties,
        load_binary=lambda name, kernel, shared, device: (0, 0, 0, 0, 1024),
    )
    fake = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, metadata: lambda *args: None,
        utils=utils,
    )
    before, interpret = driver._active, _triton.INTERPRET
    driver._active, _triton.INTERPRET = fake, True
    try:
        with forced("triton"), torch.backends.mkldnn.flags(enabled=False):
            yield
    finally:
        driver._active, _triton.INTERPRET = before, interpret


def tiny_vit(depth: int) -> Any:
    """Return a ViT of random weights with LayerScale and adapters on q, k and v."""
    vit = timm.create_model(
        "vit_large_patch14_dinov2", img_size=SIDE, depth=depth, embed_dim=WIDTH, num_heads=1, num_classes=0
    )
    lora.inject(vit.eval().requires_grad_(False), lora.LoraSpec(r=RANK, alpha=RANK, targets=("q", "k", "v")))
    return vit


def step_parts(vit: Any) -> dict[str, Callable[[], object]]:
    """Return the parts of a step by name: merging alone, forward (with merging), forward and backward, evaluation."""
    built = engine.build(vit, torch.bfloat16, fused=True, compiled=False)
    images, trained = torch.randn(VIEWS, 3, SIDE, SIDE), [p for p in vit.parameters() if p.requires_grad]

    def forward() -> Tensor:
        return built.features(images)

    def both() -> None:
        for p in trained:
            p.grad = None
        f = forward()
        f.backward(torch.ones_like(f))

    parts: dict[str, Callable[[], object]] = {"merge": built.merge_adapters, "forward": forward, "step": both}
    return parts | {"without gradients": torch.no_grad()(forward)}


def serve(depth: int) -> None:
    """Time a part of a step for each line of the standard input, its name, and print the milliseconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, empty_driver(), triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        parts = step_parts(tiny_vit(depth))
        for call in parts.values():
            for _ in range(4):
                call()
        gc.disable()
        print(json.dumps(list(parts)), flush=True)
        for line in sys.stdin:
            call = parts[line.strip()]
            call()
            start = time.process_time()
            call()
            print(1e3 * (time.process_time() - start), flush=True)


def alternate(checkouts: list[Path], depth: int) -> dict[str, list[float]]:
    """Return the median milliseconds of each part by each checkout's build, timed in turns."""
    command = [sys.executable, __file__, "--serve", "--depth", str(depth)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    builds = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(path)}, text=True, **pipes) for path in checkouts
    ]

    def ask(build: Any, name: str) -> float:
        build.stdin.write(name + "\n")
        build.stdin.flush()
        return float(build.stdout.readline())

    try:
        (names, *_) = [json.loads(build.stdout.readline()) for build in builds]
        rows = {name: [[ask(build, name) for build in builds] for _ in range(ROUNDS)] for name in names}
    finally:
        for build in builds:
            build.stdin.close()
            build.wait()
    return {name: [statistics.median(times) for times in zip(*turns, strict=True)] for name, turns in rows.items()}


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--against", type=Path, help="another checkout, timed in alternation with this one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.depth)
        return
    here = Path(__file__).parents[2]
    times = alternate([here, args.against] if args.against else [here], args.depth)
    for name, each in times.items():
        ratio = f"   {each[0] / each[1]:.2f} of {args.against}" if args.against else ""
        print(f"{name:20} {'  '.join(f'{ms:7.2f} ms' for ms in each)}{ratio}")
    if args.json:
        card = {"torch": torch.__version__, "triton": triton.__version__, "machine": platform.machine()}
        names = ["this build", "against"][: 1 + bool(args.against)]
        rows = {name: dict(zip(names, each, strict=True)) for name, each in times.items()}
        content = {"card": card, "depth": args.depth, "rounds": ROUNDS, "median milliseconds": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
