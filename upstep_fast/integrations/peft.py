"""Runs the LoRA layers of any PEFT model through `kernels.lora_linear`, and gives them back untouched.

    handle = patch(model)          # timm, Hugging Face, an LLM: whatever PEFT adapted
    handle.left_alone              # [(layer, why)]
    handle.revert()                # or `with patch(model): ...`

Only `forward` of single layers is replaced, on the instance: modules, parameters and state-dict keys stay PEFT's.
Each call looks at the layer's state first; what is not covered (adapters disabled, merged, several active, hooks)
goes through PEFT's own forward, said once for each reason.
"""

from __future__ import annotations

import logging
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upstep_fast.kernels.lora_linear import lora_linear

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patched:
    """What `patch` did. patched: names of the layers; left_alone: (name, why) of PEFT's other LoRA layers."""

    patched: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]
    _methods: tuple[types.MethodType, ...]

    def revert(self) -> None:
        """Put PEFT's own forward back; a second call does nothing."""
        for method in self._methods:
            layer: Any = method.__self__
            # a forward that someone else put in its place since is theirs to remove
            if vars(layer).get("forward") == method:
                del layer.forward

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


def patch(model: nn.Module, *, strategy: str | None = None) -> Patched:
    """Replace the forward of every PEFT LoRA Linear in `model` that `lora_linear` covers.

    Covered: a plain nn.Linear base, frozen, with one active adapter, not merged, no variant (DoRA, aLoRA, ...), no
    bias of its own, no hooks inside; dropout is kept, with the mask of `lora_linear` instead of torch's.
    strategy: as in `lora_linear`. Adapters in fp32 on a 16-bit base are multiplied in 16 bit, with fp32 sums and
    gradients. Raises ImportError without PEFT.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear

    methods: list[types.MethodType] = []
    patched: list[str] = []
    left_alone: list[tuple[str, str]] = []
    said: set[str] = set()

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        why = "called with more than one tensor" if args or kwargs else _not_covered(self) or _misfit(self, x)
        if why is not None:
            if why not in said and not torch.compiler.is_compiling():
                said.add(why)
                _log.warning("PEFT's own forward runs where a layer is not covered: %s", why)
            return type(self).forward(self, x, *args, **kwargs)
        return _lora_forward(self, x, strategy)

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        why: str | None
        if type(layer) is not Linear:
            why = f"the layer is {type(layer).__module__}.{type(layer).__qualname__}, not lora.Linear"
        elif "forward" in vars(layer):
            why = "its forward is already replaced"
        else:
            why = _not_covered(layer)
        if why is not None:
            left_alone.append((name, why))
            continue
        # a bound method, not a closure over the layer: copy.deepcopy then binds the copy's forward to the copy
        method = types.MethodType(forward, layer)
        layer.forward = method
        methods.append(method)
        patched.append(name)
    _log.info("patched %d PEFT LoRA layers, left %d alone", len(patched), len(left_alone))
    return Patched(tuple(patched), tuple(left_alone), tuple(methods))


def _lora_forward(layer: Any, x: Tensor, strategy: str | None) -> Tensor:
    (name,) = _active(layer)
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    return lora_linear(
        x,
        base.weight,
        base.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        float(layer.scaling[name]),
        dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        strategy=strategy,
    )


def _not_covered(layer: Any) -> str | None:
    """Why this layer, as it stands now, must run PEFT's forward, or None."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapter is merged"
    names = _active(layer)
    if len(names) != 1:
        return f"{len(names)} adapters are active"
    name = names[0]
    if name in getattr(layer, "lora_variant", {}) or layer.use_dora.get(name):
        return "its adapter is a variant of LoRA (DoRA or another)"
    if layer.lora_bias.get(name):
        return "its adapter has a bias"
    base, a, b, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(base) is not nn.Linear or type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"its base is {type(base).__qualname__}, not a plain nn.Linear"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is {type(dropout).__qualname__}"
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in (base, a, b, dropout)):
        return "a module inside it has hooks"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "its base is trained"
    return None


def _misfit(layer: Any, x: Tensor) -> str | None:
    """Why these dtypes must run PEFT's forward, or None."""
    base = layer.base_layer.weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        compute = torch.get_autocast_dtype(x.device.type)
        return "float64 under autocast" if torch.float64 in (x.dtype, base) else _bad_adapter(layer, compute)
    if x.dtype != base:
        return f"x is {x.dtype} and the base weight {base}"
    return _bad_adapter(layer, x.dtype)


def _bad_adapter(layer: Any, compute: torch.dtype) -> str | None:
    (name,) = _active(layer)
    for adapter in (layer.lora_A[name].weight, layer.lora_B[name].weight):
        if adapter.dtype not in (compute, torch.float32):
            return f"the adapter is {adapter.dtype} where the product is {compute}"
    return None


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]
