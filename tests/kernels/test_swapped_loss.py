"""The swapped loss's cross-entropy and its gradient against fp64 autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, assert_matches, guarded_outputs, laid_out, sizes, surrounded
from torch import Tensor

from upstep_fast.kernels import _dispatch, _tile_sizes
from upstep_fast.kernels import swapped_loss as module
from upstep_fast.kernels.swapped_loss import swapped_cross_entropy, swapped_cross_entropy_reference

# masked lanes divide by zero on purpose; numpy remarks on it
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(B: int, K: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores, and targets whose rows sum to anything from 0 to 2."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, K, generator=g) / 3
    targets = torch.randn(B, K, generator=g).mul(2).softmax(1) * torch.rand(B, 1, generator=g) * 2
    return scores.to(dtype), targets


def value_and_gradient(loss, scores: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scores = scores.detach().requires_grad_()
    value = loss(scores, targets, temperature)
    # not 1, so that a backward that ignores what it is given is found
    (value * 3).backward()
    return value.detach(), scores.grad


def check(scores: Tensor, targets: Tensor, temperature: float, got: tuple[Tensor, Tensor] | None = None) -> None:
    got = value_and_gradient(swapped_cross_entropy, scores, targets, temperature) if got is None else got
    oracle = value_and_gradient(swapped_cross_entropy_reference, scores.double(), targets.double(), temperature)
    eager = value_and_gradient(swapped_cross_entropy_reference, scores, targets, temperature)
    assert got[0].dtype == torch.float32 and got[1].dtype == scores.dtype
    # one number: eager may be right by chance, so it has a few roundings of its terms
    torch.testing.assert_close(got[0].double(), oracle[0], rtol=2e-6, atol=1e-7)
    assert_matches(got[1], oracle[1], eager[1], name="gradient")


def test_reference_passes_gradcheck():
    scores, targets = (t.double() for t in problem(5, 7))
    assert torch.autograd.gradcheck(
        lambda s: swapped_cross_entropy_reference(s, targets, 0.1), scores.requires_grad_(), fast_mode=False
    )


def test_hard_targets_are_ordinary_cross_entropy():
    scores, _ = problem(20, 11)
    labels = torch.arange(20) % 11
    loss = swapped_cross_entropy(scores, torch.nn.functional.one_hot(labels, 11).float(), 0.1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores / 0.1, labels))


def test_uniform_targets_are_least_at_ln_k():
    scores = torch.zeros(4, 300, requires_grad=True)
    loss = swapped_cross_entropy(scores, torch.full((4, 300), 1 / 300), 0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(math.log(300)))
    assert scores.grad.abs().max() <= 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 0.03, 1.0])
def test_matches_fp64(dtype, temperature):
    check(*problem(64, 300, dtype), temperature)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    B=sizes(40), K=sizes(130), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99)
)  # fmt: skip
def test_any_shape(B, K, dtype, layout, seed):
    scores, targets = problem(B, K, dtype, seed)
    check(laid_out(scores, layout), laid_out(targets, layout), 0.1)


def test_targets_get_no_gradient_and_double_backward_is_refused():
    scores, targets = problem(4, 5)
    scores.requires_grad_()
    targets.requires_grad_()
    loss = swapped_cross_entropy(scores, targets, 0.1)
    (grad,) = torch.autograd.grad(loss, scores, create_graph=True)
    assert torch.autograd.grad(loss, targets, allow_unused=True) == (None,)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_nan_gives_nan():
    scores, targets = problem(4, 5)
    scores[1, 2] = math.nan
    value, grad = value_and_gradient(swapped_cross_entropy, scores, targets, 0.1)
    assert value.isnan() and grad[1].isnan().all() and grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("scores", "targets", "temperature", "message"),
    [
        (torch.zeros(3), torch.zeros(3), 0.1, r"scores must be .*got shape \[3\]"),
        (torch.zeros(0, 4), torch.zeros(0, 4), 0.1, r"at least one of each, got shape \[0, 4\]"),
        (torch.zeros(2, 3), torch.zeros(3, 2), 0.1, r"targets must have the shape of scores, \[2, 3\], got \[3, 2\]"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), 0.1, "scores must be fp16, bf16 or fp32, got torch.int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), 0.1, "targets must be fp16, bf16 or fp32"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), 0.1, "targets must be on the device of scores, cpu"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0.0, "temperature must be a finite number above 0, got 0.0"),
        (torch.zeros(2, 3), torch.zeros(2, 3), math.nan, "temperature must be"),
    ],
)
def test_bad_input(scores, targets, temperature, message):
    with pytest.raises(ValueError, match=f"swapped_cross_entropy: .*{message}"):
        swapped_cross_entropy(scores, targets, temperature)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    scores, targets = problem(6, 5)
    scores = laid_out(scores, layout).requires_grad_()
    torch.library.opcheck(module._op, (scores, laid_out(targets, layout), 0.1))
    loss, peak, weight = module._op(scores.detach(), targets, 0.1)
    torch.library.opcheck(module._backward_op, (loss, scores.detach(), targets, peak, weight, 0.1))


def test_opcheck_of_nothing():
    torch.library.opcheck(module._op, (torch.empty(0, 5), torch.empty(0, 5), 0.1))


def test_compiles_whole():
    scores, targets = problem(6, 5)
    compiled = torch.compile(swapped_cross_entropy, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        value_and_gradient(compiled, scores, targets, 0.1),
        value_and_gradient(swapped_cross_entropy, scores, targets, 0.1),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.interp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 4096])
def test_interpreted(block, dtype, layout, monkeypatch):
    monkeypatch.setitem(_tile_sizes.TILES, "swapped_cross_entropy", {None: {"BLOCK": block}})
    scores, targets = problem(5, 150, dtype)
    scores, targets = surrounded(laid_out(scores, layout)), surrounded(laid_out(targets, layout))
    with _dispatch.forced("triton"), guarded_outputs():
        got = value_and_gradient(swapped_cross_entropy, scores, targets, 0.1)
    check(scores, targets, 0.1, got)


@pytest.mark.interp
# no shrinking: a failure would take minutes here
@settings(deadline=None, max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(B=sizes(20), K=sizes(130), seed=st.integers(0, 99))
def test_interpreted_at_any_shape(B, K, seed):
    scores, targets = (surrounded(t) for t in problem(B, K, seed=seed))
    with pytest.MonkeyPatch.context() as patch, _dispatch.forced("triton"), guarded_outputs():
        patch.setitem(_tile_sizes.TILES, "swapped_cross_entropy", {None: {"BLOCK": 64}})
        got = value_and_gradient(swapped_cross_entropy, scores, targets, 0.1)
    check(scores, targets, 0.1, got)


@pytest.mark.interp
def test_interpreted_nan_gives_nan():
    with _dispatch.forced("triton"):
        test_nan_gives_nan()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (128, 512), (2048, 3000), (4096, 8192), (64, 65536)])
def test_gpu_matches_fp64(shape, dtype):
    scores, targets = (t.cuda() for t in problem(*shape, dtype))
    with _dispatch.forced("triton"):
        check(scores, targets, 0.1)


@pytest.mark.gpu
def test_gpu_captured_in_a_graph():
    scores, targets = (t.cuda() for t in problem(512, 777))
    want = value_and_gradient(swapped_cross_entropy, scores, targets, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = value_and_gradient(swapped_cross_entropy, scores, targets, 0.1)
    graph.replay()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.gpu
def test_gpu_rows_farther_apart_than_32_bits_count():
    scores, targets = (t.cuda() for t in problem(3, 300, torch.bfloat16))
    far = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda").as_strided((3, 300), (2**30, 1))
    check(far.copy_(scores), targets, 0.1)
