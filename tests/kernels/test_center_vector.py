"""center_vector: each implementation against the fp64 reference, the identities of METHODS 1.2, the gate's rules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_matches, guarded_outputs, laid_out, sizes, surrounded
from torch import Tensor

from upstep_fast.kernels import _dispatch, _native
from upstep_fast.kernels import center_vector as cv
from upstep_fast.kernels.gate import CELLS, HEAD, RULES, gate_values, new_gate_flag, new_gate_state
from upstep_fast.methods.gate import GateRule, GateState, decide

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)

no_library = pytest.mark.skipif(_native.load_failure() is not None, reason=str(_native.load_failure()))
IMPLEMENTATIONS = (
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpp", "cpu"), id="cpp", marks=no_library),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
)


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request) -> str:
    """The device of an implementation, which is forced for the test."""
    implementation, device = request.param
    with _dispatch.forced(implementation):
        yield device


def embeddings(rows: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu", pull: float = 0.5) -> Tensor:
    """Rows of many lengths about a common direction, so that the center is neither 0 nor 1 long."""
    generator = torch.Generator().manual_seed(rows * 4099 + d)
    lengths = torch.rand(rows, 1, generator=generator) + 0.5
    common = torch.randn(1, d, generator=generator)
    return ((torch.randn(rows, d, generator=generator) + pull * common) * lengths).to(device, dtype)


def eager(u: Tensor) -> tuple[Tensor, Tensor]:
    """z and s as anyone would write them."""
    z = F.normalize(u.float(), dim=1)
    return z, z.mean(0)


def with_gradient(function, u: Tensor, grads: tuple[Tensor | None, Tensor | None]) -> list[Tensor]:
    """z, s and dL/du for the gradients of z and s that are given."""
    leaf = u.detach().requires_grad_()
    z, s = function(leaf)
    outputs = [(t, g.to(t.dtype)) for t, g in zip((z, s), grads, strict=True) if g is not None]
    (grad,) = torch.autograd.grad([t for t, _ in outputs], leaf, [g for _, g in outputs])
    return [z.detach(), s.detach(), grad]


def update(u: Tensor, num_views: int = 1) -> tuple[Tensor, Tensor]:
    return cv.center_vector_update(u, new_gate_state(u.shape[1], u.device), num_views=num_views)[:2]


def oracle(u: Tensor, num_views: int = 1) -> tuple[Tensor, Tensor]:
    return cv.center_vector_reference(u, new_gate_state(u.shape[1], u.device), num_views=num_views)[:2]


def check(u: Tensor, num_views: int = 1) -> None:
    """Values and gradients under RELIABILITY's three conditions, guard cells around all that is read or written."""
    generator = torch.Generator().manual_seed(u.shape[0])
    grad_z = torch.randn(u.shape, generator=generator).to(u.device)
    # as large for a row as the gradient of z
    grad_s = len(u) * torch.randn(u.shape[1], generator=generator).to(u.device)
    for grads in ((grad_z, grad_s), (grad_z, None), (None, grad_s)):
        want = with_gradient(lambda x: oracle(x, num_views), u.double(), grads)
        plain = with_gradient(eager, u, grads)
        with guarded_outputs():
            got = with_gradient(
                lambda x: update(x, num_views), surrounded(u), tuple(g if g is None else surrounded(g) for g in grads)
            )
        for name, g, w, p in zip(("z", "s", "du"), got, want, plain, strict=True):
            assert_matches(g, w, p, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "d", "num_views"),
    [
        (2, 3, 1),
        (2, 2, 2),
        (6, 7, 2),
        (256, 128, 2),
        (64, 192, 1),
        (130, 257, 2),
        (40, 1000, 2),
        (8, 1028, 2),
        (6, 4096, 2),
    ],
)
def test_matches_the_reference(device, rows, d, num_views, dtype):
    check(embeddings(rows, d, dtype, device), num_views)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(images=sizes(70), d=sizes(300, 2), num_views=st.integers(1, 2), dtype=st.sampled_from(DTYPES))
@no_library
def test_any_shape(images, d, num_views, dtype):
    with _dispatch.forced("cpp"):
        check(embeddings(images * num_views, d, dtype), num_views)


@pytest.mark.parametrize("layout", ["slice", "transpose"])
def test_strided_input(device, layout):
    check(laid_out(embeddings(12, 24, device=device), layout), 2)


