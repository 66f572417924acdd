"""Which parameters train, which must receive a gradient, and the adapter files written from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from upstep_fast.model import peft_format
from upstep_fast.model.lora import LoraLinear


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices alone, as DINOv2 and MAE have it."""
    return parameter.dim() >= 2 and not name.endswith(("bias", "cls_token", "pos_embed", "mask_token"))


def must_receive_grad(vit: nn.Module, adapters: dict[str, LoraLinear]) -> dict[str, nn.Parameter]:
    """What must receive a gradient: each adapter's B, and all that trains beside the adapters."""
    others = {name: p for name, p in trained(vit).items() if not name.endswith(("lora_a", "lora_b"))}
    return {name: adapter.lora_b for name, adapter in adapters.items()} | others


def result_files(
    vit: nn.Module, adapters: Mapping[str, LoraLinear], base_model: str, names: Iterable[str]
) -> dict[str, bytes]:
    """The adapter folder: LoRA, the modules that were trained whole, and bare parameters in a file of their own.

    names: of the trained parameters, those of the adapters too.
    """
    fully_trained = sorted(name for name in names if not name.endswith(("lora_a", "lora_b")))
    parameters = {name: vit.get_parameter(name) for name in fully_trained}
    return peft_format.adapter_files(adapters, base_model, fully_trained=parameters)
