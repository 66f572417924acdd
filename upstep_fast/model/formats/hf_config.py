"""Translates config.json of transformers (ViT, Dinov2, DINOv3) to timm's arguments and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import timm
from timm.layers.mlp import GluMlp, SwiGLU
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from upstep_fast.errors import ConfigError
from upstep_fast.model.formats import facts

if TYPE_CHECKING:
    from upstep_fast.model.backbone import Backbone

# transformers' names of activations, timm's names and classes
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_CLASSES = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


def timm_args(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Return timm's architecture and model_args for a transformers configuration.

    where: the model's name, for errors. Raises ConfigError if timm has no such model.
    """
    kind = config.get("model_type")
    if kind not in KINDS and isinstance(config.get("vision_config"), Mapping):
        raise ConfigError(
            f"model: {where} is a {kind} of transformers, with several towers; name timm's architecture of the vision "
            f"tower with {_arch_flag(config)}"
        )
    try:
        args = {
            "img_size": config["image_size"],
            "patch_size": config["patch_size"],
            "in_chans": config.get("num_channels", 3),
            "embed_dim": config["hidden_size"],
            "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "num_classes": 0,
        }
        family = _FAMILIES.get(str(kind))
        specific = family(config) if family else None
        if specific is not None:
            return specific[0], args | specific[1]
    except KeyError as error:
        raise ConfigError(f"model: {where}/config.json lacks or has an unknown {error}; use --arch NAME") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"model: {where}/config.json has an impossible value: {error}; save it again") from error
    if kind in KINDS:
        raise ConfigError(
            f"model: {where}/config.json is a {kind} with biases or an activation that timm does not have; "
            "name timm's nearest architecture with --arch NAME"
        )
    raise ConfigError(
        f"model: {where} is a {kind} of transformers, not one of {', '.join(KINDS)}; for another plain Vision "
        f"Transformer (CLIP's, SigLIP's) name timm's architecture with {_arch_flag(config)}"
    )


def _arch_flag(config: Mapping[str, Any]) -> str:
    """Return "--arch" with timm's name of a CLIP or SigLIP tower, if it has one of the usual widths."""
    kind, tower = str(config.get("model_type")), facts.tower(config)
    size = {768: "base", 1024: "large", 1280: "huge", 1152: "so400m"}.get(tower.get("hidden_size", 0))
    is_quick = facts.of_transformers(config).get("activation") == "QuickGELU"
    family = "siglip" if "siglip" in kind else "clip_quickgelu" if is_quick else "clip"
    name = f"vit_{size}_patch{tower.get('patch_size')}_{family}_{tower.get('image_size')}"
    return f"--arch {name}" if timm.is_model(name) else "--arch NAME"


def _from_vit(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return "vit_base_patch16_224", {
        "mlp_ratio": _ratio(config["intermediate_size"], config["hidden_size"]),
        "qkv_bias": config.get("qkv_bias", True),
        "act_layer": _ACTIVATIONS[config.get("hidden_act", "gelu")],
    }


def _from_dinov2(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    width = config["hidden_size"]
    registers = config.get("num_register_tokens", 4) if config["model_type"] == "dinov2_with_registers" else 0
    args: dict[str, Any] = {
        "init_values": config.get("layerscale_value", 1.0),
        "qkv_bias": config.get("qkv_bias", True),
        "reg_tokens": registers,
        "no_embed_class": bool(registers),
    }
    hidden = int(width * config.get("mlp_ratio", 4))
    if config.get("use_swiglu_ffn"):
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        return "vit_giant_patch14_dinov2", args | {"mlp_ratio": _ratio(2 * hidden, width)}
    args["act_layer"] = _ACTIVATIONS[config.get("hidden_act", "gelu")]
    return "vit_base_patch14_dinov2", args | {"mlp_ratio": _ratio(hidden, width)}


def _from_dinov3(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    gated = config.get("use_gated_mlp", False)
    if config.get("key_bias") or config.get("hidden_act", "gelu") != ("silu" if gated else "gelu"):
        return None
    args = {
        "mlp_ratio": _ratio(config["intermediate_size"], config["hidden_size"]),
        "num_reg_tokens": config.get("num_register_tokens", 0),
        "init_values": config.get("layerscale_value", 1.0),
        "rope_temperature": config.get("rope_theta", 100.0),
        "qkv_bias": config.get("query_bias", True),
    }
    return "vit_base_patch16_dinov3", args | ({"swiglu_mlp": True, "swiglu_align_to": 1} if gated else {})


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]] | None]] = {
    "vit": _from_vit,
    "vit_mae": _from_vit,
    "dinov2": _from_dinov2,
    "dinov2_with_registers": _from_dinov2,
    "dinov3_vit": _from_dinov3,
}
KINDS = tuple(_FAMILIES)  # model types that can be read


def describe(vit: Any) -> dict[str, Any]:
    """Return the transformers configuration of a timm ViT.

    Raises ConfigError that names what transformers cannot express.
    """
    reason = _unsupported_reason(vit)
    if reason:
        raise ConfigError(f"format: hf cannot express this model: {reason}; use --format timm or onnx")
    if isinstance(vit, Eva):
        return _dinov3(vit)
    assert isinstance(vit, VisionTransformer)
    block: Any = vit.blocks[0]
    registers, scaled = vit.num_reg_tokens, isinstance(block.ls1, nn.Module) and hasattr(block.ls1, "gamma")
    common = _common(vit) | {"qkv_bias": block.attn.qkv.bias is not None, "layer_norm_eps": block.norm1.eps}
    if not scaled:
        return common | {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "intermediate_size": block.mlp.fc1.out_features,
            "hidden_act": _CLASSES[type(block.mlp.act).__name__],
        }
    packed = isinstance(block.mlp, GluMlp)
    common |= {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_act": "gelu" if packed else _CLASSES[type(block.mlp.act).__name__],
        "use_swiglu_ffn": packed,
        # of a SwiGLU transformers takes two thirds of the ratio, rounded up to a multiple of 8
        "mlp_ratio": _integral(1.5 * block.mlp.fc2.in_features / vit.embed_dim)
        if packed
        else _integral(block.mlp.fc1.out_features / vit.embed_dim),
        "layerscale_value": 1.0,
    }
    return common | ({"num_register_tokens": registers} if registers else {})


