"""layer_norm: every output and gradient against fp64, fp8 against quantize, the low-rank product against a matmul."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_matches, guarded_outputs, interpreting, sizes, surrounded
from torch import Tensor

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.layer_norm import (
    add_layer_norm,
    layer_norm,
    layer_norm_backward,
    layer_norm_backward_reference,
    layer_norm_forward,
    layer_norm_reference,
)
from upstep_fast.kernels.layer_norm.op import _backward_op, _op
from upstep_fast.kernels.quantize import MAX_ROW, dequantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = ("bare", "weight", "weight and bias", "residual", "all")
EPS = 1e-6


def tensors(M: int, K: int, dtype=torch.float32, form="all", device="cpu") -> dict[str, Tensor | None]:
    """x, residual, weight, bias (None where the form has none), and gradients of y and h."""
    generator = torch.Generator().manual_seed(M + 31 * K)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "x": 3 * draw(M, K) + 0.5,
        "residual": draw(M, K),
        "weight": 1 + 0.2 * draw(K),
        "bias": draw(K),
        "grad": draw(M, K),
        "grad_h": draw(M, K),
    }
    given = {
        "bare": (),
        "weight": ("weight",),
        "weight and bias": ("weight", "bias"),
        "residual": ("residual",),
        "all": ("residual", "weight", "bias"),
    }[form]
    optional = ("residual", "weight", "bias")
    return {k: None if k in optional and k not in given else v.to(device, dtype) for k, v in made.items()}


def run(function, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Outputs and gradients by name; `function` has the signature of the reference."""
    leaves = {k: t[k].clone().requires_grad_() for k in ("x", "residual", "weight", "bias") if t[k] is not None}
    full = {k: leaves.get(k) for k in ("x", "residual", "weight", "bias")}
    y, h = function(full["x"], full["weight"], full["bias"], EPS, full["residual"])
    outputs, grads = ([y, h], [t["grad"], t["grad_h"]]) if full["residual"] is not None else ([y], [t["grad"]])
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return {"y": y.detach(), "h": h.detach(), **{f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}}


def ours(x, weight, bias, eps, residual):
    if residual is None:
        return layer_norm(x, weight, bias, eps), x
    return add_layer_norm(x, residual, weight, bias, eps)


def eager(x, weight, bias, eps, residual):
    h = x if residual is None else x + residual
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h


def check(t: dict[str, Tensor | None]) -> None:
    # the norm's own input is the rounded stream, so that is what the oracle starts from
    rounded = dict(t)
    if t["residual"] is not None:
        rounded["x"], rounded["residual"] = t["x"] + t["residual"], torch.zeros_like(t["x"])
    oracle = run(layer_norm_reference, {k: None if v is None else v.double() for k, v in rounded.items()})
    plain = run(eager, t)
    with guarded_outputs():
        got = run(ours, {k: None if v is None else surrounded(v) for k, v in t.items()})
    if t["residual"] is not None and not (interpreting() and t["x"].dtype == torch.bfloat16):
        assert torch.equal(got["h"], t["x"] + t["residual"])
    for name in set(got) - {"h"}:
        # a fair yardstick is at least a correct rounding of each product: sums of rounded terms in eager
        assert_matches(got[name], oracle[name], plain[name], name=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(dtype, form):
    check(tensors(40, 70, dtype, form))


def check_forward(t: dict[str, Tensor | None], rank: int) -> None:
    """All that one pass gives, and the bare backward with the stream's gradient and fp8."""
    x, residual, dtype = t["x"], t["residual"], t["x"].dtype
    K = x.shape[1]
    a = (torch.randn(rank, K, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) / K**0.5).to(x)
    with guarded_outputs():
        guarded = (surrounded(x), surrounded(residual), surrounded(a))
        out = layer_norm_forward(guarded[0], EPS, residual=guarded[1], lora_a=guarded[2], fp8=True)
        without = layer_norm_forward(surrounded(x), EPS, residual=surrounded(residual), save_y=False, fp8=True)
        dx, q, scale = layer_norm_backward(
            surrounded(t["grad"]), surrounded(out.y), surrounded(out.rstd), surrounded(t["grad_h"]), fp8=True
        )
    # in 16 bit the inputs of s and dx are y as it was stored
    y64 = layer_norm_reference(out.h.double(), eps=EPS)[0]
    assert_matches(out.y, y64, name="y")
    assert_matches(out.s, out.y.double() @ a.double().T, out.y @ a.T, name="s")
    torch.testing.assert_close(out.mean.double(), out.h.double().mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        out.rstd.double(), (out.h.double().var(1, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=0
    )
    wanted = layer_norm_backward_reference(
        t["grad"].double(), out.y.double(), out.rstd.double(), grad_h=t["grad_h"].double()
    )
    assert_matches(dx, wanted, name="dx")
    assert without.y is None
    assert torch.equal(without.q.float(), out.q.float()) and torch.equal(without.scale, out.scale)
    for name, codes, row_scale, exact in (("q", out.q, out.scale, y64), ("dq", q, scale, wanted)):
        amax = exact.abs().amax(1, keepdim=True)
        bound = (exact.abs() / 16).maximum(amax / 448 * 2**-10) * (1 + 1e-5) + 1e-5 * amax
        assert ((dequantize(codes, row_scale, torch.float64) - exact).abs() <= bound).all(), name
    assert out.q.shape == x.shape and dtype == out.s.dtype


@pytest.mark.parametrize("rank", [1, 16, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_one_pass_gives(dtype, rank):
    check_forward(tensors(20, 90, dtype), rank)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4))[1:])
def test_subsets_of_gradients(needs):
    t = tensors(9, 8)
    wanted = run(ours, t)
    names = ("x", "residual", "weight", "bias")
    leaves = {k: t[k].clone().requires_grad_(need) for k, need in zip(names, needs, strict=True)}
    y, h = add_layer_norm(leaves["x"], leaves["residual"], leaves["weight"], leaves["bias"], EPS)
    pairs = [(o, g) for o, g in ((y, t["grad"]), (h, t["grad_h"])) if o.requires_grad]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, wanted[f"d{name}"])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("used", [["y"], ["h"], ["s"], ["y", "h", "s"]])
def test_gradcheck_of_what_is_used(used):
    t = tensors(3, 5, torch.float64)
    a = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [v.requires_grad_() for v in (t["x"], t["residual"], a)]

    def f(x, residual, a):
        out = layer_norm_forward(x, residual=residual, lora_a=a)
        return [getattr(out, name) for name in used]

    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("trained", ["residual", "a"])
def test_gradients_without_a_request_for_y(trained):
    g = torch.Generator().manual_seed(0)
    t = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in
         (("x", (3, 8)), ("residual", (3, 8)), ("a", (2, 8)))}  # fmt: skip
    leaf = t[trained].requires_grad_()
    layer_norm_forward(t["x"], residual=t["residual"], lora_a=t["a"], save_y=False).s.square().sum().backward()
    y = torch.nn.functional.layer_norm(t["x"] + t["residual"], (8,), eps=1e-6)
    (expected,) = torch.autograd.grad((y @ t["a"].T).square().sum(), leaf)
    torch.testing.assert_close(leaf.grad, expected)


