"""low_rank_mixer: value and every gradient against fp64, by the library's products; bytes kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_matches, guarded_outputs, surrounded
from torch import Tensor

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.low_rank_mixer import low_rank_mixer, low_rank_mixer_reference
from upstep_fast.kernels.low_rank_mixer.op import _backward_op, _op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = (("channel",), ("token",), ("channel", "token"), ("token", "channel"))
CLIPS = (("channel", "space", "time"), ("time", "channel"))
# combine, whether there is a scale
FORMS = (("sum", False), ("sum", True), ("replace", True), ("gated", False), ("gated", True))


@dataclass
class Problem:
    b: Tensor
    a: Tensor
    axes: tuple[str, ...]
    factors: list[Tensor]
    combine: str
    frames: int
    gate: Tensor | None
    scale: Tensor | None
    grad: Tensor

    def to(self, f) -> Problem:
        one = [None if t is None else f(t) for t in (self.b, self.a, self.gate, self.scale, self.grad)]
        factors = [f(t) for t in self.factors]
        return Problem(one[0], one[1], self.axes, factors, self.combine, self.frames, one[2], one[3], one[4])


def problem(
    axes, form=("sum", False), dtype=torch.float32, P=6, N=5, D=8, ranks=(3, 2), frames=1, device="cpu"
) -> Problem:
    generator = torch.Generator().manual_seed(P + 31 * N + 57 * D)

    def draw(*shape, std=1.0):
        return std * torch.randn(shape, generator=generator, dtype=torch.float64)

    factors = []
    for axis in axes:
        n, r = {"channel": (D, ranks[0]), "time": (frames, ranks[1])}.get(axis, (N, ranks[1]))
        factors += [draw(r, n, std=max(n, 1) ** -0.5), draw(r, std=0.3), draw(n, r, std=r**-0.5), draw(n, std=0.3)]
    combine, scaled = form
    gate = draw() if combine == "gated" else None
    scale = 1 + draw(std=0.2) if scaled else None
    made = Problem(2 * draw(P, N, D) + 0.3, draw(P, N, D), axes, factors, combine, frames, gate, scale, draw(P, N, D))
    return made.to(lambda t: t.to(device, dtype))


def run(function, t: Problem) -> dict[str, Tensor]:
    """The output and the gradients by name."""
    names = ["a", "gate", "scale"] + [f"{name} of {axis}" for axis in t.axes for name in ("W1", "c1", "W2", "c2")]
    leaves = [None if x is None else x.clone().requires_grad_() for x in (t.a, t.gate, t.scale, *t.factors)]
    out = function(t.b, leaves[0], t.axes, leaves[3:], t.combine, t.frames, leaves[1], leaves[2])
    given = {name: leaf for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
    gradients = torch.autograd.grad(out, list(given.values()), t.grad)
    return {"out": out.detach(), **dict(zip(given, gradients, strict=True))}


def eager(b, a, axes, factors, combine, frames, gate, scale):
    """What one would write for images, in the type of b."""
    u = x = b + a if gate is None else gate.sigmoid() * b + (1 - gate.sigmoid()) * a
    for i, axis in enumerate(axes):
        down, down_bias, up, up_bias = factors[4 * i : 4 * i + 4]
        x_hat = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x_hat = x_hat if axis == "channel" else x_hat.mT
        change = F.linear(F.gelu(F.linear(x_hat, down, down_bias)), up, up_bias)
        x = x + (change if axis == "channel" else change.mT)
    return (b if combine == "replace" else a) + (x - u if scale is None else scale * (x - u))


def check(t: Problem) -> None:
    oracle, plain = run(low_rank_mixer_reference, t.to(Tensor.double)), run(eager, t)
    with guarded_outputs():
        got = run(low_rank_mixer, t.to(surrounded))
    eps = torch.finfo(t.b.dtype).eps
    for name, wanted in oracle.items():
        if t.b.dtype == torch.float32 and wanted.dim() == 3:
            assert_matches(got[name], wanted, plain[name], name=name)
        # beside eager only, which rounds u, low and d_low in 16 bit as this does; a scalar's sum may cancel
        error, of_eager = ((r[name].double() - wanted).norm() / wanted.norm() for r in (got, plain))
        assert got[name].dtype == t.b.dtype and got[name].shape == wanted.shape
        slack = 4 if wanted.dim() else 16
        assert error <= 2 * of_eager + slack * eps, f"{name}: {error:.1e}, eager {of_eager:.1e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64(dtype, axes, form):
    check(problem(axes, form, dtype, N=13, D=30))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("axes", "frames"), [*((axes, 1) for axes in ORDERS), *((axes, 3) for axes in CLIPS)])
def test_gradient_is_that_of_the_formula(axes, frames, form):
    t = problem(axes, form, torch.float64, frames=frames)
    got, wanted = run(low_rank_mixer, t), run(low_rank_mixer_reference, t)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-10, atol=1e-10, msg=name)


def test_gradcheck():
    t = problem(("token", "channel"), ("gated", True), torch.float64, P=2, N=3, D=4)
    leaves = [x.requires_grad_() for x in (t.a, t.gate, t.scale, *t.factors)]
    for function in (low_rank_mixer, low_rank_mixer_reference):
        assert torch.autograd.gradcheck(
            lambda a, gate, scale, *factors, f=function: f(t.b, a, t.axes, factors, "gated", 1, gate, scale), leaves
        )


def test_factors_in_fp32_get_fp32_gradients():
    t = problem(("channel", "token"), dtype=torch.bfloat16)
    t.factors = [f.float() for f in t.factors]
    got = run(low_rank_mixer, t)
    assert got["out"].dtype == got["a"].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for name, g in got.items() if " of " in name)


@pytest.mark.parametrize("axes", ORDERS)
def test_subsets_of_gradients(axes, P=6):
    t = problem(axes, ("gated", True), P=P)
    wanted = run(low_rank_mixer, t)
    for name, index in (("a", 0), ("gate", 1), ("scale", 2), (f"W2 of {axes[0]}", 5)):
        leaves = [x.clone() for x in (t.a, t.gate, t.scale, *t.factors)]
        leaves[index].requires_grad_()
        low_rank_mixer(t.b, leaves[0], axes, leaves[3:], "gated", 1, leaves[1], leaves[2]).backward(t.grad)
        torch.testing.assert_close(leaves[index].grad, wanted[name], rtol=1e-4, atol=1e-5)
        assert sum(leaf.grad is not None for leaf in leaves) == 1


@pytest.mark.parametrize("shape", [(0, 5, 8), (6, 0, 8), (6, 5, 0)])
def test_nothing_to_mix(shape):
    t = problem(("channel", "token"), P=shape[0], N=shape[1], D=shape[2])
    got = run(low_rank_mixer, t)
    assert got["out"].shape == got["a"].shape == shape
    assert all(g.isfinite().all() for g in got.values())


@pytest.mark.parametrize("ranks", [(1, 1), (64, 64), (70, 2)])
def test_any_rank(ranks):
    check(problem(("channel", "token"), ranks=ranks))


def test_any_strides():
    t = problem(("channel", "token"))
    wanted = run(low_rank_mixer, t)
    t.b, t.a, t.grad = (x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (t.b, t.a, t.grad))
    t.factors = [f.T.contiguous().T if f.dim() == 2 else f for f in t.factors]
    got = run(low_rank_mixer, t)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=name)
    t.a = t.b.new_zeros(()).expand_as(t.b)  # LoSA's a_0
    torch.testing.assert_close(run(low_rank_mixer, t)["out"], run(low_rank_mixer_reference, t)["out"])


def test_nan_stays_where_the_formula_leaves_it():
    t = problem(("channel",))
    t.b[2, 3, 1] = math.nan
    out = run(low_rank_mixer, t)["out"].isnan()
    assert out[2, 3].all() and out.sum() == out.shape[2]
    t = problem(("channel", "token"))
    t.b[2, 3, 1] = math.nan
    got = run(low_rank_mixer, t)
    out = got["out"].isnan()
    assert out[2].all() and not out[[0, 1, 3, 4, 5]].any()
    assert got["W1 of channel"].isnan().any() and got["a"].isnan().any((1, 2)).tolist() == [i == 2 for i in range(6)]


def test_constant_rows_are_finite():
    t = problem(("channel", "token"))
    t.b, t.a = torch.full_like(t.b, 5.0), torch.zeros_like(t.a)
    assert all(g.isfinite().all() for g in run(low_rank_mixer, t).values())


def test_autocast_leaves_it_alone():
    t = problem(("channel", "token"))
    with torch.autocast("cpu", torch.bfloat16):
        got = run(low_rank_mixer, t)
    for name, wanted in run(low_rank_mixer, t).items():
        assert torch.equal(got[name], wanted)


def test_bytes_kept_for_backward():
    t = problem(("channel", "token"), dtype=torch.bfloat16, N=17, D=64)
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    factors = [f.requires_grad_() for f in t.factors]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        low_rank_mixer(t.b, t.a, t.axes, factors)
    of_factors = sum(2 * f.numel() for f in factors)
    # u, r values a token, s D / N values a token
    assert sum(kept.values()) == 2 * 6 * (17 * 64 + 17 * 3 + 2 * 64) + of_factors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("axes", "frames"), [(("channel", "token"), 1), (CLIPS[0], 3)])
def test_opcheck(axes, frames, form):
    t = problem(axes, form, frames=frames)
    names = " ".join(axes)
    leaves = [None if x is None else x.requires_grad_() for x in (t.a, t.gate, t.scale, *t.factors)]
    torch.library.opcheck(_op, (t.b, leaves[0], names, t.combine, frames, leaves[1], leaves[2], leaves[3:]))
    with torch.no_grad():
        gate, scale, *factors = (None if x is None else x.detach() for x in leaves[1:])
        _, u, difference, lows = _op(t.b, t.a.detach(), names, t.combine, frames, gate, scale, factors)
        grad = t.grad.mT.contiguous().mT
        for needs_da in (True, False):
            args = (grad, u, difference, lows, names, t.combine, frames, gate, scale, factors, needs_da)
            torch.library.opcheck(_backward_op, args)


def test_compiles_as_one_graph():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def f(b, *args):
        return low_rank_mixer(b * 2, *args)

    for P in (3, 5):
        t = problem(("channel", "token"), ("gated", True), P=P)
        got, wanted = run(f, t), run(f._torchdynamo_orig_callable, t)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0)


T = problem(("channel", "token"))


def call(b=T.b, a=T.a, axes=T.axes, factors=T.factors, **kwargs):
    return low_rank_mixer(b, a, axes, factors, **kwargs)


BAD = [
    (lambda: call(T.b[0]), r"low_rank_mixer: b must be \[P, N, D\] .* got \[5, 8\]"),
    (lambda: call(T.b.int()), "b must be .* got .* torch.int32"),
    (lambda: call(T.b.clone().requires_grad_()), "b must need no gradient .* got one that does"),
    (lambda: call(a=T.a[:1]), r"a must be \[6, 5, 8\] .* got \[1, 5, 8\]"),
    (lambda: call(a=T.a.half()), "a must be .* got .* torch.float16"),
    (lambda: call(axes=("channel", "tokens")), "axes must be one or more of channel, .* got 'channel', 'tokens'"),
    (lambda: call(axes=()), "axes must be .* got none"),
    (lambda: call(factors=T.factors[:7]), "factors must be 4 for each of 2 axes, got 7"),
    (lambda: call(axes=("token", "channel")), r"W1 of token must be \[3, 5\] .* got \[3, 8\]"),
    (lambda: call(factors=[*T.factors[:7], T.factors[6]]), r"c2 of token must be \[5\] .* got \[5, 2\]"),
    (lambda: call(combine="add"), "combine must be one of sum, replace, gated, got 'add'"),
    (lambda: call(combine="gated"), "gate must be given for combine 'gated' and for no other, got no gate for 'gated'"),
    (lambda: call(gate=torch.ones(())), "gate must be given for .* got a gate for 'sum'"),
    (lambda: call(scale=torch.ones(1)), r"scale must be \[\] .* got \[1\]"),
    (lambda: call(frames=4), "frames must divide the 6 of b's first dimension, got 4"),
    (lambda: call(frames=0), "frames must divide .* got 0"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


@pytest.mark.parametrize("request_", [None, "reference", "triton", "cuda"])
def test_the_one_form_is_in_the_report_whatever_is_requested(request_):
    _dispatch.forget()
    with _dispatch.forced(request_):
        run(low_rank_mixer, problem(("channel", "token")))
    rows = {row.op: row.implementation for row in _dispatch.report() if row.op.startswith("low_rank_mixer")}
    assert rows == dict.fromkeys(("low_rank_mixer", "low_rank_mixer_backward"), "reference")


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize(("N", "D", "ranks"), [(197, 768, (16, 16)), (65, 192, (1, 32)), (257, 1001, (32, 8))])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("axes", ORDERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_fp64(self, dtype, axes, form, N, D, ranks):
        check(problem(axes, form, dtype, P=9, N=N, D=D, ranks=ranks, device="cuda"))

    @pytest.mark.parametrize("axes", ORDERS)
    def test_a_hundred_runs_give_one_answer(self, axes):
        t = problem(axes, ("gated", True), torch.bfloat16, 32, 197, 768, (16, 16), device="cuda")
        first = run(low_rank_mixer, t)
        for _ in range(100):
            again = run(low_rank_mixer, t)
            assert all(torch.equal(again[name], first[name]) for name in first)

    def test_graph_capture_forward_and_backward(self):
        t = problem(("channel", "token"), ("sum", False), torch.bfloat16, 8, 197, 768, (16, 16), device="cuda")
        wanted = run(low_rank_mixer, t)
        leaves = [f.clone().requires_grad_() for f in t.factors]

        def step():
            return torch.autograd.grad(low_rank_mixer(t.b, t.a, t.axes, leaves), leaves, t.grad)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
        names = [name for name in wanted if " of " in name]
        assert all(torch.equal(g, wanted[name]) for name, g in zip(names, got, strict=True))
