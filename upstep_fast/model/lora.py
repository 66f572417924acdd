"""LoRA adapters on a frozen ViT (Hu et al. 2021): where they go, how they start, and merging.

    y = W x + b + s B A x          s = alpha / r, A [r, K], B [N, r], W frozen; B starts at 0, so y starts as the base's

timm keeps q, k and v in one matrix, attn.qkv [3D, D]. Separate adapters of q, k and v are `parts` of it: part p adds to
its rows only. PEFT sees one Linear, so T parts of rank r are saved as one LoRA of rank T r: the A's stacked, the B's
block-diagonal, lora_alpha T times as large, which keeps alpha / rank.

A method that also trains parameters without an adapter (ExPLoRA: blocks, norms) saves them in the same folder: those of
modules in PEFT's modules_to_save, by full names; bare parameters of the model itself (cls_token, pos_embed), for which
PEFT has no place, in a separate file.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upstep_fast.config.views import LoraConfig
from upstep_fast.errors import ConfigError

_QKV = {"q": 0, "k": 1, "v": 2}
_MODULES = {"proj": ("attn.proj",), "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)}  # by target
_GATED_FC1 = ("mlp.fc1_g", "mlp.fc1_x")  # timm's SwiGLU with separate matrices for the gate and the value


class LoraLinear(nn.Module):
    """A frozen Linear whose rows are split into `num_parts` equal parts, with one low-rank adapter per adapted part.

    lora_a: [T, r, K]; lora_b: [T, N / num_parts, r] for the T adapted parts, in fp32.
    """

    def __init__(self, base: nn.Linear, *, r: int, scale: float, parts: Sequence[int] = (0,), num_parts: int = 1):
        super().__init__()
        self.base = base
        self.r, self.scale, self.parts, self.num_parts = r, scale, tuple(parts), num_parts
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(len(parts), r, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(len(parts), base.out_features // num_parts, r, device=device))
        for a in self.lora_a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear and its adapters: x [..., K] -> [..., N]."""
        y = self.base(x)
        low = x @ self.lora_a.flatten(0, 1).T.to(x.dtype)  # [..., T r], every part in one product
        updates = {
            part: (low_part @ b.T.to(low.dtype)) * self.scale
            for part, low_part, b in zip(self.parts, low.chunk(len(self.parts), -1), self.lora_b, strict=True)
        }
        if self.num_parts == 1:
            return y + updates[0]
        zero = torch.zeros((), dtype=y.dtype, device=y.device).expand(*y.shape[:-1], y.shape[-1] // self.num_parts)
        return y + torch.cat([updates.get(p, zero) for p in range(self.num_parts)], -1)

    def as_one(self) -> tuple[Tensor, Tensor]:
        """Return the adapters as one LoRA, as PEFT has it: A [T r, K] and block-diagonal B [N, T r]."""
        rows, r = self.lora_b.shape[1:]
        b = self.lora_b.new_zeros(rows * self.num_parts, r * len(self.parts))
        for column, (part, block) in enumerate(zip(self.parts, self.lora_b, strict=True)):
            b[part * rows : (part + 1) * rows, column * r : (column + 1) * r] = block
        return self.lora_a.flatten(0, 1), b

    def delta(self) -> Tensor:
        """Return the adapter's update of the weight, [N, K] in fp32."""
        a, b = self.as_one()
        return self.scale * (b @ a)


@dataclass(frozen=True)
class LoraSpec:
    """Rank, scaling and target modules of the adapters."""

    r: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("q", "k", "v")

    @classmethod
    def from_config(cls, config: LoraConfig, *, alpha: float | None = None) -> LoraSpec:
        """Return the configured adapters; alpha: the default where the configuration has none (None: a scale of 1)."""
        default = config.r if alpha is None else alpha
        return cls(r=config.r, alpha=default if config.alpha is None else config.alpha, targets=config.targets)


def inject(vit: nn.Module, spec: LoraSpec, *, leave_out: Sequence[int] = ()) -> dict[str, LoraLinear]:
    """Put fresh adapters on the blocks of `vit`, in place. Returns them by module name ("blocks.0.attn.qkv").

    leave_out: indices of blocks without adapters. Raises ConfigError, before anything is changed, for a target that a
    block does not have.
    """
    linears = []
    for index, block in enumerate(vit.blocks):  # type: ignore[arg-type]
        if index in leave_out:
            continue
        for path, parts, num_parts in _target_modules(block, spec.targets):
            name = f"blocks.{index}.{path}"
            base = dict(block.named_modules()).get(path)
            if not isinstance(base, nn.Linear):
                kind = f"is a {type(base).__name__}, not a Linear" if base is not None else "is not in this model"
                raise ConfigError(f"lora_targets: {name} {kind}; leave it out")
            linears.append((name, base, parts, num_parts))
    adapters = {}
    for name, base, parts, num_parts in linears:
        adapters[name] = LoraLinear(base, r=spec.r, scale=spec.alpha / spec.r, parts=parts, num_parts=num_parts)
        vit.set_submodule(name, adapters[name])
    call_qkv(vit)
    return adapters


def _target_modules(block: nn.Module, targets: Sequence[str]) -> list[tuple[str, tuple[int, ...], int]]:
    """Return the Linears that get adapters: path in the block, adapted parts of the rows, and number of parts."""
    is_split = getattr(block.attn, "qkv", None) is None  # timm's EVA-02 has a matrix each for q, k and v
    parts = tuple(sorted(_QKV[t] for t in targets if t in _QKV))
    linears: list[tuple[str, tuple[int, ...], int]] = []
    if parts and is_split:
        linears += [(f"attn.{'qkv'[part]}_proj", (0,), 1) for part in parts]
    elif parts:
        linears.append(("attn.qkv", parts, 3))
    elif "qkv" in targets:
        linears.append(("attn.qkv", (0,), 1))
    modules = _MODULES | ({"fc1": _GATED_FC1} if hasattr(block.mlp, "fc1_g") else {})
    return linears + [(path, (0,), 1) for target in targets for path in modules.get(target, ())]


def call_qkv(vit: nn.Module) -> None:
    """Make timm's Eva call the qkv module, and so its adapter, where it would read qkv.weight (with q and v biases)."""
    for module in vit.modules():
        if getattr(module, "q_bias", None) is not None:
            module.qkv_bias_separate = True  # type: ignore[assignment]


def find(vit: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapters of `vit` by module name."""
    return {name: module for name, module in vit.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def merge(vit: nn.Module, *, strength: float = 1.0) -> nn.Module:
    """Add every adapter to its weight and put the plain Linear back, in place. Returns `vit`.

    strength: factor of the adapters; between 0 and 1 the result lies between the base model and the adapted one.
    """
    for name, adapter in find(vit).items():
        adapter.base.weight += (strength * adapter.delta()).to(adapter.base.weight)
        vit.set_submodule(name, adapter.base)
    return vit


@contextlib.contextmanager
def disabled(adapters: Iterable[LoraLinear]) -> Iterator[None]:
    """Disable the adapters within this context: the model is the base model."""
    scales = {adapter: adapter.scale for adapter in adapters}
    try:
        for adapter in scales:
            adapter.scale = 0.0
        yield
    finally:
        for adapter, scale in scales.items():
            adapter.scale = scale