def test_references_gradient():
    t = tensors(3, 5, torch.float64)
    leaves = [t[k].requires_grad_() for k in ("x", "weight", "bias", "residual")]
    assert torch.autograd.gradcheck(lambda x, w, b, r: layer_norm_reference(x, w, b, EPS, r), leaves)
    assert torch.autograd.gradcheck(lambda x, w, b, r: add_layer_norm(x, r, w, b, EPS), leaves)


def test_bytes_kept_for_backward():
    x = tensors(16, 64, torch.bfloat16, "bare")["x"].requires_grad_()
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer_norm(x)
    # x_hat, rstd and mean
    assert sum(kept.values()) == 16 * (2 * 64 + 4 + 4)


def test_weights_in_fp32_get_fp32_gradients():
    t = tensors(9, 8, torch.bfloat16)
    t["weight"], t["bias"] = t["weight"].float(), t["bias"].float()
    got = run(ours, t)
    assert got["y"].dtype == got["dx"].dtype == torch.bfloat16
    assert got["dweight"].dtype == got["dbias"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (8,), (2, 3, 8)])
def test_shapes(shape):
    x = torch.randn(shape, requires_grad=True)
    y, h = add_layer_norm(x, torch.ones_like(x))
    assert y.shape == h.shape == shape
    torch.testing.assert_close(y, F.layer_norm(x + 1, shape[-1:], eps=EPS) if x.numel() else x)
    (y + h).sum().backward()
    out = layer_norm_forward(x.detach(), lora_a=torch.zeros(2, shape[-1]), fp8=True)
    assert out.s.shape == (*shape[:-1], 2) and out.scale.shape == (*shape[:-1], 1) and out.rstd.shape == shape[:-1]
    assert layer_norm_backward(out.y, out.y, out.rstd, fp8=True)[1].shape == shape


def test_constant_rows_are_finite():
    x = torch.full((3, 8), 5.0, requires_grad=True)
    y = layer_norm(x)
    y.square().sum().backward()
    assert (y == 0).all() and x.grad.isfinite().all()


def test_nan_stays_in_its_row():
    x = torch.randn(4, 8)
    x[2, 3] = math.nan
    assert layer_norm(x).isnan().any(1).tolist() == [False, False, True, False]


def test_autocast_leaves_it_alone():
    t = tensors(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer_norm_forward(t["x"], lora_a=torch.ones(2, 8))
    assert out.y.dtype == out.s.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M", [5, 0])
def test_opcheck(M, form):
    t = tensors(M, 8, form=form)
    a = torch.randn(2, 8) if form == "residual" else None
    leaves = [v.requires_grad_() if v is not None else None for v in (t["x"], t["residual"], t["weight"], t["bias"], a)]
    torch.library.opcheck(_op, (*leaves, EPS, True, False))
    x, residual, weight, bias, a = (None if v is None else v.detach() for v in leaves)
    torch.library.opcheck(_op, (x, residual, weight, bias, a, EPS, False, True))
    stats = torch.ones(M)
    for sums, fp8 in ((weight is not None, False), (False, True)):
        torch.library.opcheck(_backward_op, (t["grad"].T.contiguous().T, x, stats, stats, weight, residual, sums, fp8))


def test_compiles_as_one_graph():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def f(x, weight, bias, eps, residual):
        return ours(x * 2, weight, bias, eps, residual)

    for M in (5, 9):
        t = tensors(M, 8)
        got, wanted = run(f, t), run(f._torchdynamo_orig_callable, t)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0)


