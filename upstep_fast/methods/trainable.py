"""What of a model trains: adapters or weights, and the adapter files written from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.errors import ConfigError
from upstep_fast.model import lora, peft_format
from upstep_fast.model.lora import LoraLinear, LoraSpec


def prepare(vit: nn.Module, config: AdaptConfig) -> dict[str, LoraLinear]:
    """Put adapters on all blocks of `vit` or its last ones, or make every weight train (--tune full), in place.

    Returns the adapters by module name. Raises ConfigError for more blocks than there are.
    """
    if config.lora.tune == "full":
        vit.requires_grad_(True)
        for name in ("head", "head_dist"):  # a classifier behind the features, which learns nothing here
            getattr(vit, name, nn.Identity()).requires_grad_(False)
        return {}
    depth = len(vit.blocks)  # type: ignore[arg-type]
    if (num := config.num_adapted(depth)) > depth:
        raise ConfigError(f"lora_blocks: got {num}, but {config.model.name} has {depth} blocks")
    return lora.inject(vit, LoraSpec.from_config(config.lora), leave_out=range(depth - num))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def decays(name: str, parameter: Tensor) -> bool:
    """Return True if weight decay applies to the parameter, as in DINOv2 and MAE: to all but vectors and biases.

    The class token, the mask token and position embeddings decay: their shapes begin with ones.
    """
    return parameter.dim() >= 2 and not name.endswith("bias")


def by_decay(named: Mapping[str, nn.Parameter]) -> dict[bool, list[nn.Parameter]]:
    """Split parameters into those with weight decay (True) and those without (False)."""
    return {d: [p for name, p in named.items() if decays(name, p) == d] for d in (True, False)}


def must_receive_grad(vit: nn.Module, adapters: Mapping[str, LoraLinear]) -> dict[str, nn.Parameter]:
    """Return what must receive a gradient: each adapter's B, and all that trains besides the adapters."""
    others = {name: p for name, p in trained(vit).items() if not name.endswith(("lora_a", "lora_b"))}
    return {name: adapter.lora_b for name, adapter in adapters.items()} | others


def result_files(
    vit: nn.Module,
    adapters: Mapping[str, LoraLinear],
    base_model: str,
    names: Iterable[str],
    base_record: str | None = None,
    model_record: str | None = None,
) -> dict[str, bytes]:
    """Return the adapter folder: LoRA, the fully trained modules, and bare parameters in a file of their own.

    names: of the trained parameters, those of the adapters included. base_record, model_record: of
    `model.adapter_base`.
    """
    fully_trained = sorted(name for name in names if not name.endswith(("lora_a", "lora_b")))
    parameters = {name: vit.get_parameter(name) for name in fully_trained}
    return peft_format.adapter_files(
        adapters, base_model, fully_trained=parameters, base_record=base_record, model_record=model_record
    )
