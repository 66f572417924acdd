"""Checks that an adapter's tensors are those that its configuration and the model call for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from upstep_fast.errors import ConfigError, printable
from upstep_fast.model.peft_config import AdapterConfig
from upstep_fast.model.peft_tensors import AdapterTensors

HEADS = ("head", "head_dist")  # classifiers behind the features, of which an adapter need not say anything
LARGEST_UPDATE = 1e6  # times the norm of the weight; trained adapters stay below 1


def check(vit: nn.Module, config: AdapterConfig, tensors: AdapterTensors, folder: Path) -> None:
    """Raise ConfigError with the first five modules, shapes and ranks that do not fit, or layers without tensors."""
    if not tensors.pairs and not tensors.of_modules:
        raise ConfigError(f"adapter: {folder} holds no LoRA matrices")
    mismatches = list(_mismatches(vit, config, tensors))
    if mismatches:
        more = f" and {len(mismatches) - 5} more" if len(mismatches) > 5 else ""
        base = printable(str(config.base_model), 200)
        raise ConfigError(
            f"adapter: {folder} (made for {base}) does not fit this model: {'; '.join(mismatches[:5])}{more}"
        )


def _mismatches(vit: nn.Module, config: AdapterConfig, tensors: AdapterTensors) -> Iterator[str]:
    modules = dict(vit.named_modules())
    for name, pair in sorted(tensors.pairs.items()):
        yield from _pair_mismatches(modules.get(name), name, pair, config, tensors.written[name])
    for name, module in modules.items():
        is_linear = isinstance(module, nn.Linear) and name not in HEADS
        if is_linear and name not in tensors.pairs and config.is_target(name):
            yield f"tensors of {name} are missing, which target_modules names"
    parameters = dict(vit.named_parameters())
    for name in parameters:
        is_whole = config.is_saved(name) and name.rpartition(".")[0] not in (*HEADS, *tensors.pairs)
        if is_whole and name not in tensors.of_modules:
            yield f"{name} is missing, which modules_to_save names"
    yield from _parameter_mismatches(parameters, tensors.of_modules | tensors.bare)
    for name in tensors.of_modules:
        if name.rpartition(".")[0] in tensors.pairs:
            yield f"{name} is there as a whole and as LoRA"


def _pair_mismatches(
    module: nn.Module | None, name: str, pair: tuple[Tensor, Tensor], config: AdapterConfig, written: str
) -> Iterator[str]:
    short = printable(name, 120)
    if module is None:
        yield f"{short} is not in the model"
    elif not isinstance(module, nn.Linear):
        yield f"{short} is a {type(module).__name__}, of which adapters are not read; merge it with PEFT"
    elif not config.is_target(written):
        yield f"{short} has tensors, but target_modules does not name it"
    else:
        rank = config.rank(written)
        expected = ((rank, module.in_features), (module.out_features, rank))
        for label, tensor, shape in zip(("lora_A", "lora_B"), pair, expected, strict=True):
            if tuple(tensor.shape) != shape:
                yield f"{short}.{label} is {list(tensor.shape)}, the model wants {list(shape)}"


def _parameter_mismatches(expected: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Iterator[str]:
    for name, value in sorted(parameters.items()):
        short = printable(name, 120)
        if name not in expected:
            yield f"{short} is not in the model"
        elif expected[name].shape != value.shape:
            yield f"{short} is {list(value.shape)}, the model wants {list(expected[name].shape)}"
        elif value.norm() > LARGEST_UPDATE * max(float(expected[name].norm()), 1.0):
            yield f"{short} has a norm of {value.norm():.1e}, that of the model {expected[name].norm():.1e}"


def check_update(weight: Tensor, a: Tensor, b: Tensor, scale: float, where: str) -> None:
    """Raise ConfigError if |s B A| is far above |W|, in Frobenius norms: no trained adapter is, and features overflow.

    |B A|^2 = sum (B' B) * (A A'), in float64. weight: [N, K]; a: [r, K]; b: [N, r].
    """
    a, b = a.double(), b.double()
    norm = abs(scale) * ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()
    limit = LARGEST_UPDATE * weight.double().norm().clamp_min(1)
    if not torch.isfinite(norm) or norm > limit:
        raise ConfigError(
            f"adapter: {where}: the update has a norm of {float(norm):.1e} (lora_alpha / rank {scale:.1e}), that of "
            f"the weight is {float(weight.norm()):.1e}; train or save it again"
        )
