"""Forward only, no gradient: features of an adapted ViT by eager PyTorch, compiled, and the engine's forward-only path.

pytest bench/engine/bench_forward.py --benchmark-only        (small on a CPU; B/16, L/14 and g/14 on a GPU)
"""

import pytest
import torch

from upstep_fast.engine import vit as engine
from upstep_fast.model import backbone, lora, pooling
from upstep_fast.runtime.device import resolve

CPU_SHAPES = [("vit_tiny_patch16_224", 4)]
GPU_SHAPES = [("vit_base_patch16_224", 256), ("vit_large_patch14_dinov2", 128), ("vit_giant_patch14_dinov2", 64)]


@pytest.fixture(
    scope="module",
    params=GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES,
    ids=lambda shape: f"{shape[0]}-{shape[1]}",
)
def case(request):
    name, batch = request.param
    compute = resolve("auto", "auto")
    model = backbone.load(name, img_size=224, pretrained=False)
    vit = model.vit.to(compute.device)
    for adapter in lora.inject(vit, lora.LoraSpec(r=16, alpha=16, targets=("qkv",))).values():
        torch.nn.init.normal_(adapter.lora_b, std=0.02)
    images = torch.randn(batch, 3, 224, 224, device=compute.device)
    with torch.no_grad():
        truth = pooling.features(vit, images[:4])
    return vit, images, truth, compute


VARIANTS = {
    "eager": lambda vit, compute: eager(vit, compute),
    "compiled": lambda vit, compute: torch.compile(eager(vit, compute), mode="max-autotune"),
    "engine": lambda vit, compute: engine.build(vit, compute.dtype or torch.float32).forward_only,
}


def eager(vit, compute):
    def features(x):
        with compute.autocast():
            return pooling.features(vit, x)

    return features


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(benchmark, case, variant):
    vit, images, truth, compute = case
    if variant == "compiled" and compute.device.type == "cpu":
        pytest.skip("compiled is timed on a GPU only: minutes to compile")
    run = torch.no_grad()(VARIANTS[variant](vit, compute))
    error = ((run(images)[:4].float() - truth).norm() / truth.norm()).item()
    assert error < 5e-2, f"{variant} differs from fp32 by {error:.1e}: not timed"
    benchmark.group = f"forward only, {images.shape[0]} views"

    def timed():
        run(images)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, warmup_rounds=3)
