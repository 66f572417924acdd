"""The compiled passes of a block on a CPU against float64, at widths that fill vectors and that do not; the choice."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F

from upstep_fast.kernels import _autotune, _fastest_on_cpu, adapter_gradients, block_passes
from upstep_fast.kernels._dispatch import NAMESPACE, forced
from upstep_fast.kernels.attention import cpp

missing = block_passes.unsupported_reason(torch.zeros(1))
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

# of the largest value; bf16 rounds results to 2^-9
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
WIDTHS = [1, 5, 16, 33, 192, 384]


def near(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < bound, f"{error:.1e}"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("has_skip", [False, True])
def test_norm_and_its_backward(width, dtype, has_skip):
    torch.manual_seed(0)
    x, delta, d = (torch.randn(2, 3, width).to(dtype) for _ in range(3))
    skip = torch.randn_like(d) if has_skip else None
    with forced("cpp"):
        x_hat, total, rstd = block_passes.norm(x, delta if has_skip else None, 1e-5)
    assert torch.equal(total, x + delta if has_skip else x)
    wide = total.double().requires_grad_()
    expected = F.layer_norm(wide, (width,), eps=1e-5)
    near(x_hat, expected.detach(), BOUNDS[dtype])
    near(rstd, (total.double().var(-1, correction=0, keepdim=True) + 1e-5).rsqrt(), 2e-6)
    expected.backward(d.double())
    with forced("cpp"):
        dx = block_passes.norm_backward(d, x_hat, rstd, skip)
    near(dx, wide.grad + (skip.double() if has_skip else 0), 2 * BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("approximate", block_passes.APPROXIMATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gelu_and_its_derivative(width, approximate, dtype):
    special = torch.tensor([0.0, -0.0, 1e-8, -1e-8, 9.0, -9.0, 300.0, -300.0, 1e30, -1e30])
    u = torch.cat([special, torch.linspace(-12, 12, 40 * width - 10)]).view(40, width).to(dtype)
    wide = u.double().requires_grad_()
    expected = wide * torch.sigmoid(1.702 * wide) if approximate == "quick" else F.gelu(wide, approximate=approximate)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    with forced("cpp"):
        value = block_passes.gelu(u.clone(), approximate, derivative=False)
        g = block_passes.gelu(derivative := u.clone(), approximate, derivative=True)
    assert torch.equal(value, g)
    bound = BOUNDS[dtype]
    assert ((g.double() - expected).abs() <= bound * (wide.abs() * 0.2 + expected.abs())).all()
    assert ((derivative.double() - slope.nan_to_num()).abs() < bound).all()  # torch's own is NaN at 1e30, tanh


@pytest.mark.parametrize("dtype", BOUNDS)
def test_nan_and_infinity_go_through(dtype):
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0] * 5, dtype=dtype)
    with forced("cpp"):
        g = block_passes.gelu(bad.clone(), "none", derivative=False)
        x_hat, _, _ = block_passes.norm(bad.view(4, 5), None, 1e-5)
    # torch's GELU of -inf is NaN as well
    assert torch.equal(g.isnan(), ~(bad > -float("inf"))) and torch.equal(g == float("inf"), bad == float("inf"))
    assert x_hat.isnan().all(-1).all()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("T", "d"), [(1, 8), (5, 3), (17, 32), (50, 64), (65, 64), (130, 80)])
def test_attention_and_its_backward(T, d, dtype):
    torch.manual_seed(0)
    qkv = torch.randn(2, T, 3, 3, d).to(dtype)
    out, lse = cpp.forward(qkv, d**-0.5)
    wide = qkv.double().requires_grad_()
    q, k, v = wide.permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT) * d**-0.5
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    near(out, expected.detach(), BOUNDS[dtype])
    near(lse, scores.logsumexp(-1).detach(), 2e-6)
    grad = torch.randn_like(out)
    expected.backward(grad.double())
    near(cpp.backward(grad, qkv, out, lse, d**-0.5), wide.grad, 2 * BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
def test_attention_keeps_a_nan_in_its_sequence_and_head(dtype):
    qkv = torch.randn(2, 9, 3, 2, 16).to(dtype)
    qkv[0, 4, 0, 1] = float("nan")
    out, lse = cpp.forward(qkv, 0.25)
    assert out[0, 4, 1].isnan().all() and lse[0, 1, 4].isnan()
    assert out.isnan().sum() == 16 and lse.isnan().sum() == 1
    dqkv = cpp.backward(torch.ones_like(out), qkv, out, lse, 0.25)
    assert dqkv[0, 4, 0, 1].isnan().all() and dqkv[0, :, 1:, 1].isnan().all()
    assert dqkv[0, :, :, 0].isfinite().all() and dqkv[1].isfinite().all()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_attention_of_scores_far_from_zero(sign, dtype):
    # what stands behind the last token has a score of 0, and must not count
    torch.manual_seed(0)
    qkv = torch.randn(1, 5, 3, 2, 16)
    qkv[:, :, 0], qkv[:, :, 1] = sign * (30 + 0.1 * qkv[:, :, 0]), 30 + 0.1 * qkv[:, :, 1]
    qkv = qkv.to(dtype)
    out, lse = cpp.forward(qkv, 0.25)
    wide = qkv.double().requires_grad_()
    q, k, v = wide.permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT) * 0.25
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    # a score near 3600 in fp32 is exact to 2e-4, and so are the shares
    near(out, expected.detach(), BOUNDS[dtype] + 1e-3)
    near(lse, scores.logsumexp(-1).detach(), 2e-6)
    expected.sum().backward()
    dqkv = cpp.backward(torch.ones_like(out), qkv, out, lse, 0.25)
    near(dqkv[:, :, 2], wide.grad[:, :, 2], 2 * BOUNDS[dtype] + 1e-3)
    assert dqkv.isfinite().all()


ADAPTERS = {  # rows, columns of dy, columns of a part, first columns, K, r
    "one row": (1, 5, 5, (0,), 3, 1),
    "nothing fills a vector": (50, 33, 11, (0, 22), 45, 5),
    "q, k and v": (521, 96, 32, (0, 32, 64), 64, 8),
    "v before q": (97, 48, 16, (32, 0), 32, 8),
    "many chunks": (4200, 24, 24, (0,), 96, 24),
    "rank above a tile": (60, 40, 40, (0,), 129, 33),
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", ADAPTERS)
def test_gradients_of_an_adapter(case, dtype):
    M, N, n, first, K, r = ADAPTERS[case]
    torch.manual_seed(0)
    parts = len(first)
    dy, x = torch.randn(M, N).to(dtype), torch.randn(M, K).to(dtype)
    a, shift, b = (torch.randn(size).to(dtype) for size in ((parts * r, K), (parts * r,), (parts, n, r)))
    with forced("cpp"):
        got = adapter_gradients.adapter_gradients(dy, x, a, shift, b, first)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype]
    leaves = [t.double().requires_grad_() for t in (a, shift, b)]
    low = x.double() @ leaves[0].T + leaves[1]
    y = [low[:, i * r : (i + 1) * r] @ leaves[2][i].T for i in range(parts)]
    total = sum((y[i] * dy[:, start : start + n].double()).sum() for i, start in enumerate(first))
    for ours, theirs in zip(got, torch.autograd.grad(total, leaves), strict=True):
        near(ours, theirs, BOUNDS[dtype])


def test_a_part_outside_of_dy_is_refused():
    dy, x = torch.randn(4, 8), torch.randn(4, 6)
    a, shift, b = torch.randn(2, 6), torch.randn(2), torch.randn(1, 5, 2)
    for first in ((4,), (-1,)):
        with forced("cpp"), pytest.raises(RuntimeError, match="outside of dy"):
            adapter_gradients.adapter_gradients(dy, x, a, shift, b, first)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("count", [2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(count, dtype):
    sizes = (5, 21, 3, 3, 32), (700, 96), (16, 96), (16,), (2, 48, 8)
    qkv, x, a, shift, b = (torch.randn(size).to(dtype) for size in sizes)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, count):
            torch.set_num_threads(threads)
            with forced("cpp"):
                of_adapter = adapter_gradients.adapter_gradients(x, x, a, shift, b, (0, 48))
                results.append([*cpp.forward(qkv, 0.2), *block_passes.norm(x, x, 1e-5), *of_adapter])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock that the candidates move; the choices are kept in a folder of the test."""
    now = [0.0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setattr(_autotune, "_pinned", {})
    monkeypatch.setattr(_fastest_on_cpu, "_milliseconds", lambda call: (call(), now[0])[0])
    return tmp_path / NAMESPACE / "measured.json"


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [(2.0, 1.9, "theirs"), (2.0, 1.97, "ours"), (2.0, 9.0, "ours"), (0.05, 0.01, "ours"), (5.0, 1.0, "theirs")],
    ids=["5 % slower", "equal", "faster", "too small", "slower"],
)
def test_no_form_slower_than_the_librarys_is_chosen(clock, ours, theirs, chosen, caplog):
    forms = {"ours": lambda: ours, "theirs": lambda: theirs}
    with caplog.at_level(logging.DEBUG):
        assert _fastest_on_cpu.fastest_on_cpu("cpu p", forms) == chosen
    # also what was too small to measure: a resumed run, another rank or a later `embed` may find it larger
    assert _autotune.tuned() == {"cpu p": chosen}
    assert json.loads(clock.read_text()) == {_fastest_on_cpu.machine(): {"cpu p": chosen}}
    assert _fastest_on_cpu.fastest_on_cpu("cpu p", dict.fromkeys(forms, lambda: pytest.fail("again"))) == chosen
    _autotune._pinned["cpu p"] = "theirs"
    assert _fastest_on_cpu.fastest_on_cpu("cpu p", forms) == "theirs"
    _autotune._pinned["cpu p"] = "of another machine"
    assert _fastest_on_cpu.fastest_on_cpu("cpu p", forms) == chosen


def test_processes_that_measure_at_the_same_time_agree(clock):
    def theirs() -> None:
        # another process ends its measurement while this one measures
        clock.parent.mkdir(exist_ok=True)
        clock.write_text(json.dumps({_fastest_on_cpu.machine(): {"cpu p": "theirs", "cpu q": "gone"}}))

    forms = {"ours": lambda: 2.0, "theirs": lambda: (theirs(), 9.0)[1]}
    assert _fastest_on_cpu.fastest_on_cpu("cpu p", forms) == "theirs"
    assert _autotune.tuned()["cpu p"] == "theirs"
    assert _fastest_on_cpu.fastest_on_cpu("cpu q", forms) == "ours"  # a name that is no form is not adopted


def test_choices_belong_to_a_number_of_threads():
    before = torch.get_num_threads()
    names = []
    try:
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            names.append(_fastest_on_cpu.machine())
    finally:
        torch.set_num_threads(before)
    assert names[0] == names[2] != names[1]
