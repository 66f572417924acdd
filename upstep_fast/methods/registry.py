"""Builds the method and the optimizer that a configuration names."""

from __future__ import annotations

import torch

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.methods.method import Method
from upstep_fast.model.backbone import Backbone


def build(backbone: Backbone, config: AdaptConfig) -> Method:
    """Build the method that the configuration names, on the CPU. Puts its adapters on `backbone`, in place."""
    from upstep_fast.config.diet import DietConfig
    from upstep_fast.config.explora import Dinov2Config, MaeConfig
    from upstep_fast.methods.upstep.extended import ExtendedUpStep, has_additions
    from upstep_fast.methods.upstep.upstep import UpStep
    from upstep_fast.methods.upstep.vicreg import UpStepVicreg

    if isinstance(config, Dinov2Config):
        from upstep_fast.methods.explora.dinov2 import ExploraDinov2

        return ExploraDinov2(backbone, config)
    if isinstance(config, MaeConfig):
        from upstep_fast.methods.explora.mae import ExploraMae

        return ExploraMae(backbone, config)
    if isinstance(config, DietConfig):
        from upstep_fast.methods.upstep.diet import Diet

        return Diet(backbone, config)
    if config.objective.loss == "vicreg":
        return UpStepVicreg(backbone, config)
    return ExtendedUpStep(backbone, config) if has_additions(config) else UpStep(backbone, config)


def make_optimizer(method: Method, config: AdaptConfig) -> torch.optim.Optimizer:
    """Return AdamW over the method's parameter groups."""
    return torch.optim.AdamW(method.parameter_groups(), lr=config.optimization.lr, betas=(0.9, 0.999), fused=True)