def test_float64_runs_the_reference():
    u = embeddings(6, 5).double()
    z, s = update(u)
    assert z.dtype == s.dtype == torch.float64
    assert torch.equal(z, oracle(u)[0])


def test_width_of_one(device):
    """z is the sign of u, and nothing pulls on it."""
    u = torch.tensor([[2.0], [-3.0], [0.5], [7.0]], device=device).requires_grad_()
    z, s = update(u, 2)
    assert torch.equal(z, u.detach().sign())
    assert s.tolist() == [0.5]
    (z.sum() + s.sum()).backward()
    torch.testing.assert_close(u.grad, torch.zeros_like(u), rtol=0, atol=1e-6)


def test_gradcheck():
    u = embeddings(6, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: oracle(x, 2), u)
    assert torch.autograd.gradcheck(lambda x: cv.partial_reference(x, num_views=2)[1][:-2], u)


def test_jacobian_by_hand(device):
    """lambda |s|^2: du = 2 lambda / rows (I - z z^T) s / |u| (METHODS 1.2), by autograd and by the direct call."""
    u, lam = embeddings(10, 4, device=device).requires_grad_(), 0.7
    out = cv.center_vector_update(u, new_gate_state(4, device))
    (lam * out.center.square().sum()).backward()
    z = u.detach().double() / u.detach().double().norm(dim=1, keepdim=True)
    s = z.mean(0)
    want = 2 * lam / 10 * (s - z * (z @ s)[:, None]) / u.detach().double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(u.grad.double(), want, rtol=1e-5, atol=1e-8)
    direct = cv.center_vector_backward(None, out.center.detach(), 2 * lam / 10, out.z.detach(), out.inv_norm, u.dtype)
    torch.testing.assert_close(direct.double(), want, rtol=1e-5, atol=1e-8)


