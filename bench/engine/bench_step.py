"""Forward, and forward with backward, of a LoRA-adapted ViT: PEFT, the eager reference, the engine.

    pytest bench/engine/bench_step.py --benchmark-only           (small on a CPU; B/16, L/14 and g/14 on a GPU)

`upstep-fast bench` alternates the variants and forms ratios within one run: quote those. This file feeds
pytest-benchmark's histories and comparisons.
"""

import pytest
import torch

from upstep_fast.cli.benchmark import error_of, make_variants, task_of
from upstep_fast.config.tools import BenchConfig
from upstep_fast.model import backbone
from upstep_fast.runtime.device import resolve

CPU_SHAPES = [("vit_tiny_patch16_224", 4)]
GPU_SHAPES = [("vit_base_patch16_224", 256), ("vit_large_patch14_dinov2", 128), ("vit_giant_patch14_dinov2", 32)]
SHAPES = GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def variants(request):
    name, batch = request.param
    config = BenchConfig(model=name, batch_size=batch, img_size=224, compile=torch.cuda.is_available())
    compute = resolve("auto", "auto")
    model = backbone.load(name, img_size=224, pretrained=False)
    images = torch.randn(batch, 3, 224, 224, device=compute.device)
    found, truth = make_variants(model, images, config, compute)
    return found, truth, images, compute


@pytest.mark.parametrize("kind", ["backward", "forward"])
@pytest.mark.parametrize("variant", ["peft", "peft compiled", "reference", "engine", "engine graphed"])
def test_step(benchmark, variants, variant, kind):
    found, truth, images, compute = variants
    if variant not in found:
        pytest.skip(f"{variant} is timed on a GPU only")
    error = error_of(kind, found[variant], truth, images)
    assert error < 5e-2, f"{variant} {kind} differs from fp32 by {error:.1e}: not timed"
    task = task_of(kind, found[variant])
    benchmark.group = f"{kind} {images.shape[0]} views"

    def run():
        task(images)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
