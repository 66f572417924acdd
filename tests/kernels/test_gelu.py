"""gelu: value against fp64, the derivative's byte against the true derivative, fp8 against quantize."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_matches, guarded_outputs, surrounded
from torch import Tensor

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.gelu import (
    APPROXIMATIONS,
    _gelu_backward_op,
    _gelu_op,
    gelu,
    gelu_backward,
    gelu_backward_reference,
    gelu_forward,
    gelu_reference,
)
from upstep_fast.kernels.quantize import E4M3, MAX_ROW, dequantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VARIANTS = [(dtype, approximate) for dtype in DTYPES for approximate in APPROXIMATIONS]


def values(*shape: int, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def exact(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Value and derivative in fp64, by autograd of torch's own functions."""
    x = x.detach().double().requires_grad_()
    y = x * torch.sigmoid(1.702 * x) if approximate == "quick" else F.gelu(x, approximate=approximate)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def check(x: Tensor, approximate: str) -> None:
    """Value by the three conditions; the gradient to half a step of the byte, one rounding, and no bias."""
    y64, d64 = exact(x, approximate)
    g = values(*x.shape, dtype=x.dtype, device=x.device, seed=1)
    with guarded_outputs():
        leaf = surrounded(x).requires_grad_()
        y = gelu(leaf, approximate)
        (dx,) = torch.autograd.grad(y, leaf, surrounded(g))
    assert y.dtype == dx.dtype == x.dtype
    assert_matches(y, y64, gelu_reference(x, approximate), name="y")
    error = (dx.double() - g.double() * d64).cpu()
    steps = 2 if x.dtype == torch.bfloat16 else 1  # the interpreter truncates bf16
    bound = g.double().abs() * (1 / 400 + 1e-4 + steps * torch.finfo(x.dtype).eps * d64.abs())
    assert (error.abs() <= bound.cpu() + torch.finfo(x.dtype).tiny).all()


def check_fp8(x: Tensor, approximate: str) -> None:
    y64, d64 = exact(x, approximate)
    g = values(*x.shape, dtype=x.dtype, device=x.device, seed=1)
    with guarded_outputs():
        y, derivative, y_scale = gelu_forward(surrounded(x), approximate, fp8=True)
        dx, dx_scale = gelu_backward(surrounded(g), derivative, fp8=True)
    for name, q, scale, wanted, slack in (("y", y, y_scale, y64, 1e-4), ("dx", dx, dx_scale, g.double() * d64, 4e-3)):
        assert q.dtype == E4M3 and scale.shape == (*x.shape[:-1], 1), name
        back, amax = dequantize(q, scale, torch.float64), wanted.abs().amax(-1, keepdim=True)
        # half a step of 3 bits, or of the subnormals below amax 2^-6 / 448
        bound = (wanted.abs() / 16).maximum(amax / 448 * 2**-10) + slack * amax
        assert ((back - wanted).abs() <= bound).all(), name
        torch.testing.assert_close(scale.double() * 448, amax, rtol=slack, atol=1e-30)


@pytest.mark.parametrize(("dtype", "approximate"), VARIANTS)
def test_matches_fp64(dtype, approximate):
    check(values(70, 45, dtype=dtype), approximate)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_derivatives_byte(approximate):
    """Exact at 0 and 1, right to half a step, and as good as a derivative kept in bf16."""
    x = torch.cat([values(200_000) / 2, torch.tensor([-60.0, 60.0, -math.inf, math.inf, 3e38, -3e38, 0.0])])
    back = (gelu_forward(x, approximate)[1].double() - 26) / 200
    assert back[-7:].tolist() == [0, 1, 0, 1, 1, 0, 0.5]
    back, d64 = back[:-7], exact(x[:-7], approximate)[1]
    assert (back - d64).abs().max() <= 1 / 400 + 1e-6
    assert_matches(back, d64, d64.bfloat16().double(), dtype=torch.bfloat16)


@pytest.mark.parametrize("shift", [-1.0, -0.5, 0.0, 0.7])
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_derivatives_mean_error(approximate, shift):
    x = values(400_000) / 2 + shift
    error = (gelu_forward(x, approximate)[1].double() - 26) / 200 - exact(x, approximate)[1]
    assert abs(error.mean()) <= 3 * error.std() / math.sqrt(len(error)) + (6e-5 if shift else 0)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8(dtype, approximate):
    check_fp8(values(7, 130, dtype=dtype), approximate)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_references_gradient(approximate):
    x = values(50, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gelu_reference(x, approximate), x)


