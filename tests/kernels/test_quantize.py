"""quantize: every cell is the nearest e4m3 number of its row's scale, by the format's own definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, guarded_outputs, laid_out, sizes, surrounded
from torch import Tensor

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.quantize import (
    E4M3,
    MAX_ROW,
    _quantize_op,
    _quantize_triton,
    dequantize,
    native_fp8,
    quantize,
    quantize_reference,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# e4m3: 3 bits of mantissa, exponent bias 7, subnormals below 2^-6, no infinity, and 0x7F is NaN
GRID = torch.tensor(
    [(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1],
    dtype=torch.float64,
)


def rows(M: int, K: int, dtype=torch.float32, device="cpu") -> Tensor:
    """Rows of very different sizes, one of zeros, cells over many powers of two, and a largest cell that is exact."""
    generator = torch.Generator().manual_seed(M + 31 * K)
    x = torch.randn(M, K, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-12, 3, (M, K), generator=generator))
    x *= torch.exp2(torch.randint(-8, 8, (M, 1), generator=generator))
    x[M // 2] = 0
    return x.to(device, dtype)


def check(x: Tensor, got: tuple[Tensor, Tensor]) -> None:
    q, scale = (t.cpu() for t in got)
    x = x.cpu()
    assert q.dtype == E4M3 and q.shape == x.shape and scale.dtype == torch.float32
    amax = x.double().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(scale.double(), amax / 448, rtol=2**-24, atol=0)
    exact = x.double() / amax * 448
    nearest = (exact.abs()[..., None] - GRID).abs().amin(-1)
    # a tie may fall either way: two roundings in fp32 lie before it
    assert ((q.double() - exact).abs() <= nearest + 2**-22 * exact.abs()).all()
    assert (q.double() * exact >= 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cell_is_the_nearest(dtype, layout):
    x = laid_out(rows(37, 200, dtype), layout)
    check(x, quantize(x))


def test_every_code_comes_back():
    x = torch.cat([-GRID.flip(0), GRID]).float()
    q, scale = quantize(x)
    assert scale == 1 and torch.equal(q.float(), x)


def test_ties_go_to_the_even_code():
    codes = GRID.float()
    ties = torch.cat([(codes[1:] + codes[:-1]) / 2, codes[-1:]])
    q, _ = quantize(ties)
    assert (q[:-1].view(torch.uint8) % 2 == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_error(dtype):
    x = rows(37, 200, dtype)
    back = dequantize(*quantize(x), torch.float64)
    floor = x.double().abs().amax(1, keepdim=True) / 448 * 2**-10  # half the step of the subnormals
    assert ((back - x.double()).abs() <= (x.double().abs() / 16).maximum(floor) * (1 + 1e-6)).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)])
def test_zero_size(shape):
    q, scale = quantize(torch.zeros(shape))
    assert q.shape == shape and scale.shape == (*shape[:-1], 1)


def test_leading_dimensions():
    x = rows(6, 20)
    q, scale = quantize(x.view(2, 3, 20))
    wanted, wanted_scale = quantize(x)
    assert torch.equal(q.view(6, 20).float(), wanted.float()) and torch.equal(scale.view(6, 1), wanted_scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_cell_spoils_its_row_only(bad):
    x = rows(5, 20)
    x[1, 7] = bad
    back = dequantize(*quantize(x))
    assert not back[1].isfinite().any() and back[[0, 2, 3, 4]].isfinite().all()


def test_takes_part_in_no_graph_and_ignores_autocast():
    x = rows(5, 20).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        q, scale = quantize(x)
    assert not q.requires_grad and not scale.requires_grad
    assert torch.equal(scale, quantize_reference(x.detach())[1])


@pytest.mark.parametrize("shape", [(5, 20), (0, 20), (5, 0)])
def test_opcheck(shape):
    torch.library.opcheck(_quantize_op, (torch.randn(shape),))
    torch.library.opcheck(_quantize_op, (torch.randn(shape[::-1]).T,))


def test_compiles_as_one_graph():
    f = torch.compile(lambda x: dequantize(*quantize(x.relu())), backend="aot_eager", fullgraph=True)
    x = rows(5, 20)
    assert torch.equal(f(x), dequantize(*quantize(x.relu())))


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int8), torch.zeros(())]
)
def test_bad_input(x):
    with pytest.raises(ValueError, match=rf"quantize: x must be .* got \[.*\] in {x.dtype}"):
        quantize(x)


def test_scales_of_other_rows_are_named():
    with pytest.raises(ValueError, match=r"dequantize: scale must be \[3, 1\] on cpu to fit q, got \[2, 1\] on cpu"):
        dequantize(torch.zeros(3, 4).to(torch.float8_e4m3fn), torch.ones(2, 1))


def test_rows_too_long_for_triton_say_so():
    quantize(torch.ones(1, MAX_ROW + 1))
    row = next(row for row in _dispatch.report() if row.op == "quantize")
    assert row.implementation == "reference" and f"rows of {MAX_ROW + 1} cells" in row.reason


@pytest.mark.interp
@pytest.mark.usefixtures("triton")
class TestInterpreted:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_reference(self, dtype, layout):
        x = laid_out(rows(37, 200, dtype), layout)
        with guarded_outputs():
            q, scale = quantize(surrounded(x))
        wanted, wanted_scale = quantize_reference(x)
        assert torch.equal(q.float(), wanted.float()) and torch.equal(scale, wanted_scale)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(sizes(), sizes(300), st.sampled_from(DTYPES))
    def test_any_shape(self, M, K, dtype):
        x = rows(M, K, dtype)
        with guarded_outputs():
            got = quantize(surrounded(x))
        check(x, got)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_bad_cell_spoils_its_row_only(self, bad):
        test_a_bad_cell_spoils_its_row_only(bad)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(1, 1), (1000, 1024), (513, 1408), (300, 5632), (7, MAX_ROW)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_reference(self, dtype, shape, layout):
        x = laid_out(rows(*shape, dtype, "cuda"), layout)
        with _dispatch.forced("triton"), guarded_outputs():
            q, scale = quantize(surrounded(x))
        wanted, wanted_scale = quantize_reference(x.cpu())
        assert torch.equal(q.float().cpu(), wanted.float()) and torch.equal(scale.cpu(), wanted_scale)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_bad_cell_spoils_its_row_only(self, bad):
        x = rows(5, 1024, device="cuda")
        x[1, 7] = bad
        back = dequantize(*quantize(x))
        assert not back[1].isfinite().any() and back[[0, 2, 3, 4]].isfinite().all()

    @pytest.mark.parametrize("native", [False, True])
    def test_codes_by_the_gpu_and_by_integers(self, native):
        if native and not native_fp8(torch.device("cuda")):
            pytest.skip("the GPU has no e4m3")
        x = rows(1000, 1024, device="cuda")
        got, wanted = _quantize_triton(x, native), quantize_reference(x.cpu())
        assert torch.equal(got[0].float().cpu(), wanted[0].float()) and torch.equal(got[1].cpu(), wanted[1])

    def test_feeds_the_row_wise_gemm(self):
        if not native_fp8(torch.device("cuda")):
            pytest.skip("the GPU has no e4m3")
        x, w = rows(256, 512, torch.bfloat16, "cuda"), rows(384, 512, torch.bfloat16, "cuda")
        (q, s), (qw, sw) = quantize(x), quantize(w)
        y = torch._scaled_mm(q, qw.T, scale_a=s, scale_b=sw.T, out_dtype=torch.bfloat16)
        wanted = dequantize(q, s, torch.float64) @ dequantize(qw, sw, torch.float64).T
        assert (y.double() - wanted).norm() <= 4e-3 * wanted.norm()

    def test_graph_capture(self):
        x = rows(64, 1024, torch.bfloat16, "cuda")
        wanted = quantize(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = quantize(x)
        graph.replay()
        assert torch.equal(got[0].view(torch.uint8), wanted[0].view(torch.uint8)) and torch.equal(got[1], wanted[1])

    @pytest.mark.long
    def test_more_than_2_to_the_31_cells(self):
        x = torch.randn(2**31 // 4096 + 64, 4096, device="cuda", dtype=torch.bfloat16)
        q, scale = quantize(x)
        wanted, wanted_scale = quantize(x[-64:])
        assert torch.equal(q[-64:].view(torch.uint8), wanted.view(torch.uint8)) and torch.equal(
            scale[-64:], wanted_scale
        )
