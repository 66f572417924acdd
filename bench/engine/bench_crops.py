"""Crops of two sizes through the blocks of a ViT: separate passes against ways of packing them into one.

    python bench/engine/bench_crops.py [--json FILE]

separate: one pass a size. tokens: norms, projections and MLP on all tokens at once, attention size by size; this is
what the engine does (upstep_fast/engine/packing.py), --implementation reference does the first.
rows: local crops side by side in rows as long as a global one, block-diagonal mask. padded: local crops padded to
a global one's length, keys masked. nested: torch's jagged tensors. Forward and backward; processor time, since that
is what a shared machine leaves steady; variants alternate. A variant whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPES = {
    "tiny, 64 px, patch 8": dict(width=192, depth=3, heads=3, whole=65, local=17, batch=16, num_local=8),
    "ViT-S, 224 px, patch 14": dict(width=384, depth=2, heads=6, whole=257, local=50, batch=4, num_local=8),
}
Variant = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def separate(vit: nn.Module, whole: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """One pass a size."""
    return vit.blocks(whole), vit.blocks(local)


def block(block: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a timm block on tokens [..., D] with `attend` in place of its attention."""
    x = x + block.ls1(block.attn.proj(attend(block.attn.qkv(block.norm1(x)))))
    return x + block.ls2(block.mlp(block.norm2(x)))


def attention(qkv: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """[B, N, 3 D] -> [B, N, D]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def tokens(vit: nn.Module, whole: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Everything but attention on all tokens at once."""
    sizes, rows = (whole.shape[:2], local.shape[:2]), (whole.shape[:2].numel(), local.shape[:2].numel())
    x = torch.cat([whole.flatten(0, 1), local.flatten(0, 1)])

    for b in vit.blocks:

        def attend(qkv: Tensor, heads: int = b.attn.num_heads) -> Tensor:
            parts = [attention(p.unflatten(0, s), heads) for p, s in zip(qkv.split(rows), sizes, strict=True)]
            return torch.cat([p.flatten(0, 1) for p in parts])

        x = block(b, x, attend)
    first, second = x.split(rows)
    return first.unflatten(0, sizes[0]), second.unflatten(0, sizes[1])


def rows(vit: nn.Module, whole: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Local crops side by side in rows as long as a global crop."""
    (B, N, D), (L, n, _) = whole.shape, local.shape
    per_row = N // n
    num_rows = -(-L // per_row)
    filled = F.pad(local, (0, 0, 0, 0, 0, num_rows * per_row - L)).view(num_rows, per_row * n, D)
    x = torch.cat([whole, F.pad(filled, (0, 0, 0, N - per_row * n))])
    owner = torch.arange(N) // n
    inside = (owner[:, None] == owner) & (owner < per_row) | torch.eye(N, dtype=torch.bool)
    mask = torch.ones(len(x), 1, N, N, dtype=torch.bool)
    mask[B:] = inside
    for b in vit.blocks:
        x = block(b, x, lambda qkv, b=b: attention(qkv, b.attn.num_heads, mask))
    return x[:B], x[B:, : per_row * n].reshape(-1, n, D)[:L]


def padded(vit: nn.Module, whole: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Local crops padded to a global one's length."""
    B, N, n = len(whole), whole.shape[1], local.shape[1]
    x = torch.cat([whole, F.pad(local, (0, 0, 0, N - n))])
    mask = torch.ones(len(x), 1, 1, N, dtype=torch.bool)
    mask[B:, ..., n:] = False
    for b in vit.blocks:
        x = block(b, x, lambda qkv, b=b: attention(qkv, b.attn.num_heads, mask))
    return x[:B], x[B:, :n]


def nested(vit: nn.Module, whole: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """torch.nested, jagged: attention over rows of different lengths."""
    lengths = torch.tensor([whole.shape[1]] * len(whole) + [local.shape[1]] * len(local))
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    x = torch.cat([whole.flatten(0, 1), local.flatten(0, 1)])
    for b in vit.blocks:

        def attend(qkv: Tensor, heads: int = b.attn.num_heads) -> Tensor:
            jagged = [torch.nested.nested_tensor_from_jagged(p, offsets) for p in qkv.chunk(3, -1)]
            q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in jagged)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).values()

        x = block(b, x, attend)
    first, second = x.split([whole.shape[:2].numel(), local.shape[:2].numel()])
    return first.view_as(whole), second.view_as(local)


VARIANTS: dict[str, Variant] = {f.__name__: f for f in (separate, tokens, rows, padded, nested)}


def measure(shape: dict, runs: int) -> dict:
    """Milliseconds of processor time of every variant, or why it does not run."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=shape["width"], depth=shape["depth"], num_heads=shape["heads"], num_classes=0
    ).eval()
    B, width = shape["batch"], shape["width"]
    whole = torch.randn(2 * B, shape["whole"], width, requires_grad=True)
    local = torch.randn(shape["num_local"] * B, shape["local"], width, requires_grad=True)
    expected = separate(vit, whole, local)
    found: dict = {}
    for name, variant in VARIANTS.items():
        try:
            outputs = variant(vit, whole, local)
            sum(o.sum() for o in outputs).backward()
            error = max((a - b).abs().max().item() for a, b in zip(outputs, expected, strict=True))
            if not error < 1e-3:
                raise RuntimeError(f"wrong by {error:.1e}")
            found[name] = []
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for _ in range(runs):
        for name, times in found.items():
            if isinstance(times, list):
                began = time.process_time()
                sum(o.sum() for o in VARIANTS[name](vit, whole, local)).backward()
                times.append(1000 * (time.process_time() - began))
    base = statistics.median(found["separate"])
    return {
        name: t
        if isinstance(t, str)
        else {"median_ms": round(statistics.median(t), 2), "times": round(base / statistics.median(t), 3)}
        for name, t in found.items()
    }


def main() -> None:
    """All shapes; prints and writes JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    result = {
        "command": "python bench/engine/bench_crops.py",
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "clock": "processor time, forward and backward; times: faster than separate passes",
        "shapes": SHAPES,
        "results": {name: measure(shape, args.runs) for name, shape in SHAPES.items()},
    }
    print(json.dumps(result["results"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
