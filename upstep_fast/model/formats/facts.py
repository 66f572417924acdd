"""What makes an architecture but shows in no tensor's shape: heads, activation, registers, epsilon of the norms.

Facts are read from the configuration in a model's folder and from a built model, and compared where --arch names the
architecture: of what the folder states, nothing may be contradicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers.mlp import GluMlp, SwiGLU

_ACTIVATIONS = {
    "gelu": "GELU",
    "quick_gelu": "QuickGELU",
    "gelu_pytorch_tanh": "GELUTanh",
    "gelu_new": "GELUTanh",
    "gelu_fast": "GELUTanh",
}
_DEFAULT_ACTIVATION = {"clip": "quick_gelu", "clip_vision_model": "quick_gelu"}
_DEFAULT_ACTIVATION |= dict.fromkeys(("siglip", "siglip_vision_model"), "gelu_pytorch_tanh")
# transformers' names, ours
_NAMES = {
    "hidden_size": "width",
    "num_hidden_layers": "blocks",
    "num_attention_heads": "heads",
    "patch_size": "patch size",
    "intermediate_size": "width of the MLP",
    "num_register_tokens": "registers",
}


def of_vit(vit: Any) -> dict[str, Any]:
    """Return the facts of a built model."""
    block = vit.blocks[0]
    mlp = block.mlp
    gated = isinstance(mlp, (GluMlp, SwiGLU))
    registers = getattr(vit, "reg_token", None)
    facts = {
        "width": vit.embed_dim,
        "blocks": len(vit.blocks),
        "heads": getattr(block.attn, "num_heads", None),
        "patch size": vit.patch_embed.patch_size[0],
        "width of the MLP": mlp.fc2.in_features,
        "registers": 0 if registers is None else registers.shape[1],
        "pooling": vit.global_pool,
        "qk-norm": type(getattr(block.attn, "q_norm", None)).__name__,
        "final norm": type(vit.norm).__name__,
        "epsilon": getattr(block.norm1, "eps", None),
    }
    return facts if gated else facts | {"activation": type(mlp.act).__name__}


def of_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts in a configuration of transformers, of its vision tower if it has several."""
    kind = str(config.get("model_type"))
    config = tower(config)
    facts = {ours: config[theirs] for theirs, ours in _NAMES.items() if isinstance(config.get(theirs), int)}
    if not config.get("use_swiglu_ffn") and not config.get("use_gated_mlp"):
        activation = str(config.get("hidden_act", _DEFAULT_ACTIVATION.get(kind, "gelu")))
        facts["activation"] = _ACTIVATIONS.get(activation, activation)
    return facts


def of_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts in an open_clip_config.json."""
    model = config.get("model_cfg") or {}
    vision = model.get("vision_cfg") or {}
    if "timm_model_name" in vision:
        return {}
    names = {"width": "width", "layers": "blocks", "patch_size": "patch size"}
    facts = {ours: vision[theirs] for theirs, ours in names.items() if isinstance(vision.get(theirs), int)}
    return facts | {"activation": "QuickGELU" if model.get("quick_gelu") else "GELU"}


def contradictions(stated: Mapping[str, Any], vit: Any) -> list[str]:
    """Return in what a built model differs from stated facts, e.g. "activation is QuickGELU there, GELU in it"."""
    own = of_vit(vit)
    return [
        f"{name} is {value} there, {own[name]} in it" for name, value in stated.items() if own.get(name, value) != value
    ]


def tower(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the vision tower, which is the whole configuration unless it has several towers."""
    vision = config.get("vision_config")
    return vision if isinstance(vision, Mapping) else config
