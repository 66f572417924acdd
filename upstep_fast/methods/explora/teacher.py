"""The teacher of DINOv2's objective: a copy of the student that follows it, and shares what is frozen.

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


def teacher_of(vit: Any, ema: Literal["factors", "products"]) -> Any:
    """A copy of `vit` with its own adapters and trained parts. Frozen weights are the student's tensors, not copies."""
    teacher = copied(vit)
    if ema == "products":
        _give_own_weights(teacher)
    return teacher


def copied(module: Any) -> Any:
    """A copy with what trains copied, and frozen parameters shared."""
    # by clone: deepcopy gives fake tensors a storage that is not the one they then use (torch 2.15)
    own = {id(p): nn.Parameter(p.detach().clone()) if p.requires_grad else p for p in module.parameters()}
    return copy.deepcopy(module, own)


def averaged(mine: nn.Module | None, theirs: nn.Module | None) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """(the teacher's, the student's) of all that is averaged one by one in a module and its copy, if there is one."""
    if mine is not None and theirs is not None:
        own = dict(mine.named_parameters())
        yield from ((own[name], p) for name, p in trainable.trained(theirs).items() if name in own)


def _give_own_weights(teacher: nn.Module) -> None:
    # an average of products is no product of factors: the teacher's adapted matrices become plain ones of its own
    for name, module in list(teacher.named_modules()):
        if isinstance(module, LoraLinear):
            linear = copy.copy(module.base)
            linear._parameters = dict(module.base._parameters)
            linear.weight = nn.Parameter(module.base.weight.detach().clone(), requires_grad=False)
            teacher.set_submodule(name, linear)


def own_weights(teacher: nn.Module, adapters: Iterable[str]) -> list[nn.Parameter]:
    """The matrices that hold an average of products."""
    return [teacher.get_parameter(f"{name}.weight") for name in adapters]
