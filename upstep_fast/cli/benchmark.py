"""Timing of variants of one computation on this machine: the runner behind `upstep-fast bench` and bench/.

Variants alternate within one process, so that clock drift and other load affect all of them; each gets a median and
its spread, and ratios are formed within the run. A variant whose results are wrong is not timed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstep_fast.cli.benchmark_plot import check_plot, write_plot
from upstep_fast.config.tools import BenchConfig
from upstep_fast.engine import vit as engine
from upstep_fast.engine.cuda_graphs import graphed
from upstep_fast.errors import CheckFailedError, ConfigError
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora, pooling
from upstep_fast.runtime.atomic_file import require_writable
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.machine import device_card, extra_peak_bytes, package_version
from upstep_fast.runtime.progress import track
from upstep_fast.runtime.timing import alternate, summarize

# relative, of features and of adapter gradients, against fp32
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2, "fp8": 1e-1}


@track("bench")
def run(config: BenchConfig) -> dict[str, Any]:
    """Time forward and backward of one model by the eager reference, PEFT (also compiled on request) and the engine.

    Returns {"device", "config", "backward": [...], "forward": [...]} with one Timing per variant, eager PEFT first.
    Raises CheckFailedError if the engine's results are wrong.
    """
    check_plot(config.plot)
    for field in ("json", "plot"):
        if (path := getattr(config, field)) is not None:
            require_writable(Path(path), field)
    compute = resolve(config.device, config.precision)
    backbone = backbones.load(config.model, img_size=config.img_size, pretrained=config.pretrained)
    images = torch.randn(config.batch_size, 3, *backbone.img_size, device=compute.device)
    variants, truth = make_variants(backbone, images, config, compute)
    result: dict[str, Any] = {"device": device_card(compute.device), "config": asdict(config)}
    for kind in ("backward", "forward"):
        tasks = {name: partial(task_of(kind, variant), images) for name, variant in variants.items()}
        errors = {name: error_of(kind, variant, truth, images) for name, variant in variants.items()}
        if errors["engine"] > TOLERANCE[compute.precision]:
            raise CheckFailedError(f"engine: {kind} differs from fp32 by {errors['engine']:.1e}; not timed")
        times = alternate(tasks, compute.device, runs=config.runs)
        result[kind] = [
            asdict(summarize(name, times[name], extra_peak_bytes(task, compute.device), errors[name]))
            for name, task in tasks.items()
        ]
    if config.json is not None:
        Path(config.json).write_text(json.dumps(result, indent=1) + "\n")
    if config.plot is not None:
        write_plot(result, config.plot)
    return result


Variant = tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]


def make_variants(
    backbone: backbones.Backbone, images: Tensor, config: BenchConfig, compute: Compute
) -> tuple[dict[str, Variant], Variant]:
    """Return {"peft", "reference", "engine", ...}: (features, trained parameters); and the fp32 truth."""
    vit: Any = backbone.vit.to(compute.device)
    plain = copy.deepcopy(vit)
    lora.call_qkv(plain)  # where timm would pass by PEFT's layer
    targets = ("q", "k", "v") if vit.blocks[0].attn.qkv is None else ("qkv",)
    adapters = lora.inject(vit, lora.LoraSpec(r=config.lora_r, alpha=config.lora_r, targets=targets))
    for index, adapter in enumerate(adapters.values()):  # B = 0 would leave A without gradient
        generator = torch.Generator().manual_seed(index)
        adapter.lora_b.data.copy_(0.02 * torch.randn(adapter.lora_b.shape, generator=generator))
    parameters = [p for a in adapters.values() for p in (a.lora_a, a.lora_b)]

    def truth(x: Tensor) -> Tensor:
        return pooling.features(vit, x)

    def reference(x: Tensor) -> Tensor:
        with compute.autocast():
            return pooling.features(vit, x)

    variants: dict[str, Variant] = {}
    if package_version("peft"):
        peft_vit, peft_parameters = peft_of(plain, adapters)

        def eager_peft(x: Tensor) -> Tensor:
            with compute.autocast():
                return pooling.features(peft_vit, x)

        variants["peft"] = eager_peft, peft_parameters
        if config.compile:
            variants["peft compiled"] = torch.compile(eager_peft), peft_parameters
    variants["reference"] = reference, parameters
    built = engine.try_build(vit, compute.dtype or torch.float32, fp8=compute.fp8)
    if isinstance(built, str):
        raise ConfigError(f"model: the engine does not run {backbone.name}, since {built}; choose another model")
    variants["engine"] = built.features, parameters
    if compute.device.type == "cuda":
        variants["engine graphed"] = graphed(vit, built.features, built.check_unchanged), parameters
    return variants, (truth, parameters)


def peft_of(vit: nn.Module, adapters: Mapping[str, lora.LoraLinear]) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a model with these adapters in PEFT, and its adapter parameters."""
    import peft

    first = next(iter(adapters.values()))
    spec = peft.LoraConfig(r=first.r, lora_alpha=round(first.scale * first.r), target_modules=list(adapters))
    model: Any = peft.get_peft_model(vit, spec).base_model.model
    parameters: list[nn.Parameter] = []
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for ours, theirs in zip(adapter.as_one(), pair, strict=True):
            theirs.data.copy_(ours)
        parameters += pair
    return model, parameters


def task_of(kind: str, variant: Variant) -> Callable[[Tensor], object]:
    """Return the timed function: images -> adapter gradients ("backward", forward included) or features ("forward")."""
    features, parameters = variant

    def backward(x: Tensor) -> tuple[Tensor, ...]:
        f = features(x).float()
        # not a plain sum: the final norm makes that nearly constant
        weights = torch.linspace(-1, 1, f.numel(), device=f.device).view_as(f)
        return torch.autograd.grad((f * weights).sum(), parameters)

    return backward if kind == "backward" else torch.no_grad()(features)


def error_of(kind: str, variant: Variant, truth: Variant, images: Tensor) -> float:
    """Return the relative distance of a variant's gradients or features from the truth's, on the first 8 images."""
    ours, theirs = (task_of(kind, v)(images[:8]) for v in (variant, truth))
    if kind == "backward":
        ours, theirs = (torch.cat([g.float().flatten() for g in grads]) for grads in (ours, theirs))  # type: ignore[attr-defined]
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
    return ((ours.float() - theirs).norm() / theirs.norm()).item()