def preprocessor(base: Backbone) -> dict[str, Any] | None:
    """Return the preprocessor_config.json of transformers that prepares images as timm's evaluation transform does.

    None for an input that is not square and keeps the images' proportions, which transformers cannot express.
    """
    height, width = base.img_size
    outer = [math.floor(side / base.crop_pct) for side in base.img_size]
    if base.crop_mode == "center" and height != width:
        return None
    size = {"height": outer[0], "width": outer[1]} if base.crop_mode == "squash" else {"shortest_edge": outer[0]}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(base.mean) == 3,
        "do_resize": True,
        "size": size,
        "resample": {"nearest": 0, "lanczos": 1, "bilinear": 2}.get(base.interpolation, 3),  # as pillow counts
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(base.mean),
        "image_std": list(base.std),
    }


def _dinov3(vit: Eva) -> dict[str, Any]:
    block: Any = vit.blocks[0]
    gated = isinstance(block.mlp, SwiGLU)
    bias = block.attn.q_bias is not None
    return _common(vit) | {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "intermediate_size": block.mlp.fc2.in_features,
        "hidden_act": "silu" if gated else _CLASSES[type(block.mlp.act).__name__],
        "layer_norm_eps": block.norm1.eps,
        "num_register_tokens": 0 if vit.reg_token is None else vit.reg_token.shape[1],
        "use_gated_mlp": gated,
        "query_bias": bias,
        "key_bias": False,
        "value_bias": bias,
        "proj_bias": True,
        "mlp_bias": True,
        "layerscale_value": 1.0,
        "rope_theta": float(vit.rope.temperature),  # type: ignore[arg-type]
    }


def _common(vit: Any) -> dict[str, Any]:
    height, width = vit.patch_embed.img_size
    patch = vit.patch_embed.patch_size
    return {
        "image_size": height if height == width else [height, width],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": vit.patch_embed.proj.in_channels,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.blocks[0].attn.num_heads,
        "dtype": "float32",
    }


def _unsupported_reason(vit: Any) -> str | None:
    block: Any = vit.blocks[0]
    if not isinstance(vit, Eva):
        scaled = hasattr(getattr(block, "ls1", None), "gamma")
        if not scaled and (vit.num_reg_tokens or isinstance(block.mlp, GluMlp)):
            return "it has registers or SwiGLU without LayerScale"
        if isinstance(block.mlp, GluMlp) and block.mlp.fc2.in_features % 8:  # type: ignore[operator]
            return "the width of its SwiGLU is not a multiple of 8"
        return _plain_unsupported_reason(vit, tuple(_CLASSES))
    if type(vit.rope).__name__ != "RotaryEmbeddingDinoV3":
        return "of rotary models transformers has DINOv3 only"
    if vit.pos_embed is not None or block.attn.qkv is None or block.gamma_1 is None or vit.cls_token is None:
        return "it differs from DINOv3 in its positions, qkv, LayerScale or class token"
    if not isinstance(block.mlp, SwiGLU) and type(block.mlp.act).__name__ not in _CLASSES:
        return f"its activation is {type(block.mlp.act).__name__}"
    return _pooled_unsupported_reason(vit)


def dinov2_unsupported_reason(vit: Any) -> str | None:
    """Return why Meta's DINOv2 code cannot express this model, as the rest of a sentence; None if it can."""
    return "it has rotary positions" if isinstance(vit, Eva) else _plain_unsupported_reason(vit, ("GELU",))


def _plain_unsupported_reason(vit: Any, activations: tuple[str, ...]) -> str | None:
    block: Any = vit.blocks[0]
    if not vit.has_class_token or vit.pos_embed is None or hasattr(vit, "dist_token"):
        return "it has no class token, no position embeddings or a token for distillation"
    if bool(vit.num_reg_tokens) != bool(vit.no_embed_class):
        return "its class token has a position with registers, or none without them"
    norms = (block.attn.q_norm, block.attn.norm, block.mlp.norm, vit.norm_pre)
    if type(block).__name__ != "Block" or not all(isinstance(norm, nn.Identity) for norm in norms):
        return "it has norms other than those before attention, before the MLP and at the end"
    act = type(block.mlp.act).__name__
    if act not in activations and not isinstance(block.mlp, GluMlp):
        return f"its activation is {act}"
    if isinstance(block.mlp, SwiGLU):
        return "its SwiGLU is not packed"
    return _pooled_unsupported_reason(vit)


def _pooled_unsupported_reason(vit: Any) -> str | None:
    if vit.global_pool not in ("token", "avg") or not isinstance(vit.fc_norm, nn.Identity):
        return f"its pooling, {vit.global_pool}, has its own layer"
    return None


def _ratio(hidden: int, width: int) -> float:
    # timm takes int(width * ratio), which must not fall below `hidden` by rounding
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _integral(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
