"""LoSA (arXiv 2402.02887): a small side network refines a frozen backbone's features, without backward through it.

b_l is the output of block l, of the L that are tapped. Our reading (the paper's equations could not be read, METHODS
section 3); a mixer is low-rank along one axis, W1 [r, n], W2 [n, r]:

    mix(x)  = W2 gelu(W1 norm(x) + c1) + c2         channel: n = D; token: n = N, shared over channels
    u_l     = b_l + a_{l-1}                         gated: s_l b_l + (1 - s_l) a_{l-1}, s_l = sigmoid(g_l)
    h       = mix_channel(u_l)
    delta_l = h + mix_token(u_l + h)                the order can be swapped
    a_l     = a_{l-1} + alpha_l delta_l             replace: b_l + alpha_l delta_l
    z       = b_L + a_L                             replace: a_L
    logits  = head(pool(norm_backbone(z)))

a_0 = 0 and W2 = c1 = c2 = 0 at the start, so z = b_L: training starts as a linear probe. norm is without scale and
shift, which W1 of the channels could take over. Clips: the token axis is two, space (the tokens of a frame) and time
(the frames at one place), mixed one after the other, and a_0 is a learned position in time [T, 1, D], 0 at the start.

Memory: one adaptor keeps u_l (2 D bytes per token in 16 bit; gated: b_l - a_{l-1} as well) and W1 norm(x), which is r
values per token for channels and r D / N for tokens; the norms and all values of width D are recomputed. Each adaptor
runs right after its block, so at most one block's activations are held besides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.engine import vit as engine
from upstep_fast.engine.block import run_block
from upstep_fast.engine.plain_block import run_plain_block
from upstep_fast.kernels import low_rank_mixer
from upstep_fast.model.backbone import Backbone

log = logging.getLogger("upstep_fast")

INIT_STD = 0.02  # of W1
Combine = Literal["sum", "replace", "gated"]
Stream = Callable[[Tensor, Callable[[int, Tensor], None]], None]


@dataclass(frozen=True)
class LosaSpec:
    """The shape of the side network."""

    rank: int = 16
    token_rank: int = 16  # 0: no mixing of tokens
    combine: Combine = "sum"
    order: Literal["channel", "token"] = "channel"  # the first mixer
    every: int = 1  # tap every k-th block, counted from the last
    learn_scale: bool = False

    def taps(self, depth: int) -> tuple[int, ...]:
        """Return the indices of the tapped blocks; the last block always is one."""
        return tuple(range(depth - 1, -1, -self.every))[::-1]

    def mixers(self, clips: bool) -> tuple[str, ...]:
        """Return the axes that an adaptor mixes, in order."""
        tokens = () if not self.token_rank else ("space", "time") if clips else ("token",)
        return ("channel", *tokens) if self.order == "channel" else (*tokens, "channel")


class Mixer(nn.Module):
    """One low-rank MLP along one axis of length n. down: [r, n]; up: [n, r]; fp32."""

    def __init__(self, rank: int, n: int):
        super().__init__()
        self.down = nn.Parameter(nn.init.trunc_normal_(torch.empty(rank, n), std=INIT_STD))
        self.down_bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(n, rank))
        self.up_bias = nn.Parameter(torch.zeros(n))


class Adaptor(nn.Module):
    """The mixers of one block, in order, with their weights."""

    def __init__(self, spec: LosaSpec, lengths: dict[str, int]):
        super().__init__()
        ranks = {axis: spec.rank if axis == "channel" else spec.token_rank for axis in lengths}
        self.mixers = nn.ModuleDict({axis: Mixer(ranks[axis], n) for axis, n in lengths.items()})
        self.combine = spec.combine
        self.gate = nn.Parameter(torch.zeros(())) if spec.combine == "gated" else None
        self.scale = nn.Parameter(torch.ones(())) if spec.learn_scale else None

    def forward(self, b: Tensor, a: Tensor, frames: int) -> Tensor:
        """Compute a_l from b_l and a_{l-1}, [B T, N, D] in the compute type."""
        mixers: Any = self.mixers.values()
        factors = [p for m in mixers for p in (m.down, m.down_bias, m.up, m.up_bias)]
        return low_rank_mixer(b, a, tuple(self.mixers), factors, self.combine, frames, self.gate, self.scale)


class SideNetwork(nn.Module):
    """All adaptors, for the tapped blocks of one backbone.

    tokens: N, of one image or frame. frames: T of a clip; 1: images.
    """

    def __init__(self, spec: LosaSpec, *, depth: int, width: int, tokens: int, frames: int = 1):
        super().__init__()
        self.spec, self.frames, self.tokens = spec, frames, tokens
        self.taps = spec.taps(depth)
        length = {"channel": width, "token": tokens, "space": tokens, "time": frames}
        lengths = {axis: length[axis] for axis in spec.mixers(clips=frames > 1)}
        self.adaptors = nn.ModuleList(Adaptor(spec, lengths) for _ in self.taps)
        self.positions = nn.Parameter(torch.zeros(frames, 1, width)) if frames > 1 else None

    def start(self, b: Tensor) -> Tensor:
        """Return a_0: 0, or the positions in time. b: [B T, N, D]."""
        if self.positions is None:
            return b.new_zeros(()).expand_as(b)
        return self.positions.to(b.dtype).repeat(len(b) // self.frames, 1, 1).expand_as(b)

    def step(self, level: int, b: Tensor, a: Tensor | None) -> Tensor:
        """Compute a_l with the adaptor of tap `level`. a: a_{l-1}; None at the first tap."""
        if b.shape[1] != self.tokens and self.spec.token_rank:
            raise ValueError(f"losa: {b.shape[1]} tokens, but tokens are mixed for {self.tokens}; see `resample`")
        return self.adaptors[level](b, self.start(b) if a is None else a, self.frames)

    def refined(self, last: Tensor, a: Tensor) -> Tensor:
        """Compute z [B T, N, D] from b_L and a_L."""
        return a if self.spec.combine == "replace" else last + a

    def forward(self, taps: Tensor) -> Tensor:
        """Compute z from stored activations of the K taps, [K, B T, N, D]."""
        a: Tensor | None = None
        for level, b in enumerate(taps):
            a = self.step(level, b, a)
        assert a is not None
        return self.refined(taps[-1], a)

    @torch.no_grad()
    def resample(self, old: tuple[int, int], new: tuple[int, int], prefix: int) -> None:
        """Fit the token mixers to another grid of patches, in place, and log it.

        Their input is the new tokens resampled to the old grid (W1 M), their output is resampled to the new one (U W2);
        M and U are antialiased bilinear interpolation. Class and register tokens are not resampled.
        """
        if old == new:
            return
        log.warning(
            "losa: the mixing of tokens was learned on %d x %d patches and is interpolated to %d x %d", *old, *new
        )
        down, up = _resampling(new, old, prefix), _resampling(old, new, prefix)  # [N_old, N_new], [N_new, N_old]
        self.tokens = prefix + new[0] * new[1]
        for adaptor in self.adaptors:
            for axis, mixer in adaptor.mixers.items():  # type: ignore[operator,union-attr]
                if axis in ("token", "space"):
                    mixer.down = nn.Parameter(mixer.down @ down)
                    mixer.up = nn.Parameter(up @ mixer.up)
                    mixer.up_bias = nn.Parameter(up @ mixer.up_bias)


def _resampling(source: tuple[int, int], target: tuple[int, int], prefix: int) -> Tensor:
    """Return the matrix [prefix + target, prefix + source] that resamples a grid of values and keeps the prefix."""
    count = source[0] * source[1]
    grids = torch.eye(count).view(count, 1, *source)
    resized = F.interpolate(grids, size=target, mode="bilinear", antialias=True, align_corners=False)
    return torch.block_diag(torch.eye(prefix), resized.flatten(1).T)


class Losa(nn.Module):
    """The frozen backbone, its side network and a linear head: images to logits."""

    def __init__(self, backbone: Backbone, spec: LosaSpec, classes: int, frames: int = 1):
        super().__init__()
        vit: Any = backbone.vit.requires_grad_(False)
        self.vit, self.frames = vit, frames
        tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
        self.side = SideNetwork(spec, depth=len(vit.blocks), width=vit.embed_dim, tokens=tokens, frames=frames)
        self.head = nn.Linear(backbone.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)
        self.stream: Stream = partial(stream_plain, vit, None)

    def accelerate(self, dtype: torch.dtype, fp8: bool = False) -> None:
        """Run the frozen blocks on the engine in `dtype`; to be called on the final device."""
        self.stream = make_stream(self.vit, dtype, fp8)

    def train(self, mode: bool = True) -> Losa:
        """Set the mode of the side network and the head; the backbone stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of normalized images [B, C, H, W] or clips [B, T, C, H, W]."""
        a: Tensor | None = None
        last: Tensor | None = None

        def tap(index: int, b: Tensor) -> None:
            nonlocal a, last
            if index in self.side.taps:
                a, last = self.side.step(self.side.taps.index(index), b, a), b

        self.stream(images.flatten(0, 1) if self.frames > 1 else images, tap)
        assert a is not None and last is not None
        return self._classify(self.side.refined(last, a))

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """Return the frozen part of `forward`: the tapped activations, [B, T, K, N, D] in the compute type."""
        taps: list[Tensor] = []
        self.stream(
            images.flatten(0, 1) if self.frames > 1 else images,
            lambda index, b: taps.append(b) if index in self.side.taps else None,
        )
        return torch.stack(taps, 1).unflatten(0, (-1, self.frames))

    def logits_of(self, frozen: Tensor) -> Tensor:
        """Return `forward` of images from their `frozen` part."""
        return self._classify(self.side(frozen.flatten(0, 1).transpose(0, 1)))

    def _classify(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            if self.vit.global_pool == "token":  # the norm acts on each token alone: spare the others
                z = z[:, :1]
            pooled = self.vit.forward_head(self.vit.norm(z.float()), pre_logits=True)
            return self.head(pooled.unflatten(0, (-1, self.frames)).mean(1))


def make_stream(vit: nn.Module, dtype: torch.dtype, fp8: bool = False) -> Stream:
    """Return a function that runs a frozen ViT and passes each block's output, [B, N, D] in `dtype`, to a callback."""
    built = engine.try_build(vit, dtype, fp8=fp8)
    if isinstance(built, engine.EngineViT):
        return partial(_stream_engine, built)
    engine.warn_plain(built)
    return partial(stream_plain, vit, dtype)


