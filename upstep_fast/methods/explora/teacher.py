"""The teacher of DINOv2's objective: a moving average of the student that shares its frozen weights.

average of factors:   A, B and all that trains, one by one; the teacher keeps adapters of its own
average of products:  W + s B A; the teacher has plain matrices instead, since such an average has no factors
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import nn

from upstep_fast.methods import trainable
from upstep_fast.model.lora import LoraLinear


def make_teacher(vit: Any, ema: Literal["factors", "products"]) -> Any:
    """Copy `vit` with adapters and trained parts of its own. Frozen weights are the student's tensors, not copies."""
    teacher = copy_module(vit)
    if ema == "products":
        _replace_adapters(teacher)
    return teacher


def copy_module(module: Any) -> Any:
    """Copy a module: its trained parameters are cloned, its frozen ones shared."""
    # by clone: deepcopy gives fake tensors a storage that is not the one they then use (torch 2.15)
    memo = {id(p): nn.Parameter(p.detach().clone()) if p.requires_grad else p for p in module.parameters()}
    return copy.deepcopy(module, memo)


def averaged_pairs(teacher: nn.Module | None, student: nn.Module | None) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield (the teacher's, the student's) of each parameter that is averaged by itself; nothing without a module."""
    if teacher is not None and student is not None:
        averages = dict(teacher.named_parameters())
        yield from ((averages[name], p) for name, p in trainable.trained(student).items() if name in averages)


def _replace_adapters(teacher: nn.Module) -> None:
    """Put plain matrices in the place of the teacher's adapters: an average of products has no factors."""
    for name, module in list(teacher.named_modules()):
        if isinstance(module, LoraLinear):
            linear = copy.copy(module.base)
            linear._parameters = dict(module.base._parameters)
            linear.weight = nn.Parameter(module.base.weight.detach().clone(), requires_grad=False)
            teacher.set_submodule(name, linear)


def own_weights(teacher: nn.Module, adapters: Iterable[str]) -> list[nn.Parameter]:
    """Return the matrices that hold an average of products. adapters: the student's, by name."""
    return [teacher.get_parameter(f"{name}.weight") for name in adapters]
