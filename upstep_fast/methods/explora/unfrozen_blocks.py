"""The parts of a model that ExPLoRA trains (arXiv 2406.10973), for both objectives.

trained: U blocks fully; LoRA on q and v of the others; every norm; the class token; the objective's own heads
frozen:  patch embedding and positions (unless asked for), k, the projections and MLPs of the other blocks
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from upstep_fast.config.explora import ExploraConfig
from upstep_fast.engine.block import Memory
from upstep_fast.engine.vit import warn_plain
from upstep_fast.errors import ConfigError
from upstep_fast.methods.explora.tokens import Encoder
from upstep_fast.model import lora
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.lora import LoraLinear, LoraSpec

log = logging.getLogger("upstep_fast")


def unfrozen_blocks(unfreeze: str, depth: int) -> tuple[int, ...]:
    """Return the blocks that `unfreeze` names ("last", "first,last", "0,11") in a model of `depth` blocks, sorted.

    Raises ConfigError for a block that is not there, and if no block is left for LoRA.
    """
    blocks = set()
    for part in unfreeze.split(","):
        index = {"first": 0, "last": depth - 1}.get(part.strip())
        index = int(part) if index is None else index
        if index >= depth:
            raise ConfigError(f"unfreeze: there is no block {index}; this model has blocks 0 to {depth - 1}")
        blocks.add(index)
    if len(blocks) == depth:
        raise ConfigError(f"unfreeze: {unfreeze} leaves no block for LoRA; name fewer of the {depth}")
    return tuple(sorted(blocks))


def lora_spec(config: ExploraConfig) -> LoraSpec:
    """Return the adapters that the configuration asks for: alpha 1, as in the authors' code, or the rank."""
    alpha = {"faithful": 1.0, "customary": float(config.lora.r)}[config.explora.alpha]
    return LoraSpec.from_config(config.lora, alpha=alpha)


def extend(
    vit: nn.Module,
    blocks: Sequence[int],
    spec: LoraSpec | None,
    *,
    class_token: bool = True,
    patch_embed: bool = False,
    positions: bool = False,
) -> dict[str, LoraLinear]:
    """Freeze `vit`, in place, except for what ExPLoRA trains. Returns the adapters by module name.

    blocks: fully trained. spec: the adapters on the others; None: none (the published ablation "U = [L], no LoRA").
    """
    vit.requires_grad_(False)
    adapters = {} if spec is None else lora.inject(vit, spec, leave_out=blocks)
    modules: list[Any] = [vit.blocks[index] for index in blocks]  # type: ignore[index]
    modules += [module for name, module in vit.named_modules() if "norm" in name.rpartition(".")[2]]
    if patch_embed:
        modules.append(vit.patch_embed)
    for module in modules:
        module.requires_grad_(True)
    bare = {"cls_token": class_token, "pos_embed": positions}
    for name, is_trained in bare.items():
        if is_trained and isinstance(parameter := getattr(vit, name, None), nn.Parameter):
            parameter.requires_grad_(True)
    return adapters


def prepare(backbone: Backbone, config: ExploraConfig) -> dict[str, LoraLinear]:
    """Call `extend` as the configuration asks. Raises ConfigError for a model that ExPLoRA cannot run."""
    vit: Any = backbone.vit
    if type(vit) is not VisionTransformer:  # the distilled one has a second class token
        kind = type(vit).__name__
        raise ConfigError(f"method: explora runs timm's VisionTransformer; {config.model.name} is a {kind}")
    if config.explora.objective == "mae" and vit.num_prefix_tokens == 0 and vit.attn_pool is not None:
        raise ConfigError(f"objective: mae does not train the attention pooling of {config.model.name}; take dinov2")
    return extend(
        vit,
        unfrozen_blocks(config.explora.unfreeze, len(vit.blocks)),
        lora_spec(config),
        class_token=config.explora.train_class_token,
        patch_embed=config.explora.train_patch_embed,
        positions=config.explora.train_positions,
    )


def accelerate(encoder: Encoder, dtype: torch.dtype, memory: Memory, fp8: bool) -> bool:
    """Run the encoder's frozen blocks on the engine. Returns False, and logs the reason, where the engine cannot."""
    if reason := encoder.accelerate(dtype, memory, fp8):
        warn_plain(reason)
        return False
    return True
