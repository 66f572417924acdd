"""Bytes kept for backward by memory level against eager PEFT's layout; on a GPU the peak as well.

pytest bench/engine/bench_memory.py --benchmark-only         (bytes are in the JSON's extra_info)
"""

import pytest
import torch

from upstep_fast.engine import vit as engine
from upstep_fast.model import backbone, lora, pooling
from upstep_fast.runtime.device import resolve

CPU_SHAPES = [("vit_tiny_patch16_224", 4), ("vit_base_patch16_224", 2)]
GPU_SHAPES = [("vit_base_patch16_224", 256), ("vit_large_patch14_dinov2", 128), ("vit_giant_patch14_dinov2", 32)]


@pytest.mark.parametrize("level", ["eager", "fast", "balanced", "lean"])
@pytest.mark.parametrize(("name", "batch"), GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES)
def test_memory(benchmark, name, batch, level):
    compute = resolve("auto", "bf16")
    vit = backbone.load(name, img_size=224, pretrained=False).vit.to(compute.device)
    lora.inject(vit, lora.LoraSpec(r=16, alpha=16, targets=("qkv",)))
    images = torch.randn(batch, 3, 224, 224, device=compute.device)
    # on a CPU the fused form runs by its references: the bytes are those of a GPU
    run = None if level == "eager" else engine.build(vit, torch.bfloat16, level, fused=True).features
    own = {p.untyped_storage().data_ptr() for p in vit.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def forward():
        if run is not None:
            return run(images)
        with compute.autocast():
            return pooling.features(vit, images)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward()
    assert out.requires_grad
    del out
    benchmark.group = f"{name}, {batch} views"
    benchmark.extra_info["kept_bytes"] = sum(size for pointer, size in kept.items() if pointer not in own)
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step():
        forward().square().mean().backward()
        if compute.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    if compute.device.type == "cuda":
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()
