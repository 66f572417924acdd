"""Runs the LoRA layers of any PEFT model through `kernels.lora_linear`, reversibly.

    handle = patch(model)          # timm, Hugging Face, an LLM: any model with a PEFT adapter
    handle.unsupported             # [(layer, reason)]
    handle.revert()                # or `with patch(model): ...`

Only `forward` of single layers is replaced, on the instance: modules, parameters and state-dict keys stay PEFT's. Each
call checks the layer's state first; an unsupported state (adapters disabled, merged, several active, hooks) runs PEFT's
own forward, and each reason is logged once.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from upstep_fast.kernels import register_flop_formulas
from upstep_fast.kernels.lora_linear import lora_linear

_log = logging.getLogger(__name__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Patched:
    """The result of `patch`: names of the patched layers, and (name, reason) of PEFT's other LoRA layers."""

    patched: tuple[str, ...]
    unsupported: tuple[tuple[str, str], ...]
    _methods: tuple[types.MethodType, ...]

    def revert(self) -> None:
        """Restore PEFT's own forward; a second call does nothing."""
        for method in self._methods:
            layer: Any = method.__self__
            # a forward that someone else installed since then is theirs to remove
            if vars(layer).get("forward") == method:
                del layer.forward

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


def patch(model: nn.Module, *, strategy: str | None = None) -> Patched:
    """Replace the forward of every PEFT LoRA Linear in `model` that `lora_linear` supports.

    Supported: a plain, frozen nn.Linear base with one active adapter that is not merged, no variant (DoRA, aLoRA, ...),
    without a bias and without hooks inside. Dropout masks are drawn by `lora_linear` instead of torch. strategy: as in
    `lora_linear`. Adapters in fp32 on a 16-bit base are multiplied in 16 bit, with fp32 sums and gradients. Raises
    ImportError without PEFT.

    Left to PEFT's forward, with the reason: hooks (those of accelerate's offloading among them), a forward set on a
    module inside, parametrized or quantized weights, dropout that `strategy` has no form for, torch.jit.trace. Hooks
    that torch holds for all modules (register_module_forward_hook) do not see base_layer, lora_A and lora_B.
    """
    from peft.tuners.lora import LoraLayer

    register_flop_formulas()
    forward = _make_forward(strategy)
    methods: list[types.MethodType] = []
    patched: list[str] = []
    unsupported: list[tuple[str, str]] = []
    layer: Any
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = _unpatchable_reason(layer)
        if reason is not None:
            unsupported.append((name, reason))
            continue
        # a bound method, not a closure over the layer: copy.deepcopy then binds the copy's forward to the copy
        method = types.MethodType(forward, layer)
        layer.forward = method  # type: ignore[attr-defined]
        methods.append(method)
        patched.append(name)
    _log.info("patched %d PEFT LoRA layers, left %d unchanged", len(patched), len(unsupported))
    return Patched(tuple(patched), tuple(unsupported), tuple(methods))


def _make_forward(strategy: str | None) -> Callable[..., Tensor]:
    """Return the forward of patched layers, which logs each reason for PEFT's own forward once."""
    logged: set[str] = set()

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            reason: str | None = "called with more than one tensor"
        else:
            reason = _unsupported_reason(self) or _call_reason(self, x, strategy) or _dtype_reason(self, x)
        if reason is None:
            return _lora_forward(self, x, strategy)
        if reason not in logged and not torch.compiler.is_compiling():
            logged.add(reason)
            _log.warning("PEFT's own forward runs where a layer is not supported: %s", reason)
        return type(self).forward(self, x, *args, **kwargs)

    return forward


def _unpatchable_reason(layer: Any) -> str | None:
    """Return why `patch` must skip this LoRA layer, or None."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear:
        return f"the layer is {type(layer).__module__}.{type(layer).__qualname__}, not lora.Linear"
    if "forward" in vars(layer):
        return "its forward is already replaced"
    reason = _unsupported_reason(layer)
    if reason is None:
        for tensor in (p for part in (layer.base_layer, layer.lora_A, layer.lora_B) for p in part.parameters()):
            if is_traceable_wrapper_subclass(tensor):  # torchao's, DTensor
                return f"a weight of it is a {type(tensor).__qualname__}"
    return reason


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


def _unsupported_reason(layer: Any) -> str | None:
    """Return why this layer, in its present state, must run PEFT's forward, or None."""
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
    return _module_reason(layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])


def _module_reason(base: Any, a: nn.Module, b: nn.Module, dropout: nn.Module) -> str | None:
    if not all(type(linear) is nn.Linear for linear in (base, a, b)):
        return f"its base is {type(base).__qualname__}, not a plain nn.Linear"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is {type(dropout).__qualname__}"
    for part in (base, a, b, dropout):
        if "forward" in vars(part):  # such as accelerate sets, which loads offloaded weights
            return "a module inside it has a forward of its own"
        if any(getattr(part, hooks) for hooks in _HOOKS):
            return "a module inside it has hooks"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "its base is trained"
    return None


def _call_reason(layer: Any, x: Tensor, strategy: str | None) -> str | None:
    """Return why this call must run PEFT's forward, or None."""
    (name,) = _active(layer)
    dropout = layer.lora_dropout[name]
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
        if strategy in ("merged", "wide_k"):
            return f"strategy {strategy!r} has no dropout"
        if dropout.p >= 1:
            return "its dropout drops everything"
    if layer.base_layer.weight.device != x.device:
        return f"its weights are on {layer.base_layer.weight.device}"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace records it"
    if torch.compiler.is_compiling() and isinstance(layer.scaling[name], Tensor):
        return "its scaling is a tensor (hotswap), which would break the graph"
    return None


def _dtype_reason(layer: Any, x: Tensor) -> str | None:
    """Return why the dtypes of x and the layer must run PEFT's forward, or None."""
    base = layer.base_layer.weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        compute = torch.get_autocast_dtype(x.device.type)
        return "float64 under autocast" if torch.float64 in (x.dtype, base) else _adapter_dtype_reason(layer, compute)
    if x.dtype != base:
        return f"x is {x.dtype} and the base weight {base}"
    return _adapter_dtype_reason(layer, x.dtype)


def _adapter_dtype_reason(layer: Any, compute: torch.dtype) -> str | None:
    (name,) = _active(layer)
    for adapter in (layer.lora_A[name].weight, layer.lora_B[name].weight):
        if adapter.dtype not in (compute, torch.float32):
            return f"the adapter is {adapter.dtype} where the product is {compute}"
    return None


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]