def _stream_engine(built: engine.EngineViT, images: Tensor, tap: Callable[[int, Tensor], None]) -> None:
    kind, dtype = images.device.type, built.dtype
    built.check_unchanged()
    merged = built.merge_adapters()
    block: Any
    delta: Tensor | None = None
    with torch.no_grad():
        x, ropes = built.embed(images), built.ropes(images)
    for index, block in enumerate(built.blocks):
        with torch.no_grad():
            if index in merged:
                with torch.autocast(kind, enabled=False):  # the engine selects its dtypes
                    x, delta = run_block(x, delta, merged[index], ropes=ropes)
                    b = x + delta
            else:
                with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
                    b, delta = (
                        run_plain_block(block, x if delta is None else x + delta, None, None, ropes).to(dtype),
                        None,
                    )
                x = b
        tap(index, b)


def stream_plain(vit: Any, dtype: torch.dtype | None, images: Tensor, tap: Callable[[int, Tensor], None]) -> None:
    """Run the plain model and pass each block's output to `tap`. dtype None: that of an outer autocast, or fp32."""
    kind = images.device.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32

    def hook(index: int, module: nn.Module, args: Any, output: Tensor) -> None:
        with torch.set_grad_enabled(with_grad):
            tap(index, output.to(dtype))

    with_grad = torch.is_grad_enabled()
    hooks = [block.register_forward_hook(partial(hook, index)) for index, block in enumerate(vit.blocks)]
    try:
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            vit.forward_features(images)
    finally:
        for handle in hooks:
            handle.remove()
