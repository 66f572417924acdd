"""lora_linear: each strategy against the bare frozen GEMM and against PEFT, at the qkv shapes of ViTs.

    pytest bench/kernels/bench_lora_linear.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

In one group: `bare` (the frozen product; with backward: and its input gradient), every strategy, PEFT eager and
compiled. No time is given for a variant whose result or gradient is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.kernels.lora_linear import STRATEGIES, lora_linear, lora_linear_reference
from upstep_fast.kernels.lora_linear import triton as fused

# name: (M tokens, K in, N out)
SHAPES = (
    {"B/16": (256 * 197, 768, 2304), "L/14": (128 * 257, 1024, 3072), "g/14": (64 * 257, 1536, 4608)}
    if torch.cuda.is_available()
    else {"tiny": (4 * 197, 192, 576)}
)
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
RANK, SCALE = 16, 1.0


@functools.lru_cache(maxsize=1)
def tensors(shape: str) -> tuple[Tensor, ...]:
    """x, weight, bias, lora_a, lora_b, gradient of y."""
    M, K, N = SHAPES[shape]
    torch.manual_seed(0)
    sizes = ((M, K), (N, K), (N,), (RANK, K), (N, RANK), (M, N))
    x, w, b, lora_a, lora_b, g = (torch.randn(s, device=DEVICE).to(DTYPE) for s in sizes)
    return x.requires_grad_(), w / K**0.5, b, nn.Parameter(lora_a / K**0.5), nn.Parameter(lora_b), g


def peft_layer(shape: str) -> Callable[[Tensor], Tensor]:
    peft = pytest.importorskip("peft")
    _, w, b, lora_a, lora_b, _ = tensors(shape)
    base = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], device=DEVICE, dtype=DTYPE))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["0"])
    layer = peft.get_peft_model(base, config).base_model.model[0]
    layer.base_layer.weight.data, layer.base_layer.bias.data = w, b
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = lora_a, lora_b
    return layer


def bare_triton(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[0])
    fused._launch(x, w, y, bias=b)
    return y


def variant(name: str, shape: str) -> Callable[[], Tensor]:
    x, w, b, lora_a, lora_b, _ = tensors(shape)
    if name == "bare":
        return lambda: F.linear(x, w, b)
    if name == "bare triton":
        return lambda: bare_triton(x.detach(), w, b)
    if name.startswith("peft"):
        layer = peft_layer(shape)
        compiled = torch.compile(layer) if name == "peft compiled" else layer
        return lambda: compiled(x)
    strategy = None if name == "measured" else name
    return lambda: lora_linear(x, w, b, lora_a, lora_b, SCALE, strategy=strategy)


def leaves(name: str, shape: str) -> list[Tensor]:
    x, _, _, lora_a, lora_b, _ = tensors(shape)
    return [x] if name.startswith("bare") else [x, lora_a, lora_b]


def check(name: str, shape: str, backward: bool) -> None:
    """Fails the variant if it is further from the fp64 reference than its dtype explains."""
    if name.startswith("bare"):
        return
    *args, g = tensors(shape)
    with torch.enable_grad():
        wanted = lora_linear_reference(*(t.double() for t in args), SCALE)
        got = variant(name, shape)()
    pairs = [("y", got, wanted)]
    if backward:
        gradients = torch.autograd.grad(got, leaves(name, shape), g)
        truth = torch.autograd.grad(wanted, leaves(name, shape), g.double())
        pairs += zip(("dx", "da", "db"), gradients, truth, strict=True)
    for what, a, b in pairs:
        error = ((a - b).norm() / b.norm()).item()
        assert error < 4 * torch.finfo(DTYPE).eps, f"{name}: {what} is wrong (error {error:.1e}); no time given"


VARIANTS = ["bare", *STRATEGIES, "measured", "fastest", "peft eager"]
VARIANTS += ["bare triton", "peft compiled"] if DEVICE == "cuda" else []


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_linear(measure, shape, direction, name):
    backward = direction != "forward"
    if name == "triton" and DEVICE == "cpu":
        pytest.skip("Triton needs a GPU")
    if name == "bare triton" and backward:
        pytest.skip("a forward kernel")
    check(name, shape, backward)
    call, wrt, g = variant(name, shape), leaves(name, shape), tensors(shape)[-1]

    M, K, N = SHAPES[shape]
    info = {"M": M, "K": K, "N": N, "rank": RANK, "dtype": str(DTYPE), "frozen_flop": 2 * M * K * N * (1 + backward)}
    both = lambda: torch.autograd.grad(call(), wrt, g)  # noqa: E731
    with torch.set_grad_enabled(backward):
        measure(both if backward else call, f"lora_linear {shape} {direction}", "lora_linear", **info)
