"""Arguments of `low_rank_mixer`: what all forms take beside the tensors [P, N, D], and the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6  # of the bare norms, as timm's ViTs have it
AXES = ("channel", "token", "space", "time")
COMBINE = ("sum", "replace", "gated")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class MixerArgs:
    """One adaptor, as the forms take it."""

    axes: Sequence[str]  # of AXES, in the order in which they are mixed
    combine: str  # one of COMBINE
    frames: int
    gate: Tensor | None  # scalar, for combine "gated"
    scale: Tensor | None  # scalar; None: 1
    factors: Sequence[Tensor]  # W1 [r, n], c1 [r], W2 [n, r], c2 [n] of each axis in turn
    eps: float = EPS

    @property
    def fours(self) -> list[Sequence[Tensor]]:
        """Factors by axis: (W1, c1, W2, c2)."""
        return fours(self.factors)


def fours(factors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return the factors by axis, (W1, c1, W2, c2) each."""
    return [factors[i : i + 4] for i in range(0, len(factors), 4)]


def validate(b: Tensor, a: Tensor, args: MixerArgs) -> None:
    """Raise ValueError for arguments of `low_rank_mixer` that do not fit."""
    if reason := _unsupported_options(b, args) or _unsupported_tensors(b, a, args):
        raise ValueError(f"low_rank_mixer: {reason}")


def _unsupported_options(b: Tensor, args: MixerArgs) -> str | None:
    axes, combine, frames, gate = args.axes, args.combine, args.frames, args.gate
    if b.dim() != 3 or b.dtype not in _DTYPES:
        return f"b must be [P, N, D] in fp16, bf16, fp32 or fp64, got {list(b.shape)} in {b.dtype}"
    if b.requires_grad:
        return "b must need no gradient (it is a frozen block's output), got one that does: detach it"
    if not axes or not set(axes) <= set(AXES):
        return f"axes must be one or more of {', '.join(AXES)}, got {', '.join(map(repr, axes)) or 'none'}"
    if combine not in COMBINE:
        return f"combine must be one of {', '.join(COMBINE)}, got {combine!r}"
    if (combine == "gated") != (gate is not None):
        got = "no gate" if gate is None else "a gate"
        return f"gate must be given for combine 'gated' and for no other, got {got} for {combine!r}"
    if frames < 1 or b.shape[0] % frames:
        return f"frames must divide the {b.shape[0]} of b's first dimension, got {frames}"
    if len(args.factors) != 4 * len(axes):
        return f"factors must be 4 for each of {len(axes)} axes, got {len(args.factors)}"
    return None


def _unsupported_tensors(b: Tensor, a: Tensor, args: MixerArgs) -> str | None:
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("a", a, tuple(b.shape)), ("gate", args.gate, ()), ("scale", args.scale, ())
    ]  # fmt: skip
    lengths = {"channel": b.shape[2], "time": args.frames}
    for axis, four in zip(args.axes, args.fours, strict=True):
        n, r = lengths.get(axis, b.shape[1]), four[0].shape[0] if four[0].dim() else 1
        shapes = (("W1", (r, n)), ("c1", (r,)), ("W2", (n, r)), ("c2", (n,)))
        expected += [(f"{name} of {axis}", t, shape) for t, (name, shape) in zip(four, shapes, strict=True)]
    for name, t, shape in expected:
        dtypes = (b.dtype,) if name == "a" else (b.dtype, torch.float32)
        if t is not None and (t.shape != shape or t.dtype not in dtypes or t.device != b.device):
            want = f"{list(shape)} in {' or '.join(map(str, dict.fromkeys(dtypes)))} on {b.device}"
            return f"{name} must be {want} to fit b, got {list(t.shape)} in {t.dtype} on {t.device}"
    return None