def test_rows_without_a_direction_or_out_of_range(device):
    u = embeddings(8, 16, device=device)
    scale = torch.tensor([0.0, 1e-38, 1e-44, 1e30, 1e37, 1.0, 1.0, 1.0], device=device)[:, None]
    u = (u * scale).requires_grad_()
    z, s = update(u)
    want = oracle(u.detach().double())[0]
    torch.testing.assert_close(z.double(), want, rtol=1e-6, atol=1e-7)
    assert torch.equal(z[0], torch.zeros_like(z[0]))
    (z.sum() + s.sum()).backward()
    assert torch.equal(u.grad[0], torch.zeros_like(z[0]))
    # the gradient of the row of 1e-44 is longer than any fp32
    assert u.grad[[0, 1, 3, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_in_gives_nan_out_and_a_closed_gate(device, bad):
    u, state = embeddings(6, 8, device=device), new_gate_state(8, device)
    before = cv.center_vector_update(u, state, num_views=2).state
    u[3, 2] = bad
    out = cv.center_vector_update(u, before, num_views=2)
    assert out.z[3].isnan().all() and out.z[[0, 1, 2, 4, 5]].isfinite().all()
    assert out.center.isnan().all()
    values, old = gate_values(out.state), gate_values(before)
    assert (values["open"], values["finite"], values["skips"], values["step"]) == (0, 0, 1, 2)
    assert values["reference"] == old["reference"]
    assert torch.equal(out.state[HEAD:], before[HEAD:])


# METHODS 1.2


def test_distance_of_views_is_the_shortness_of_their_mean(device):
    """E|z1 - z2|^2 = 4 (1 - E|z_bar|^2)."""
    z, sums, _ = cv.center_vector_partial(embeddings(40, 6, device=device), num_views=2)
    distance = (z[:20] - z[20:]).double().square().sum(1).mean()
    torch.testing.assert_close(distance, 4 * (1 - sums[-2] / sums[-1]), rtol=1e-6, atol=1e-6)


def test_center_and_spread_add_up(device):
    """E|z_bar|^2 = |s|^2 + tr Cov(z_bar)."""
    u = embeddings(60, 6, device=device)
    z, sums, _ = cv.center_vector_partial(u, num_views=2)
    zbar = (z[:30] + z[30:]).double() / 2
    trace = (zbar - zbar.mean(0)).square().sum(1).mean()
    m = gate_values(cv.center_vector_update(u, new_gate_state(6, device), num_views=2).state)["magnitude"]
    torch.testing.assert_close(sums[-2] / sums[-1], m**2 + trace, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_views", [1, 2])
def test_unbiased_magnitude(device, num_views):
    """Over many small batches the unbiased square meets the truth; the plain one is (1 - |s|^2) / B too long."""
    torch.manual_seed(0)
    d, B, batches = 8, 16, 400
    pull = torch.zeros(d)
    pull[0] = 1.0

    def sample(count: int) -> Tensor:
        image = torch.randn(1, count, d) + pull
        return (image + 0.3 * torch.randn(num_views, count, d)).flatten(0, 1)

    truth = float(F.normalize(sample(200_000), dim=1).mean(0).square().sum())
    states = [cv.center_vector_update(sample(B).to(device), new_gate_state(d, device), num_views=num_views).state
              for _ in range(batches)]  # fmt: skip
    cells = torch.stack(states)[:, :HEAD].cpu()
    unbiased, plain = cells[:, CELLS.index("unbiased_square")], cells[:, CELLS.index("magnitude")].square()
    error = float(unbiased.std()) / math.sqrt(batches)
    assert abs(float(unbiased.mean()) - truth) < 4 * error
    assert float(plain.mean()) - truth > 8 * error


# the gate


def magnitudes(steps: int) -> Tensor:
    """[steps, 2]: of the views; drifting, with noise, and now and then not finite."""
    generator = torch.Generator().manual_seed(3)
    m = 0.4 + 0.05 * torch.randn(steps, 2, generator=generator, dtype=torch.float64)
    m -= torch.linspace(0, 0.2, steps, dtype=torch.float64)[:, None]
    m[[5, 40], 0] = torch.nan
    m[60, 1] = torch.inf
    return m


@pytest.mark.parametrize("update_when", ["low", "high"])
@pytest.mark.parametrize("rule", RULES)
def test_gate_decides_as_the_rule_on_the_host(device, rule, update_when):
    """The oracle is upstep_fast.gate: the same magnitudes, one after the other."""
    host_rule = GateRule(rule, update_when=update_when, rate=0.3, beta=0.8, max_skips=4)
    host, state = GateState(), new_gate_state(1, device)
    arguments = {"rule": rule, "update_when": update_when, "rate": 0.3, "beta": 0.8, "max_skips": 4}
    opened = []
    for m1, m2 in magnitudes(120).tolist():
        # a width of 1 makes the magnitude any number one likes
        sums = torch.tensor([m1, m2, 1.0, 1.0], dtype=torch.float64, device=device)
        _, state = cv.center_vector_finish(sums, state, num_views=2, **arguments)
        is_open, host = decide(host_rule, host, ((m1 + m2) / 2, m1, m2))
        got = gate_values(state)
        opened.append(is_open)
        assert (got["open"], got["step"], got["opened"], got["skips"]) == (
            is_open,
            host.step,
            host.num_updates,
            host.skips,
        )
        assert got["finite"] == math.isfinite(m1 + m2)
        if host.reference is not None:
            assert got["reference"] == pytest.approx(host.reference, rel=1e-12)
            assert got["spread"] == pytest.approx(host.spread, rel=1e-12)
            assert got["debt"] == pytest.approx(host.debt, rel=1e-12)
    assert rule == "none" or 20 < sum(opened) < 100  # both answers were met


def test_running_center(device):
    beta, state, want = 0.7, new_gate_state(5, device), None
    for step in range(4):
        out = cv.center_vector_update(embeddings(8, 5, device=device, pull=step), state, center_beta=beta)
        s, state = out.center.double(), out.state
        want = s if want is None else beta * want + (1 - beta) * s
        torch.testing.assert_close(state[HEAD:], want, rtol=1e-6, atol=1e-7)


def test_magnitude_of_each_view(device):
    u = embeddings(14, 6, device=device)
    values = gate_values(cv.center_vector_update(u, new_gate_state(6, device), num_views=2).state)
    z = eager(u)[0].double()
    assert values["view_1"] == pytest.approx(float(z[:7].mean(0).norm()), rel=1e-6)
    assert values["view_2"] == pytest.approx(float(z[7:].mean(0).norm()), rel=1e-6)
    assert values["magnitude"] == pytest.approx(float(z.mean(0).norm()), rel=1e-6)


@no_library
def test_flag_tells_the_decision(device):
    flag, state = new_gate_flag(device), new_gate_state(6, device)
    assert flag.sequence == 0
    for step in range(1, 6):
        u = embeddings(8, 6, device=device, pull=step % 3)
        if step == 4:
            u[0, 0] = math.nan
        state = cv.center_vector_update(u, state, flag=flag.address).state
        is_open, is_finite = flag.wait(step)
        values = gate_values(state)
        assert (values["step"], values["open"], values["finite"]) == (step, is_open, is_finite)


# several ranks


def test_split_form_is_the_whole(device):
    """Two ranks with 5 and 3 images, one with none: sums, then finish; gradients too."""
    u = embeddings(16, 12, device=device)
    shares = [u[[*range(a, b), *range(8 + a, 8 + b)]].clone().requires_grad_() for a, b in ((0, 5), (5, 8), (8, 8))]
    whole, state = u.clone().requires_grad_(), new_gate_state(12, device)
    out = cv.center_vector_update(whole, state, num_views=2)
    parts = [cv.center_vector_partial(share, num_views=2) for share in shares]
    center, next_state = cv.center_vector_finish(sum(p[1] for p in parts), state, num_views=2)
    torch.testing.assert_close(center, out.center, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(next_state, out.state, rtol=1e-6, atol=1e-7)
    g = torch.randn_like(u)
    (out.center.square().sum() + (out.z * g).sum()).backward()
    loss = center.square().sum()
    for (z, _, _), rows in zip(parts, (range(5), range(5, 8), ()), strict=True):
        loss = loss + (z * g[[*rows, *(8 + r for r in rows)]]).sum()
    loss.backward()
    back = torch.cat([s.grad[: len(s) // 2] for s in shares] + [s.grad[len(s) // 2 :] for s in shares])
    torch.testing.assert_close(back, whole.grad, rtol=1e-5, atol=1e-7)


def test_no_image_on_any_rank_is_not_finite(device):
    _, sums, _ = cv.center_vector_partial(torch.empty(0, 4, device=device))
    center, state = cv.center_vector_finish(sums, new_gate_state(4, device))
    assert center.isnan().all() and gate_values(state)["finite"] == 0


# determinism


def bits(u: Tensor, num_views: int = 2) -> list[Tensor]:
    out = cv.center_vector_update(u, new_gate_state(u.shape[1], u.device), num_views=num_views)
    grad = cv.center_vector_backward(out.z, out.center, 0.1, out.z, out.inv_norm, u.dtype)
    return [*out[:2], out.state[CELLS.index("magnitude")], out.inv_norm, grad]


@no_library
def test_bits_do_not_depend_on_the_number_of_threads():
    u, threads, seen = embeddings(3000, 65), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(bits(u))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@given(seed=st.integers(0, 99), images=st.integers(1, 40))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_order_of_images_does_not_matter(seed, images):
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    u = embeddings(2 * images, 9)
    z, s, *_ = bits(u)
    z2, s2, *_ = bits(u[torch.cat([order, images + order])])
    assert torch.equal(z[torch.cat([order, images + order])], z2)
    torch.testing.assert_close(s2, s, rtol=1e-6, atol=1e-7)


# torch's machinery


@pytest.mark.parametrize("rows", [8, 4])
def test_opcheck(device, rows):
    u, state = embeddings(rows, 6, device=device), new_gate_state(6, device)
    state = cv.center_vector_update(u + 1, state, num_views=2).state
    gate = (2, "ema", "low", 0.9, 0.5, 16, 0.9, 0)
    z, sums, inv_norm = cv.center_vector_partial(u, num_views=2)
    for t in (u, u.T.contiguous().T):
        torch.library.opcheck(cv._op, (t.detach().requires_grad_(), state, *gate))
        torch.library.opcheck(cv._partial_op, (t.detach().requires_grad_(), 2))
    torch.library.opcheck(cv._partial_op, (u[:0].detach().requires_grad_(), 2))
    torch.library.opcheck(cv._finish_op, (sums.detach().requires_grad_(), state, *gate))
    for grad_z, grad_sums in itertools.product((z.clone(), None), (z[:2].clone(), z[:1].clone(), None)):
        torch.library.opcheck(cv._backward_op, (grad_z, grad_sums, 0.5, z, inv_norm, torch.float16))


def test_compiles_whole(device):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(u, state):
        out = cv.center_vector_update(u, state, num_views=2)
        return out.center.square().sum() + (out.z * out.z.detach().cos()).sum(), out.state

    for rows in (8, 12):
        u, state = embeddings(rows, 6, device=device).requires_grad_(), new_gate_state(6, device)
        loss, next_state = step(u, state)
        loss.backward()
        leaf = u.detach().requires_grad_()
        out = cv.center_vector_update(leaf, state, num_views=2)
        (out.center.square().sum() + (out.z * out.z.detach().cos()).sum()).backward()
        assert torch.equal(next_state, out.state)
        torch.testing.assert_close(u.grad, leaf.grad)


def test_only_z_and_center_carry_gradient():
    u = embeddings(6, 4).requires_grad_()
    out = cv.center_vector_update(u, new_gate_state(4))
    assert [t.requires_grad for t in out] == [True, True, False, False]
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.state.sum().backward()


def test_state_is_left_as_it_was(device):
    state = new_gate_state(4, device)
    before = state.clone()
    cv.center_vector_update(embeddings(6, 4, device=device), state)
    assert torch.equal(state.view(torch.int64), before.view(torch.int64))


def test_what_was_asked_for_but_cannot_run_is_refused():
    with _dispatch.forced("cuda"), pytest.raises(RuntimeError, match=r"'cuda' was requested .* needs CUDA tensors"):
        update(embeddings(4, 4))


@no_library
def test_choice_is_reported():
    update(embeddings(4, 4))
    row = next(c for c in _dispatch.report() if (c.op, c.device) == ("center_vector", "cpu"))
    assert row.implementation == "cpp"


U, STATE = embeddings(6, 4), new_gate_state(4)


@pytest.mark.parametrize(
    ("u", "arguments", "message"),
    [
        (U[0], {}, r"u must be \[rows, d\] with d from 1 to 4096, got \[4\]"),
        (torch.zeros(2, 4097), {}, r"u must be .* got \[2, 4097\]"),
        (U.long(), {}, "u must be one of torch.float32, .*, got torch.int64"),
        (U[:0], {}, "u must have at least one row, got 0"),
        (U[:5], {"num_views": 2}, "u must hold 2 views of each image, a multiple of 2 rows, got 5"),
        (U, {"num_views": 3}, "num_views must be 1 to 2, got 3"),
        (U, {"state": STATE.float()}, r"state must be float64 \[17\] on cpu .*, got torch.float32 \[17\]"),
        (U, {"state": new_gate_state(5)}, r"state must be float64 \[17\] on cpu .*, got torch.float64 \[18\]"),
        (U, {"state": STATE.to("meta")}, "state must be .* on cpu .* got .* on meta"),
        (U, {"rule": "median"}, "rule must be one of none, prev, .*, got 'median'"),
        (U, {"rule": "views"}, "rule must be .* with num_views=2.* got 'views' with num_views=1"),
        (U, {"update_when": "sometimes"}, "update_when must be one of low, high, got 'sometimes'"),
        (U, {"beta": 1.5}, "beta must be from 0 to 1, got 1.5"),
        (U, {"rate": math.nan}, "rate must be from 0 to 1, got nan"),
        (U, {"center_beta": -0.1}, "center_beta must be from 0 to 1, got -0.1"),
        (U, {"max_skips": -1}, "max_skips and flag must not be negative, got -1 and 0"),
    ],
)
def test_bad_arguments_are_named(u, arguments, message):
    arguments = {"state": STATE, **arguments}
    with pytest.raises(ValueError, match=f"center_vector_update: {message}"):
        cv.center_vector_update(u, arguments.pop("state"), **arguments)


def test_bad_arguments_of_the_other_functions_are_named():
    z, sums, inv_norm = cv.center_vector_partial(U)
    with pytest.raises(ValueError, match="center_vector_partial: u must be"):
        cv.center_vector_partial(U[0])
    with pytest.raises(ValueError, match=r"center_vector_finish: sums must be float64 .* got torch.float32 \[6\]"):
        cv.center_vector_finish(sums.float(), STATE)
    with pytest.raises(ValueError, match="center_vector_finish: state must be"):
        cv.center_vector_finish(sums, STATE[:-1])
    with pytest.raises(ValueError, match=r"center_vector_backward: center must be \[4\] on cpu, got \[5\]"):
        cv.center_vector_backward(None, torch.zeros(5), 1.0, z, inv_norm, torch.float32)
    with pytest.raises(ValueError, match="center_vector_backward: coefficient must be finite, got nan"):
        cv.center_vector_backward(None, None, math.nan, z, inv_norm, torch.float32)
    with pytest.raises(ValueError, match=r"center_vector_backward: z must be \[rows, d\] and inv_norm \[rows\]"):
        cv.center_vector_backward(None, None, 1.0, z, inv_norm[:2], torch.float32)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [4, 128, 129, 256, 260, 1024, 1028, 4095, 4096])
def test_cuda_many_rows(d, dtype):
    with _dispatch.forced("cuda"):
        check(embeddings(2 * 4301, d, dtype, "cuda"), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 2048])
def test_cuda_rows_that_are_not_aligned(d):
    u = embeddings(1, 66 * d + 1, torch.bfloat16, "cuda").flatten()[1:].view(66, d)
    grads = (torch.randn_like(u).float(), None)
    assert u.data_ptr() % 8
    with _dispatch.forced("cuda"):
        got = with_gradient(lambda x: update(x, 2), u, grads)
    want, plain = with_gradient(oracle, u.double(), grads), with_gradient(eager, u, grads)
    for name, g, w, p in zip(("z", "s", "du"), got, want, plain, strict=True):
        assert_matches(g, w, p, name=name)


@pytest.mark.gpu
def test_cuda_on_a_side_stream():
    u, stream = embeddings(512, 128, torch.bfloat16, "cuda"), torch.cuda.Stream()
    want = [t.clone() for t in bits(u)]
    late = torch.zeros_like(u)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), _dispatch.forced("cuda"):
        torch.cuda._sleep(50_000_000)
        late.copy_(u)
        got = bits(late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_cuda_thousand_repeats_give_the_same_bits():
    for rows, d in ((256, 128), (20_000, 256), (600, 2048)):
        u = embeddings(rows, d, torch.bfloat16, "cuda")
        with _dispatch.forced("cuda"):
            want = bits(u)
            for _ in range(1000 if rows < 1000 else 200):
                assert all(torch.equal(a, b) for a, b in zip(bits(u), want, strict=True))


@pytest.mark.gpu
def test_cuda_graph_replays_take_steps():
    """The step, the reference and the flag move on at each replay; the decision of a replay is never a stale one."""
    batches = [embeddings(256, 128, torch.bfloat16, "cuda", pull=0.3 + 0.1 * (i % 4)) for i in range(12)]
    u, state, flag = torch.empty_like(batches[0]), new_gate_state(128, "cuda"), new_gate_flag("cuda")
    with _dispatch.forced("cuda"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            u.copy_(batches[0])
            cv.center_vector_update(u, state.clone(), num_views=2)  # loads what is loaded lazily
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cv.center_vector_update(u, state, num_views=2, flag=flag.address)
            state.copy_(out.state)
        plain = new_gate_state(128, "cuda")
        for step, batch in enumerate(batches, start=1):
            u.copy_(batch)
            graph.replay()
            is_open, is_finite = flag.wait(step, timeout=10)
            plain = cv.center_vector_update(batch, plain, num_views=2).state
            values = gate_values(plain)
            assert (values["step"], values["open"], values["finite"]) == (step, is_open, is_finite)
            assert torch.equal(state, plain)


@pytest.mark.gpu
def test_cuda_agrees_with_cpu():
    u = embeddings(512, 256)
    for ours, theirs in zip(bits(u.cuda()), bits(u), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-6, atol=2e-7)


@pytest.mark.gpu
def test_cuda_on_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    u = embeddings(64, 32, device="cuda:1")
    with _dispatch.forced("cuda"):
        check(u, 2)


@pytest.mark.gpu
def test_cuda_is_one_launch():
    u, state = embeddings(256, 128, torch.bfloat16, "cuda"), new_gate_state(128, "cuda")
    with _dispatch.forced("cuda"):
        cv.center_vector_update(u, state, num_views=2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            cv.center_vector_update(u, state, num_views=2)
            torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in launched if not name.startswith("Activity")]) == 1
    assert any("forward_kernel" in name for name in launched)
