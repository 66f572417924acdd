"""Tensor names of a ViT in other tools, translated exactly to timm's names and back.

A format is a table of prefixes, (theirs, timm's), with N for a block's number. Three matrices that timm keeps as one
are concatenated along the rows, and split on the way back, so both directions are exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """Tensor names of one family of checkpoints."""

    name: str
    mark: str  # name of a tensor that only checkpoints of this format have
    pairs: tuple[tuple[str, str], ...] = ()  # prefixes: theirs, timm's
    qkv: tuple[str, ...] = ()  # theirs for q, k and v, which timm stacks in `fused`
    fused: str = "blocks.N.attn.qkv."

    def to_timm(self, theirs: Mapping[str, Tensor]) -> State:
        """Rename to timm's names and concatenate q, k, v; tensors that are in no pair keep their name."""
        ours: State = {}
        parts: dict[str, dict[int, Tensor]] = {}
        for key, value in theirs.items():
            part = next((j for j, prefix in enumerate(self.qkv) if _match(prefix, key)), None)
            if part is None:
                ours[_renamed(key, self.pairs)] = value
            else:
                parts.setdefault(_renamed(key, ((self.qkv[part], self.fused),)), {})[part] = value
        for name, qkv in parts.items():
            if set(qkv) == {0, 1, 2}:  # else the fused matrix is missing, which `fill` reports
                ours[name] = torch.cat([qkv[0], qkv[1], qkv[2]])
        return ours

    def from_timm(self, ours: Mapping[str, Tensor]) -> State:
        """Rename from timm's names and split q, k, v: the exact inverse of `to_timm`."""
        back = tuple((b, a) for a, b in self.pairs)
        theirs: State = {}
        for key, value in ours.items():
            if self.qkv and _match(self.fused, key):
                for prefix, rows in zip(self.qkv, value.chunk(3), strict=True):
                    theirs[_renamed(key, ((self.fused, prefix),))] = rows.contiguous()
            else:
                theirs[_renamed(key, back)] = value
        return theirs


def _match(prefix: str, key: str) -> re.Match[str] | None:
    return re.match(re.escape(prefix).replace("N", r"(\d+)"), key)


def _renamed(key: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if match := _match(old, key):
            return (new.replace("N", match[1]) if "N" in old else new) + key[match.end() :]
    return key


_HF_STEM = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
)
_HF_QKV = (
    "encoder.layer.N.attention.attention.query.",
    "encoder.layer.N.attention.attention.key.",
    "encoder.layer.N.attention.attention.value.",
)

HF_VIT = Format(  # ViTModel and ViTMAEModel of transformers
    "Hugging Face ViT",
    "encoder.layer.0.layernorm_before.weight",
    (
        *_HF_STEM,
        ("encoder.layer.N.attention.output.dense.", "blocks.N.attn.proj."),
        ("encoder.layer.N.layernorm_before.", "blocks.N.norm1."),
        ("encoder.layer.N.layernorm_after.", "blocks.N.norm2."),
        ("encoder.layer.N.intermediate.dense.", "blocks.N.mlp.fc1."),
        ("encoder.layer.N.output.dense.", "blocks.N.mlp.fc2."),
    ),
    _HF_QKV,
)

HF_DINOV2 = Format(  # Dinov2Model and Dinov2WithRegistersModel
    "Hugging Face Dinov2",
    "encoder.layer.0.layer_scale1.lambda1",
    (
        *_HF_STEM,
        ("encoder.layer.N.attention.output.dense.", "blocks.N.attn.proj."),
        ("encoder.layer.N.norm1.", "blocks.N.norm1."),
        ("encoder.layer.N.norm2.", "blocks.N.norm2."),
        ("encoder.layer.N.layer_scale1.lambda1", "blocks.N.ls1.gamma"),
        ("encoder.layer.N.layer_scale2.lambda1", "blocks.N.ls2.gamma"),
        ("encoder.layer.N.mlp.weights_in.", "blocks.N.mlp.w12."),
        ("encoder.layer.N.mlp.weights_out.", "blocks.N.mlp.w3."),
        ("encoder.layer.N.mlp.", "blocks.N.mlp."),
    ),
    _HF_QKV,
)

# transformers 5 saves with save_pretrained under the names above; in its state_dict() they are these
HF5_VIT = Format(
    "Hugging Face ViT, names of transformers 5",
    "layers.0.layernorm_before.weight",
    (
        *_HF_STEM,
        ("layers.N.attention.o_proj.", "blocks.N.attn.proj."),
        ("layers.N.layernorm_before.", "blocks.N.norm1."),
        ("layers.N.layernorm_after.", "blocks.N.norm2."),
        ("layers.N.mlp.", "blocks.N.mlp."),
    ),
    ("layers.N.attention.q_proj.", "layers.N.attention.k_proj.", "layers.N.attention.v_proj."),
)
HF5_DINOV2 = Format(
    "Hugging Face Dinov2, names of transformers 5",
    "encoder.layer.0.attention.q_proj.weight",
    (("encoder.layer.N.attention.o_proj.", "blocks.N.attn.proj."), *HF_DINOV2.pairs),
    (
        "encoder.layer.N.attention.q_proj.",
        "encoder.layer.N.attention.k_proj.",
        "encoder.layer.N.attention.v_proj.",
    ),
)