def test_without_a_gradient_nothing_is_kept():
    x = values(8, 16)
    y, derivative, scale = gelu_forward(x, save_derivative=False)
    assert derivative is None and scale is None and not y.requires_grad
    with torch.no_grad():
        assert gelu(x.requires_grad_()).grad_fn is None
    y = gelu(x)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None] if hasattr(y.grad_fn, "saved_tensors") else []
    assert sum(t.numel() * t.element_size() for t in saved) == x.numel()


def test_gradients_accumulate():
    x = values(8, 16).requires_grad_()
    g = values(8, 16, seed=1)
    (once,) = torch.autograd.grad(gelu(x), x, g)
    for _ in range(3):
        gelu(x).backward(g)
    torch.testing.assert_close(x.grad, 3 * once)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_zero_size(shape, fp8):
    x = torch.zeros(shape)
    y, derivative, _ = gelu_forward(x, fp8=fp8)
    dx, _ = gelu_backward(x, derivative, fp8=fp8)
    assert y.shape == derivative.shape == dx.shape == shape
    gelu(x.requires_grad_()).sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("layout", ["scalar", "transpose", "slice"])
def test_layouts(layout):
    x = {"scalar": values(1)[0], "transpose": values(5, 7).T, "slice": values(5, 7)[:, 1:4]}[layout]
    y = gelu(x.requires_grad_())
    (dx,) = torch.autograd.grad(y, x, torch.ones(()).expand(x.shape))
    torch.testing.assert_close(y, F.gelu(x))
    assert (dx - exact(x, "none")[1]).abs().max() < 1 / 390


def test_nan_stays_in_its_cell():
    x = values(4, 5)
    x[1, 2] = math.nan
    assert gelu(x).isnan().nonzero().tolist() == [[1, 2]]


def test_autocast_leaves_it_alone():
    x = values(4, 5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = gelu(x)
    assert y.dtype == torch.float32 and torch.equal(y, gelu(x))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("x", [values(4, 6), values(0, 6), values(6, 4).T], ids=["plain", "empty", "transpose"])
def test_opcheck(x, keep, fp8):
    if keep and not fp8:
        x = x.detach().requires_grad_()
    torch.library.opcheck(_gelu_op, (x, "none", keep, fp8))
    byte = torch.full(x.shape, 100, dtype=torch.uint8)
    torch.library.opcheck(_gelu_backward_op, (x.detach(), byte, fp8))
    torch.library.opcheck(_gelu_backward_op, (x.detach(), byte.mT.contiguous().mT, fp8))


def test_compiles_as_one_graph():
    f = torch.compile(lambda x: gelu(x * 2, "tanh") + 1, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (4, 7):
        x = values(n, 5).requires_grad_()
        g = values(n, 5, seed=1)
        got, wanted = f(x), gelu(x * 2, "tanh") + 1
        assert torch.equal(got, wanted)
        assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (got, wanted)))


