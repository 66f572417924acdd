"""lora_linear_fp8: the quantized product to the rounding of its sums, the adapter untouched by fp8."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_matches, guarded_outputs, sizes, surrounded
from torch import Tensor

from upstep_fast.kernels import _tile_sizes
from upstep_fast.kernels.lora_linear import lora_linear
from upstep_fast.kernels.lora_linear.fp8 import _backward_op, _op, lora_linear_fp8, lora_linear_fp8_reference
from upstep_fast.kernels.quantize import dequantize, quantize

# the schema test multiplies its inputs, and torch has no such kernel for fp8
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
QV = ((0, 32), (64, 96))
NAMES = ("y", "dx", "da", "db")
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
SMALL_SWEEP = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


def tensors(M=70, K=48, N=96, r=5, dtype=torch.bfloat16, rows=None, device="cpu"):
    """x, quantized weight, its scales, bias, lora_a, lora_b, a gradient of y; and the wide weight."""
    generator = torch.Generator().manual_seed(M + K)
    adapted = N if rows is None else sum(stop - start for start, stop in rows)
    shapes = ((M, K), (N, K), (N,), (r * len(rows or [0]), K), (adapted, r), (M, N))
    x, w, b, lora_a, lora_b, g = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    w, lora_a = w / math.sqrt(K), lora_a / math.sqrt(K)
    return (x, *quantize(w), b, lora_a, lora_b, g), w


def with_gradients(function, x, w, w_scale, b, lora_a, lora_b, g, **kwargs) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, lora_a, lora_b)]
    y = function(leaves[0], w, w_scale, b, leaves[1], leaves[2], **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def check(strategy, given, **kwargs) -> None:
    """Against fp64 on the same quantized numbers; eager is the same formula on the widened weight."""
    x, w, w_scale, *rest = given
    wide = [x.double(), w, w_scale.double(), *(t.double() for t in rest)]
    oracle = with_gradients(lora_linear_fp8_reference, *wide, scale=0.7, **kwargs)
    with guarded_outputs():
        got = with_gradients(lora_linear_fp8, *map(surrounded, given), scale=0.7, strategy=strategy, **kwargs)
    widened, quantized = dequantize(w, w_scale, x.dtype), dequantize(*quantize(x), x.dtype)
    plain = with_gradients(
        lambda x, w, _, *adapter, **kw: lora_linear(x, w, *adapter, strategy="split", **kw),
        quantized, widened, None, *rest, scale=0.7, **kwargs,
    )  # fmt: skip
    for name, g, o, p in zip(NAMES, got, oracle, plain, strict=True):
        # eager's dx and adapter gradients do not see the quantization of x but through da
        assert_matches(g, o, None if name == "da" else p, name=f"{strategy} {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [None, QV], ids=["all", "qv"])
@pytest.mark.parametrize("strategy", ["reference", "split"])
def test_matches_fp64(strategy, rows, dtype):
    check(strategy, tensors(dtype=dtype, rows=rows)[0], rows=rows)


def test_dropout():
    check("split", tensors()[0], dropout=0.3, seed=3)


def test_nan_and_infinity_are_not_hidden():
    # in fp32: oneDNN's bf16 product on AMX pads an odd rank with the next row's first value times 0, which is NaN here
    given, _ = tensors(dtype=torch.float32)
    given[0][2, 3], given[0][5, 1] = math.nan, math.inf
    y = lora_linear_fp8(*given[:6], 1.0)
    assert not y[2].isfinite().any() and not y[5].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()


def test_the_adapters_part_never_sees_fp8():
    given, _ = tensors(dtype=torch.float32)
    x, w, w_scale, _, lora_a, lora_b, _ = given
    y = lora_linear_fp8(x, torch.zeros_like(w), w_scale, None, lora_a, lora_b, 0.7)
    oracle = 0.7 * (x.double() @ lora_a.double().T) @ lora_b.double().T
    assert_matches(y, oracle, 0.7 * (x @ lora_a.T) @ lora_b.T)


def test_transposed_weight_gives_the_quantized_gradient():
    given, wide = tensors()
    lora_a, lora_b, g = given[-3:]
    w_t = quantize(wide.T.contiguous())
    *_, got_a, got_b = got = with_gradients(lora_linear_fp8, *given, scale=0.7, transposed=w_t)
    exact = with_gradients(lora_linear_fp8, *given, scale=0.7)
    assert torch.equal(got_a, exact[2]) and torch.equal(got_b, exact[3])
    frozen = dequantize(*quantize(g), torch.float64) @ dequantize(*w_t, torch.float64).T
    oracle = frozen + 0.7 * g.double() @ lora_b.double() @ lora_a.double()
    assert (got[1] - oracle).norm() <= 4e-3 * oracle.norm()
    assert (got[1] - exact[1]).norm() <= 6e-2 * exact[1].norm()


@pytest.mark.parametrize("M", [0, 9])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_opcheck(M, is_transposed):
    (x, w, w_scale, b, lora_a, lora_b, g), wide = tensors(M=M)
    w_t, w_t_scale = quantize(wide.T.contiguous()) if is_transposed else (None, None)
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    args = (leaves[0], w, w_scale, w_t, w_t_scale, b, leaves[1], leaves[2], 0.5, 0.0, None, [], True, "")
    torch.library.opcheck(_op, args, test_utils=OPCHECKS)
    x, lora_a, lora_b = (t.detach() for t in leaves)
    frozen = (w_t, w_t_scale) if is_transposed else (w, w_scale)
    rest = (x @ lora_a.T, 0.5, 0.0, None, [], "", [True, True, True])
    torch.library.opcheck(_backward_op, (g, x, *frozen, is_transposed, lora_a, lora_b, *rest), test_utils=OPCHECKS)


def test_compiles_as_one_graph_under_autocast():
    (x, w, w_scale, b, lora_a, lora_b, _), _ = tensors(dtype=torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x, lora_a):
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear_fp8(x, w, w_scale, b, lora_a, lora_b, 0.5)

    y = f(x, lora_a.requires_grad_())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and lora_a.grad.dtype == torch.float32


@pytest.mark.parametrize("strategy", ["reference", "split"])
def test_no_rows(strategy):
    x, w, w_scale, b, lora_a, lora_b, _ = tensors()[0]
    leaves = [t.requires_grad_() for t in (x[:0], lora_a, lora_b)]
    y = lora_linear_fp8(leaves[0], w, w_scale, b, lora_a, lora_b, 0.5, strategy=strategy)
    assert y.shape == (0, 96)
    dx, da, db = torch.autograd.grad(y.sum(), leaves)
    assert dx.shape == (0, 48) and not da.any() and not db.any()


BAD = {
    "x must be fp16": {"x": torch.zeros(2, 48, dtype=torch.float64)},
    "weight must be torch.float8_e4m3fn": {"weight": torch.zeros(96, 48, dtype=torch.bfloat16)},
    r"weight_scale must be \[96, 1\] torch.float32": {"weight_scale": torch.ones(96)},
    r"transposed\[1\] must be \[48, 1\]": {
        "transposed": (torch.zeros(48, 96, dtype=torch.float8_e4m3fn), torch.ones(96))
    },
    "strategy 'merged' has no fp8 form": {"strategy": "merged"},
    "bias must be frozen": {"bias": torch.zeros(96, dtype=torch.bfloat16, requires_grad=True)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    names = ("x", "weight", "weight_scale", "bias", "lora_a", "lora_b")
    good = dict(zip(names, tensors()[0], strict=False))
    with pytest.raises(ValueError, match=f"lora_linear_fp8: {message}"):
        lora_linear_fp8(**{**good, "scale": 1.0, **BAD[message]})


def test_lora_linear_says_where_fp8_weights_go():
    (x, w, _, b, lora_a, lora_b, _), _ = tensors()
    with pytest.raises(ValueError, match="lora_linear_fp8"):
        lora_linear(x, w, b, lora_a, lora_b, 1.0)


@pytest.mark.interp
@pytest.mark.parametrize("rows", [None, QV], ids=["all", "qv"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_triton_interpreted(monkeypatch, rows, dropout):
    for op in [op for op in _tile_sizes.TILES if op.startswith("lora_linear")]:
        monkeypatch.setitem(_tile_sizes.TILES, op, {None: SMALL_SWEEP if "sweep" in op else SMALL})
    check("triton", tensors(M=70, K=45, N=96, dtype=torch.float16, rows=rows)[0], rows=rows, dropout=dropout, seed=3)


@pytest.mark.interp
# no shrinking: a failure would take minutes here
@settings(deadline=None, max_examples=6, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(M=sizes(40, 8), K=sizes(70, 8), N=sizes(70, 8), r=st.integers(1, 20))
def test_triton_interpreted_at_any_shape(M, K, N, r):
    with pytest.MonkeyPatch.context() as patch:
        for op in [op for op in _tile_sizes.TILES if op.startswith("lora_linear")]:
            patch.setitem(_tile_sizes.TILES, op, {None: SMALL_SWEEP if "sweep" in op else SMALL})
        check("triton", tensors(M, K, N, r, dtype=torch.float16)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, ((0, 384), (768, 1152))], ids=["all", "qv"])
@pytest.mark.parametrize("strategy", ["reference", "split", "triton"])
def test_gpu_matches_fp64(strategy, rows):
    check(strategy, tensors(1003, 384, 1152, 16, rows=rows, device="cuda")[0], rows=rows)
