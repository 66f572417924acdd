"""attention: every way against fp64 softmax attention, and PyTorch's own on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_matches, guarded_outputs, surrounded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from upstep_fast.kernels import _dispatch, _tile_sizes
from upstep_fast.kernels.attention import (
    attention,
    attention_backward,
    attention_backward_reference,
    attention_forward,
    attention_reference,
    cpp,
    op,
)
from upstep_fast.kernels.attention import triton as launchers
from upstep_fast.kernels.attention.op import _BACKWARD, _FORWARD, _backward_op, _op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = {"BLOCK": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


def set_tiles(monkeypatch, riders=16, **changes):
    for name in [name for name in _tile_sizes.TILES if name.startswith("attention")]:
        row = SMALL | ({} if "backward" in name else {"RIDERS": riders}) | changes
        if name == "attention_head":
            row = {key: row[key] for key in ("BLOCK_N", "num_warps", "num_stages")}
        monkeypatch.setitem(_tile_sizes.TILES, name, {None: row})


@pytest.fixture
def small_tiles(monkeypatch):
    set_tiles(monkeypatch)


def tensors(B: int, T: int, H: int, D: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    """qkv with scores of a few units, and a gradient of out."""
    generator = torch.Generator().manual_seed(B + 7 * T + 31 * H + D)
    qkv = torch.randn(B, T, 3, H, D, generator=generator, dtype=torch.float64)
    grad = torch.randn(B, T, H, D, generator=generator, dtype=torch.float64)
    return qkv.to(device, dtype), grad.to(device, dtype)


def eager(qkv: Tensor, scale: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return ((scale * (q @ k.mT)).softmax(-1) @ v).transpose(1, 2)


def with_gradient(function, qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def check(qkv: Tensor, grad: Tensor, forward: str, backward: str, scale: float | None = None) -> None:
    """One way of forward and one of backward: out, lse, dq, dk and dv.

    In 16 bit by the three conditions. In fp32 by the largest error: there lse's own rounding is what is left, and all
    of a row of P shares it, which the third condition takes for a bias.
    """
    s = scale or qkv.shape[-1] ** -0.5
    out64, dqkv64 = with_gradient(lambda x: attention_reference(x, s)[0], qkv.double(), grad.double())
    plain, plain_dqkv = with_gradient(lambda x: eager(x, s), qkv, grad)
    with guarded_outputs():
        guarded = surrounded(qkv)
        out, lse = _FORWARD[forward](guarded, s)
        out, lse = out.contiguous(), lse.contiguous()
        dqkv = _BACKWARD[backward](surrounded(grad), guarded, out, lse, s)
    assert dqkv.shape == qkv.shape and out.shape == grad.shape
    parts = [("out", out, out64, plain)]
    parts += [(n, dqkv[:, :, i], dqkv64[:, :, i], plain_dqkv[:, :, i]) for i, n in enumerate(("dq", "dk", "dv"))]
    for name, got, wanted, yardstick in parts:
        if qkv.dtype == torch.float32:
            assert (got - wanted).abs().max() <= 16 * torch.finfo(torch.float32).eps * wanted.abs().max(), name
        else:
            assert_matches(got, wanted, yardstick, name=f"{forward} {backward} {name}")
    torch.testing.assert_close(lse.double(), attention_reference(qkv.double(), s)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_matches_fp64(dtype):
    check(*tensors(2, 37, 2, 24, dtype), "reference", "reference")


@pytest.fixture
def without_compiled(monkeypatch):
    monkeypatch.setattr(cpp, "unsupported_reason", lambda qkv: "not built")


@pytest.mark.parametrize("form", ["sdpa", "cpp or sdpa"])
@pytest.mark.parametrize("T", [1, 37, 257])
def test_on_a_cpu_matches_fp64(T, form, request):
    if form == "sdpa":
        request.getfixturevalue("without_compiled")
    qkv, grad = tensors(2, T, 2, 24)
    wanted = with_gradient(lambda x: attention_reference(x, 24**-0.5)[0], qkv.double(), grad.double())
    for got, want in zip(with_gradient(attention, qkv, grad), wanted, strict=True):
        assert (got - want).abs().max() <= 4e-6


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_is_pytorchs_own_on_a_cpu_without_compiled_ops(dtype, without_compiled):
    qkv, grad = tensors(2, 37, 2, 24, dtype)

    def library(x):
        q, k, v = x.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        wanted = with_gradient(library, qkv, grad)
    out, dqkv = with_gradient(lambda x: attention(x, 0.3), qkv, grad)
    assert torch.equal(out, wanted[0])
    # in 16 bit the backward is computed in fp32: nearer to the truth than the library's
    _, truth = with_gradient(library, qkv.double(), grad.double())
    ours, theirs = ((d.double() - truth).norm() for d in (dqkv, wanted[1]))
    assert ours <= theirs or ours <= torch.finfo(dtype).eps * truth.norm()
    rows = {row.op: row for row in _dispatch.report() if row.device == "cpu"}
    assert rows["attention"].implementation == rows["attention_backward"].implementation == "sdpa"
    assert "not cpp: not built" in rows["attention"].reason


def test_gradcheck():
    qkv, _ = tensors(1, 5, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: attention_reference(x, 0.7), qkv.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: attention(x, 0.7), qkv)


def test_backward_reference_is_the_references_gradient():
    qkv, grad = tensors(2, 9, 2, 5, torch.float64)
    out, wanted = with_gradient(lambda x: attention_reference(x, 0.4)[0], qkv, grad)
    got = attention_backward_reference(grad, qkv, out, attention_reference(qkv, 0.4)[1], 0.4)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_by_hand_equals_autograd():
    qkv, grad = tensors(2, 9, 2, 8)
    out, dqkv = with_gradient(attention, qkv, grad)
    hand, lse = attention_forward(qkv)
    assert torch.equal(hand, out) and torch.equal(attention_backward(grad, qkv, hand, lse), dqkv)


def test_strides_and_gradient_accumulation():
    qkv, grad = tensors(2, 9, 2, 8)
    out, dqkv = with_gradient(attention, qkv, grad)
    strided = qkv.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for _ in range(3):
        got = attention(strided)
        got.backward(grad.transpose(2, 3).contiguous().transpose(2, 3))
    assert torch.equal(got, out)
    torch.testing.assert_close(strided.grad, 3 * dqkv)
    with torch.no_grad():
        assert attention(strided).grad_fn is None


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (2, 0, 3, 2, 8), (2, 5, 3, 0, 8), (2, 5, 3, 2, 0)])
def test_zero_size(shape):
    qkv = torch.zeros(shape, requires_grad=True)
    out = attention(qkv)
    assert out.shape == (*shape[:2], *shape[3:])
    out.sum().backward()
    assert qkv.grad.shape == shape


def test_large_scores_do_not_overflow():
    qkv, grad = tensors(1, 9, 1, 8)
    out, dqkv = with_gradient(lambda x: attention(x, 1e4), qkv, grad)
    assert out.isfinite().all() and dqkv.isfinite().all()


def test_nan_stays_in_its_image_and_head():
    qkv, _ = tensors(2, 9, 2, 8)
    qkv[1, 3, 0, 1, 2] = math.nan  # one query
    bad = attention(qkv).isnan()
    assert bad[1, 3, 1].all() and bad.sum() == 8


def test_autocast():
    qkv, grad = tensors(2, 9, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, dqkv = with_gradient(attention, qkv, grad.bfloat16())
    assert out.dtype == torch.bfloat16 and dqkv.dtype == torch.float32
    assert torch.equal(out, attention(qkv.bfloat16()))


@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 8), (0, 5, 3, 2, 8)])
def test_opcheck(shape):
    qkv = torch.randn(shape, requires_grad=True)
    torch.library.opcheck(_op, (qkv, 0.3))
    torch.library.opcheck(_op, (qkv.detach().transpose(0, 1).contiguous().transpose(0, 1), 0.3))
    out, lse = attention_forward(qkv, 0.3)
    torch.library.opcheck(_backward_op, (torch.randn_like(out), qkv.detach(), out, lse, 0.3))


def test_compiles_as_one_graph():
    f = torch.compile(lambda x: attention(x * 2) + 1, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (5, 9):
        qkv, grad = tensors(2, T, 2, 8)
        wanted = with_gradient(lambda x: attention(x * 2) + 1, qkv, grad)
        for a, b in zip(with_gradient(f, qkv, grad), wanted, strict=True):
            assert torch.equal(a, b)


QKV = torch.zeros(1, 4, 3, 2, 8)
OUT, LSE = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)
BAD = [
    (lambda: attention(QKV[0]), r"attention: qkv must be \[B, T, 3, H, d\] .* got \[4, 3, 2, 8\]"),
    (lambda: attention(QKV[:, :, :2]), r"qkv must be .* got \[1, 4, 2, 2, 8\]"),
    (lambda: attention(QKV.int()), "qkv must be .* in torch.int32"),
    (lambda: attention_forward(QKV, math.nan), "attention_forward: scale must be finite, got nan"),
    (lambda: attention_backward(OUT[:, :3], QKV, OUT, LSE), r"grad must be \[1, 4, 2, 8\] .* got \[1, 3, 2, 8\]"),
    (lambda: attention_backward(OUT, QKV, OUT, LSE.mT), r"lse must be \[1, 2, 4\] .* got \[1, 4, 2\]"),
    (lambda: attention_backward(OUT, QKV, OUT.to("meta"), LSE), "out must be .* on cpu .* on meta"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_triton_that_cannot_run_raises_with_the_reason():
    with _dispatch.forced("triton"):
        with pytest.raises(RuntimeError, match=r"attention: .* head width 136 exceeds 128"):
            attention(torch.zeros(1, 2, 3, 1, 136))
        if _dispatch.triton_unsupported_reason(QKV):
            with pytest.raises(RuntimeError, match=r"attention: .* needs CUDA tensors, got cpu"):
                attention(QKV)


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
class TestInterpreted:
    # no small block; one that rides; one that rides with the last full block half empty; fewer tokens than a block
    @pytest.mark.parametrize("T", [64, 33, 50, 7])
    def test_matches_fp64(self, T):
        check(*tensors(1, T, 2, 24), "triton", "triton")

    # keys that fill a block of 64; that lack some; one beyond it; as many beyond it as may be
    @pytest.mark.parametrize(("T", "D"), [(64, 16), (37, 24), (65, 16), (80, 9)])
    def test_backward_by_heads_matches_fp64(self, T, D):
        check(*tensors(1, T, 2, D), "triton", "triton_heads")

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_backward_by_heads_in_16_bit(self, dtype):
        check(*tensors(1, 66, 1, 16, dtype), "triton", "triton_heads")

    # small blocks of 16 and 32 queries as programs of their own
    @pytest.mark.parametrize("T", [33, 50])
    def test_without_riders(self, monkeypatch, T):
        set_tiles(monkeypatch, riders=0, BLOCK_N=32)
        check(*tensors(1, T, 1, 24), "triton", "triton")

    # below zero the largest score is another one; at zero all keys count the same
    @pytest.mark.parametrize("scale", [-0.3, 0.0])
    def test_scale_may_have_any_sign(self, scale):
        qkv, grad = tensors(1, 37, 1, 16)
        qkv[:, :, :2] *= 8  # scores above 100, whose exponentials overflow unless the largest is subtracted
        with _dispatch.forced("triton"):
            got = with_gradient(lambda x: attention(x, scale), qkv, grad)
        wanted = with_gradient(lambda x: attention_reference(x, scale)[0], qkv.double(), grad.double())
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_matches_fp64_in_16_bit(self, dtype):
        check(*tensors(1, 37, 1, 16, dtype), "triton", "triton")

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(st.integers(1, 40), st.integers(1, 2), st.integers(1, 33))
    def test_any_shape(self, T, H, D):
        qkv, grad = tensors(1, T, H, D)
        with _dispatch.forced("triton"), guarded_outputs():
            got = with_gradient(attention, surrounded(qkv), surrounded(grad))
        wanted = with_gradient(lambda x: attention_reference(x, D**-0.5)[0], qkv.double(), grad.double())
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("T", "backward"), [(35, "triton"), (35, "triton_heads"), (66, "triton_heads")])
    def test_scores_far_below_zero_leave_no_nan(self, T, backward):
        """exp(0 - lse) of a key that is not there would be infinite."""
        qkv, grad = tensors(1, T, 1, 16)
        qkv[:, :, 0], qkv[:, :, 1] = 30, -30
        out, lse = _FORWARD["triton"](qkv, 0.25)
        dqkv = _BACKWARD[backward](grad, qkv, out, lse, 0.25)
        wanted = with_gradient(lambda x: attention_reference(x, 0.25)[0], qkv.double(), grad.double())
        torch.testing.assert_close(out.double(), wanted[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dqkv.double(), wanted[1], rtol=1e-3, atol=2e-2)

    def test_nan_stays_in_its_image_and_head(self):
        with _dispatch.forced("triton"):
            test_nan_stays_in_its_image_and_head()


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("T", [1, 64, 197, 256, 257, 261, 300])
    @pytest.mark.parametrize("D", [64, 80, 128])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_triton_matches_fp64(self, dtype, D, T):
        check(*tensors(2, T, 3, D, dtype, "cuda"), "triton", "triton")

    @pytest.mark.parametrize("T", [1, 64, 80, 81, 197, 256, 257, 261, 272])
    @pytest.mark.parametrize("D", [64, 40])
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_backward_by_heads_matches_fp64(self, dtype, D, T):
        check(*tensors(2, T, 3, D, dtype, "cuda"), "triton", "triton_heads")

    @pytest.mark.parametrize("forward", ["triton", "flash", "cudnn"])
    @pytest.mark.parametrize("backward", ["triton", "triton_heads", "flash", "cudnn"])
    @pytest.mark.parametrize("T", [197, 257])
    def test_ways_share_out_and_lse(self, forward, backward, T):
        qkv, grad = tensors(2, T, 4, 64, torch.bfloat16, "cuda")
        s = 64**-0.5
        out64, dqkv64 = with_gradient(lambda x: attention_reference(x, s)[0], qkv.double(), grad.double())
        out, lse = _FORWARD[forward](qkv, s)
        dqkv = _BACKWARD[backward](grad, qkv, out.contiguous(), lse.contiguous(), s)
        assert (out.double() - out64).norm() <= 4e-3 * out64.norm()
        assert (dqkv.double() - dqkv64).norm() <= 8e-3 * dqkv64.norm()

    @pytest.mark.parametrize("T", [1370, 4097])
    def test_long_sequences(self, T):
        check(*tensors(1, T, 2, 64, torch.bfloat16, "cuda"), "triton", "triton")

    def test_measured_choice_is_reported(self):
        qkv, grad = tensors(4, 261, 4, 64, torch.bfloat16, "cuda")
        with_gradient(attention, qkv, grad)
        rows = [row for row in _dispatch.report() if row.op.startswith("attention") and " T261 " in row.op]
        assert len(rows) == 2 and all(row.reason in ("measured", "pinned") for row in rows)

    def test_a_hundred_runs_give_one_answer(self):
        qkv, grad = tensors(4, 257, 4, 64, torch.bfloat16, "cuda")
        with _dispatch.forced("triton"):
            out, lse = attention_forward(qkv)
            first = attention_backward(grad, qkv, out, lse)
            for _ in range(100):
                assert torch.equal(attention_forward(qkv)[0], out)
                assert torch.equal(attention_backward(grad, qkv, out, lse), first)
        first = _BACKWARD["triton_heads"](grad, qkv, out, lse, 0.125)
        for _ in range(100):
            assert torch.equal(_BACKWARD["triton_heads"](grad, qkv, out, lse, 0.125), first)

    def test_graph_capture_forward_and_backward(self):
        qkv, grad = tensors(4, 257, 4, 64, torch.bfloat16, "cuda")
        qkv.requires_grad_()

        def step():
            out = attention(qkv)
            return out, torch.autograd.grad(out, qkv, grad)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            wanted = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)

    @pytest.mark.long
    def test_more_than_2_to_the_31_elements(self):
        B = 2**31 // (257 * 3 * 16 * 64) + 2
        qkv = torch.randn(B, 257, 3, 16, 64, device="cuda", dtype=torch.bfloat16)
        with _dispatch.forced("triton"):
            out, lse = attention_forward(qkv)
            wanted, wanted_lse = attention_forward(qkv[-1:])
        assert torch.equal(out[-1:], wanted) and torch.equal(lse[-1:], wanted_lse)


def test_backward_on_a_gpu_is_chosen_among_deterministic_forms(monkeypatch):
    # no GPU here: fake tensors of one, and the choice itself caught
    offered = {}

    def caught(problem, device, candidates):
        offered[problem.split()[0]] = list(candidates)
        raise StopIteration

    monkeypatch.setattr(op, "autotune", caught)
    monkeypatch.setattr(op, "triton_unsupported_reason", lambda *_: None)
    monkeypatch.setattr(launchers, "_shared_memory", lambda device: 232_448)
    with FakeTensorMode():
        qkv = torch.empty(2, 257, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
        for name, forms in (("attention", _FORWARD), ("attention_backward", _BACKWARD)):
            with pytest.raises(StopIteration):
                op._run(name, forms, qkv, ())
    assert offered == {
        "attention": ["flash", "cudnn", "triton"],
        "attention_backward": ["flash", "triton", "triton_heads"],
    }


@pytest.mark.parametrize(
    ("shape", "dtype", "shared", "fits"),
    [
        ((2, 272, 3, 4, 64), torch.bfloat16, 232_448, True),
        ((2, 273, 3, 4, 64), torch.bfloat16, 232_448, False),
        ((2, 257, 3, 4, 80), torch.bfloat16, 232_448, False),
        ((2, 257, 3, 4, 64), torch.float32, 232_448, False),
        ((2, 257, 3, 4, 64), torch.bfloat16, 166_912, False),  # sm_80
        ((2, 257, 3, 4, 64), torch.bfloat16, 101_376, False),  # sm_89
    ],
)
def test_backward_by_heads_is_offered_where_it_fits(monkeypatch, shape, dtype, shared, fits):
    monkeypatch.setattr(launchers, "_shared_memory", lambda device: shared)
    assert launchers.fits_heads(torch.empty(shape, dtype=dtype, device="meta")) is fits


def test_flash_backward_runs_in_its_deterministic_mode(monkeypatch):
    seen = []

    def backward(grad, q, k, v, *_, **__):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()))
        return q, k, v

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", backward)
    qkv, grad = tensors(2, 5, 3, 8)
    assert torch.equal(_BACKWARD["flash"](grad, qkv, grad, grad, 1.0), qkv)
    assert seen == [(True, 2)] and torch.get_deterministic_debug_mode() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "triton"])
def test_backward_gives_the_same_bits_each_time(name):
    qkv, grad = tensors(64, 257, 16, 64, torch.bfloat16, "cuda")
    out, lse = (t.contiguous() for t in _FORWARD[name](qkv, 0.125))
    first, *others = (_BACKWARD[name](grad, qkv, out, lse, 0.125) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_devices_tell_the_shared_memory_that_whole_heads_need():
    # no GPU here, and the type stub lacks it: the class itself
    properties = getattr(torch._C, "_CudaDeviceProperties", None)
    if properties is None:
        pytest.skip("torch was built without CUDA")
    assert hasattr(properties, "shared_memory_per_block_optin")