def test_backward_reference_is_the_ops():
    x, g = values(40, 30), values(40, 30, seed=1)
    _, byte, _ = gelu_forward(x)
    assert torch.equal(gelu_backward(g, byte)[0], gelu_backward_reference(g, byte))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gelu(values(2), "erf"), "gelu: approximate must be one of none, tanh, quick, got 'erf'"),
        (lambda: gelu(torch.zeros(2, dtype=torch.int32)), "gelu: x must be .* got torch.int32"),
        (lambda: gelu_forward(values(2).double(), fp8=True), "gelu_forward: x must be .* got torch.float64"),
        (lambda: gelu_forward(torch.zeros(()), fp8=True), "got a scalar"),
        (
            lambda: gelu_backward(values(2), torch.zeros(3, dtype=torch.uint8)),
            r"derivative must be uint8 \[2\] .*\[3\]",
        ),
        (lambda: gelu_backward(values(2), values(2)), "derivative must be uint8 .* got torch.float32"),
        (lambda: gelu_backward(torch.zeros(2, dtype=torch.int8), values(2)), "grad must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_forced_triton_on_a_cpu_raises_with_the_reason():
    if _dispatch.triton_unsupported_reason(torch.zeros(1)) is None:
        pytest.skip("the interpreter takes CPU tensors")
    with _dispatch.forced("triton"), pytest.raises(RuntimeError, match=r"gelu: .* needs CUDA tensors, got cpu"):
        gelu(values(2))


@pytest.mark.interp
@pytest.mark.usefixtures("triton")
class TestInterpreted:
    @pytest.mark.parametrize(("dtype", "approximate"), VARIANTS)
    def test_matches_fp64(self, dtype, approximate):
        check(values(70, 45, dtype=dtype), approximate)

    @pytest.mark.parametrize("approximate", APPROXIMATIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fp8(self, dtype, approximate):
        check_fp8(values(7, 130, dtype=dtype), approximate)

    @pytest.mark.parametrize("approximate", APPROXIMATIONS)
    def test_derivatives_byte(self, approximate):
        test_derivatives_byte(approximate)

    @pytest.mark.parametrize("approximate", APPROXIMATIONS)
    def test_every_fp16_number(self, approximate):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
        x = x[x.isfinite()]
        y64, _ = exact(x, approximate)
        error = (gelu_forward(x, approximate)[0].double() - y64).abs()
        # one rounding (2^-11, or 2^-25 among the subnormals) and a twelfth of it
        assert (error <= y64.abs() * (2**-11 + 4e-5) + 2**-25).all()

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.integers(1, 5000), st.sampled_from(APPROXIMATIONS))
    def test_any_size(self, n, approximate):
        check(values(n), approximate)

    def test_nan_stays_in_its_cell(self):
        test_nan_stays_in_its_cell()


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
class TestGpu:
    @pytest.mark.parametrize("shape", [(1,), (1023,), (33, 1024), (257, 5632), (3, 5, 7)])
    @pytest.mark.parametrize(("dtype", "approximate"), VARIANTS)
    def test_matches_fp64(self, dtype, approximate, shape):
        check(values(*shape, dtype=dtype, device="cuda"), approximate)

    @pytest.mark.parametrize("K", [1, 130, 4096, 5632, MAX_ROW])
    @pytest.mark.parametrize(("dtype", "approximate"), VARIANTS)
    def test_fp8(self, dtype, approximate, K):
        check_fp8(values(33, K, dtype=dtype, device="cuda"), approximate)

    @pytest.mark.parametrize("approximate", APPROXIMATIONS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_every_16_bit_number(self, dtype, approximate):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
        x = x[x.isfinite() & (x.abs() < 1e30)].cuda()
        y64, d64 = exact(x, approximate)
        y, byte, _ = gelu_forward(x, approximate)
        info = torch.finfo(dtype)
        # below fp32's smallest normal number exp2 gives 0
        assert (
            (y.double() - y64).abs() <= y64.abs() * (info.eps / 2 + 4e-5) + info.smallest_normal * info.eps + 1e-35
        ).all()
        assert (((byte.double() - 26) / 200 - d64).abs() <= 1 / 400 + 1e-5).all()

    def test_a_hundred_runs_give_one_answer(self):
        x = values(1000, 1024, dtype=torch.bfloat16, device="cuda")
        first = gelu_forward(x, fp8=True)
        for _ in range(100):
            again = gelu_forward(x, fp8=True)
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True))

    def test_graph_capture_forward_and_backward(self):
        x = values(64, 1024, dtype=torch.bfloat16, device="cuda").requires_grad_()
        g = values(64, 1024, dtype=torch.bfloat16, device="cuda", seed=1)
        (wanted,) = torch.autograd.grad(gelu(x), x, g)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (got,) = torch.autograd.grad(gelu(x), x, g)
        graph.replay()
        assert torch.equal(got, wanted)

    @pytest.mark.long
    def test_more_than_2_to_the_31_cells(self):
        x = torch.randn(2**31 + 4096, device="cuda", dtype=torch.bfloat16)
        y, byte, _ = gelu_forward(x)
        wanted, wanted_byte, _ = gelu_forward(x[-4096:])
        assert torch.equal(y[-4096:], wanted) and torch.equal(byte[-4096:], wanted_byte)
