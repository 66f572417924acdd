"""Detects changes to a model after folding: the engine uses copies of its weights, so a change would be ignored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from upstep_fast.engine.timm_blocks import HOOKS, altered_reason


def make_stale_check(vit: Any, folded: Sequence[int]) -> Callable[[], None]:
    """Return a function that raises RuntimeError if `vit` has changed since this call.

    Changes are a module or parameter that was replaced, removed, cast or moved, a frozen parameter that was written
    to, and a hook or another forward on a module of the folded blocks, which would not be called. folded: their
    indices. The check takes less than a millisecond for the 900 modules of ViT-g.
    """
    inside = [module for index in folded for module in vit.blocks[index].modules()]
    hooks, attributes = [getattr(module, name) for module in inside for name in HOOKS], [vars(m) for m in inside]
    modules, parameters = [], []
    for path, module in vit.named_modules():
        prefix = path and f"{path}."
        modules += [(prefix + name, module._modules, name, child) for name, child in module._modules.items()]
        for name, p in module._parameters.items():
            if p is not None:
                version = None if p.requires_grad else p._version  # trained parameters are written to
                parameters.append((prefix + name, module._parameters, name, p, p.dtype, p.device, version))

    def check() -> None:
        if any(hooks) or any("forward" in values for values in attributes):
            index, reason = next((i, why) for i in folded if (why := altered_reason(vit.blocks[i])))
            raise RuntimeError(f"engine: block {index} {reason} since it was folded; fold the model again")
        for full_name, children, name, child in modules:
            if children.get(name) is not child:
                raise RuntimeError(f"engine: {full_name} was replaced after folding; fold the model again")
        for full_name, siblings, name, p, dtype, device, version in parameters:
            is_same = siblings.get(name) is p and p.dtype == dtype and p.device == device
            if not is_same or version not in (None, p._version):
                raise RuntimeError(f"engine: {full_name} was changed after folding; fold the model again")

    return check