X = torch.zeros(2, 8)
BAD = [
    (lambda: layer_norm(X.int()), r"layer_norm: x must be .* got \[2, 8\] in torch.int32"),
    (lambda: layer_norm(torch.zeros(())), r"layer_norm: x must be .* got \[\]"),
    (lambda: layer_norm(X, eps=0.0), "eps must be above 0, got 0.0"),
    (lambda: layer_norm(X, bias=X[0]), "bias wants a weight"),
    (lambda: layer_norm(X, torch.zeros(7)), r"weight must be \[8\] .* got \[7\]"),
    (lambda: layer_norm(X, X[0].half()), "weight must be .* got .* torch.float16"),
    (lambda: layer_norm(X, X[0].to("meta")), "weight must be .* on cpu .* on meta"),
    (lambda: add_layer_norm(X, X[:1]), r"add_layer_norm: residual must be \[2, 8\] .* got \[1, 8\]"),
    (lambda: layer_norm_forward(X, lora_a=torch.zeros(8)), r"lora_a must be \[1, 8\] .* got \[8\]"),
    (lambda: layer_norm_forward(X.double(), fp8=True), "x must be .* got .* torch.float64"),
    (lambda: layer_norm_backward(X, X, X), r"rstd must be \[2\] .* got \[2, 8\]"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_too_long_for_triton_say_so():
    layer_norm(torch.ones(1, MAX_ROW + 1))
    row = next(row for row in _dispatch.report() if row.op == "layer_norm")
    assert row.implementation == "reference" and f"rows of {MAX_ROW + 1} cells" in row.reason


@pytest.mark.interp
@pytest.mark.usefixtures("triton")
class TestInterpreted:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_fp64(self, dtype, form):
        check(tensors(40, 70, dtype, form))

    @pytest.mark.parametrize(("rank", "dtype"), [(1, torch.float32), (20, torch.float16), (16, torch.bfloat16)])
    def test_all_that_one_pass_gives(self, rank, dtype):
        check_forward(tensors(20, 90, dtype), rank)

    def test_a_rank_too_wide_to_fuse(self):
        check_forward(tensors(20, 90), 70)

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(sizes(70), sizes(130, low=2), st.sampled_from(FORMS))
    def test_any_shape(self, M, K, form):
        t = tensors(M, K, form=form)
        got, wanted = (
            run(ours, t),
            run(layer_norm_reference, {k: None if v is None else v.double() for k, v in t.items()}),
        )
        for name in wanted:
            torch.testing.assert_close(got[name].double(), wanted[name], rtol=1e-4, atol=1e-4)

    def test_constant_rows_are_finite(self):
        test_constant_rows_are_finite()

    def test_nan_stays_in_its_row(self):
        test_nan_stays_in_its_row()


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
class TestGpu:
    @pytest.mark.parametrize("shape", [(1, 64), (1003, 768), (517, 1024), (129, 1408), (65, 6144), (3, MAX_ROW)])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_fp64(self, dtype, form, shape):
        check(tensors(*shape, dtype, form, device="cuda"))

    @pytest.mark.parametrize("shape", [(1, 64), (1003, 768), (517, 1024), (129, 1536), (65, 4096)])
    @pytest.mark.parametrize("rank", [1, 16, 64, 70])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_all_that_one_pass_gives(self, dtype, rank, shape):
        check_forward(tensors(*shape, dtype, device="cuda"), rank)

    def test_a_hundred_runs_give_one_answer(self):
        t = tensors(1003, 1024, torch.bfloat16, device="cuda")
        first = run(ours, t)
        for _ in range(100):
            again = run(ours, t)
            assert all(torch.equal(again[name], first[name]) for name in first)

    def test_graph_capture_forward_and_backward(self):
        t = tensors(64, 1024, torch.bfloat16, device="cuda")
        x, w, b = (t[k].requires_grad_() for k in ("x", "weight", "bias"))

        def step():
            return torch.autograd.grad(layer_norm(x, w, b), (x, w, b), t["grad"])

        wanted = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    @pytest.mark.long
    def test_more_than_2_to_the_31_cells(self):
        x = torch.randn(2**31 // 1024 + 64, 1024, device="cuda", dtype=torch.bfloat16)
        a = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
        out, wanted = (layer_norm_forward(rows, lora_a=a) for rows in (x, x[-64:]))
        assert torch.equal(out.y[-64:], wanted.y) and torch.equal(out.s[-64:], wanted.s)