_HF_DINOV3_PAIRS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "reg_token"),
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("layer.N.attention.q_proj.bias", "blocks.N.attn.q_bias"),
    ("layer.N.attention.v_proj.bias", "blocks.N.attn.v_bias"),
    ("layer.N.attention.o_proj.", "blocks.N.attn.proj."),
    ("layer.N.layer_scale1.lambda1", "blocks.N.gamma_1"),
    ("layer.N.layer_scale2.lambda1", "blocks.N.gamma_2"),
    ("layer.N.mlp.down_proj.", "blocks.N.mlp.fc2."),
    ("layer.N.norm1.", "blocks.N.norm1."),
    ("layer.N.norm2.", "blocks.N.norm2."),
)
_HF_DINOV3_QKV = (
    "layer.N.attention.q_proj.weight",
    "layer.N.attention.k_proj.weight",
    "layer.N.attention.v_proj.weight",
)
HF_DINOV3 = Format(  # DINOv3ViTModel; timm's Eva keeps the biases of q and v apart and has none for k
    "Hugging Face DINOv3",
    "layer.0.attention.q_proj.weight",
    (*_HF_DINOV3_PAIRS, ("layer.N.mlp.up_proj.", "blocks.N.mlp.fc1.")),
    _HF_DINOV3_QKV,
    "blocks.N.attn.qkv.weight",
)
HF_DINOV3_GATED = Format(  # DINOv3ViTModel with SwiGLU
    "Hugging Face DINOv3",
    "layer.0.mlp.gate_proj.weight",
    (
        *_HF_DINOV3_PAIRS,
        ("layer.N.mlp.gate_proj.", "blocks.N.mlp.fc1_g."),
        ("layer.N.mlp.up_proj.", "blocks.N.mlp.fc1_x."),
    ),
    _HF_DINOV3_QKV,
    "blocks.N.attn.qkv.weight",
)

HF_CLIP = Format(  # CLIPVisionModel and SiglipVisionModel
    "Hugging Face CLIP or SigLIP",
    "embeddings.patch_embedding.weight",
    (
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding.weight", "pos_embed"),
        ("embeddings.patch_embedding.", "patch_embed.proj."),
        ("pre_layrnorm.", "norm_pre."),
        ("post_layernorm.", "norm."),
        ("encoder.layers.N.layer_norm1.", "blocks.N.norm1."),
        ("encoder.layers.N.layer_norm2.", "blocks.N.norm2."),
        ("encoder.layers.N.self_attn.out_proj.", "blocks.N.attn.proj."),
        ("encoder.layers.N.mlp.", "blocks.N.mlp."),
        ("head.probe", "attn_pool.latent"),
        ("head.attention.in_proj_", "attn_pool.qkv."),
        ("head.attention.out_proj.", "attn_pool.proj."),
        ("head.layernorm.", "attn_pool.norm."),
        ("head.mlp.", "attn_pool.mlp."),
    ),
    (
        "encoder.layers.N.self_attn.q_proj.",
        "encoder.layers.N.self_attn.k_proj.",
        "encoder.layers.N.self_attn.v_proj.",
    ),
)

OPENCLIP = Format("OpenAI CLIP or OpenCLIP", "class_embedding")  # timm's own filter renames these

DINOV3 = Format(  # Meta's names
    "DINOv3",
    "storage_tokens",
    (
        ("storage_tokens", "reg_token"),
        ("blocks.N.ls1.gamma", "blocks.N.gamma_1"),
        ("blocks.N.ls2.gamma", "blocks.N.gamma_2"),
        ("blocks.N.mlp.w1.", "blocks.N.mlp.fc1_g."),
        ("blocks.N.mlp.w2.", "blocks.N.mlp.fc1_x."),
        ("blocks.N.mlp.w3.", "blocks.N.mlp.fc2."),
    ),
)

DINOV2 = Format("DINOv2 or MAE", "mask_token")  # timm's own filter converts these; `dinov2_names` is the way back

TIMM = Format("timm or DINO", "patch_embed.proj.weight")

FORMATS = (HF_VIT, HF5_VIT, HF5_DINOV2, HF_DINOV2, HF_DINOV3_GATED, HF_DINOV3, HF_CLIP, OPENCLIP, DINOV3, DINOV2, TIMM)


def detect(state: Mapping[str, Tensor]) -> tuple[Format, str] | None:
    """Return the format of a checkpoint and the prefix of its backbone ("teacher.backbone.", "vit.", ...).

    Of several prefixes the teacher's comes before the student's, then the shortest. None: no known format.
    """
    for style in FORMATS:
        prefixes = [
            key.removesuffix(style.mark) for key in state if key == style.mark or key.endswith("." + style.mark)
        ]
        if prefixes:
            return style, min(prefixes, key=lambda p: ("decoder" in p, "teacher" not in p, "student" in p, len(p), p))
    return None


def dinov2_names(ours: Mapping[str, Tensor], *, packed: bool) -> State:
    """Return a timm state dict under Meta's names, which timm's `_convert_dinov2` reads back bit for bit.

    packed: the MLP is a packed SwiGLU, whose matrices Meta calls w12 and w3. With registers timm has added the class
    token's position to the token and gives it none; here it gets a position of zeros.
    """
    pairs = (("blocks.N.mlp.fc1.", "blocks.N.mlp.w12."), ("blocks.N.mlp.fc2.", "blocks.N.mlp.w3.")) if packed else ()
    theirs = {_renamed(key, pairs): value for key, value in ours.items()}
    theirs["mask_token"] = torch.zeros_like(ours["cls_token"])[0]
    if "reg_token" in theirs:
        theirs["register_tokens"] = theirs.pop("reg_token")
        theirs["pos_embed"] = torch.cat([torch.zeros_like(ours["cls_token"]), theirs["pos_embed"]], 1)
    return theirs
