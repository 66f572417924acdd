"""Host time of a training step's forward and backward on the engine as on a GPU, without one: launches do nothing.

    python bench/engine/host_time.py [--depth 24] [--json FILE]

A ViT of the depth of ViT-L and tiny widths runs on CPU tensors in the form it has on a GPU: our kernels by Triton,
whose own launch code runs up to the call of the driver, which is empty. What is left is Python, torch's dispatcher and
the launch code; torch's operators also compute, on a few numbers. Processor time, medians; quote ratios of two builds
run in alternation. GPU times are not part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
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
ROUNDS = 15


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


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median processor time of a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, empty_driver(), triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        times = {name: milliseconds(call) for name, call in step_parts(tiny_vit(args.depth)).items()}
    for name, ms in times.items():
        print(f"{name:20} {ms:8.2f} ms")
    if args.json:
        card = {"torch": torch.__version__, "triton": triton.__version__, "machine": platform.machine()}
        args.json.write_text(json.dumps({"card": card, "depth": args.depth, "milliseconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
