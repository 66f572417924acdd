"""Sinkhorn targets against SwAV's own recipe in fp64, on the CPU, in the interpreter and on a GPU."""

from __future__ import annotations

import importlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, assert_matches, guarded_outputs, laid_out, sizes, surrounded
from torch import Tensor

from upstep_fast.kernels import _dispatch, _tile_sizes
from upstep_fast.kernels._triton import INTERPRET
from upstep_fast.kernels.sinkhorn import sinkhorn, sinkhorn_reference
from upstep_fast.kernels.sinkhorn import triton as fused

# the package exports the function under the module's name
module = importlib.import_module("upstep_fast.kernels.sinkhorn.op")

# masked lanes divide by zero on purpose; numpy remarks on it
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GPU_SHAPES = ((1, 1), (1, 700), (700, 1), (128, 512), (257, 300), (2048, 3000), (4096, 8192), (512, 8193), (64, 65536))


def swav(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """As SwAV writes it (METHODS 1.3), in the precision of `scores`."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    K, B = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / K
        q = q / q.sum(0, keepdim=True) / B
    return (q * B).T


def log_domain(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The same where exp would overflow."""
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(-2).log_softmax(-1)
    return log_q.exp()


def cosines(B: int, K: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Scores of unit vectors that lean one way, as those of a narrow domain do."""
    g = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(B, 64, generator=g) + torch.randn(64, generator=g) / 2, dim=1)
    return (z @ F.normalize(torch.randn(K, 64, generator=g), dim=1).T).to(device)


def problems(V: int, B: int, K: int, device: str = "cpu") -> Tensor:
    return torch.stack([cosines(B, K, seed, device) for seed in range(V)])


def check(scores: Tensor, epsilon: float, iterations: int, got: Tensor | None = None) -> None:
    got = sinkhorn(scores, epsilon, iterations) if got is None else got
    oracle = log_domain(scores.double(), epsilon, iterations)
    eager = log_domain(scores.float(), epsilon, iterations)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert_matches(got, oracle, eager)
    assert (got.double().sum(-1) - 1).abs().max() <= 1e-6


def over_ranks(parts: list[Tensor], epsilon: float, iterations: int) -> Tensor:
    """Each part on a thread of its own, with an all-reduce between them."""
    barrier = threading.Barrier(len(parts))
    given: list[Tensor | None] = [None] * len(parts)

    def rank(i: int) -> Tensor:
        def all_reduce(t: Tensor, op: str) -> None:
            given[i] = t.clone()
            barrier.wait()
            stacked = torch.stack(given)
            barrier.wait()
            t.copy_(stacked.amax(0) if op == "max" else stacked.sum(0))

        return sinkhorn(parts[i], epsilon, iterations, all_reduce=all_reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return torch.cat(list(pool.map(rank, range(len(parts)))))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 scores, so that small shapes have many blocks, programs and chunks."""
    monkeypatch.setitem(_tile_sizes.TILES, "sinkhorn", {None: {"BLOCK": 64, "SMALL_BLOCK": 64, "WARP_CELLS": 512}})


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.01])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_reference_is_swav(epsilon, iterations):
    scores = cosines(256, 300).double()
    torch.testing.assert_close(
        sinkhorn_reference(scores, epsilon, iterations), swav(scores, epsilon, iterations), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.03, 1), (0.01, 10), (1.0, 2)])
def test_matches_fp64(dtype, epsilon, iterations):
    check(cosines(256, 300).to(dtype), epsilon, iterations)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
def test_any_magnitude_is_finite(magnitude):
    check(magnitude * torch.randn(40, 70, generator=torch.Generator().manual_seed(0)), 0.01, 3)


def test_fp16_scores_do_not_overflow():
    scores = cosines(64, 50).half()
    scores[torch.arange(50), torch.arange(50)] = 1.0
    assert swav(scores, 0.05, 3).isnan().any(), "this case no longer overflows in fp16"
    check(scores, 0.05, 3)


def test_collapsed_batch_is_exactly_uniform():
    scores = cosines(1, 300).expand(128, 300)
    q = sinkhorn(scores, 0.05, 3)
    assert torch.equal(q, torch.full_like(q, 1 / 300))
    # the loss's floor: cross-entropy against a uniform target is least, ln K, at a uniform prediction
    loss = -(q * torch.zeros(128, 300).log_softmax(1)).sum(1)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(300)))


@pytest.mark.parametrize(
    ("epsilon", "iterations", "limit"), [(0.05, 3, 0.01), (0.05, 10, 1e-6), (0.03, 10, 2e-3), (0.01, 100, 1e-5)]
)
def test_centers_are_used_alike(epsilon, iterations, limit):
    g = torch.Generator().manual_seed(0)
    z, c = (F.normalize(torch.randn(n, 128, generator=g), dim=1) for n in (256, 300))
    columns = sinkhorn(z @ c.T, epsilon, iterations).sum(0) * 300 / 256
    assert (columns - 1).abs().max() <= limit


def test_permutations_commute_and_a_constant_changes_nothing():
    g = torch.Generator().manual_seed(0)
    # multiples of 1/64 and a power of two, so that adding it is exact
    scores = torch.randint(-64, 64, (60, 45), generator=g) / 64
    q = sinkhorn(scores, 0.05, 3)
    b, k = torch.randperm(60, generator=g), torch.randperm(45, generator=g)
    torch.testing.assert_close(sinkhorn(scores[b][:, k], 0.05, 3), q[b][:, k], rtol=2e-6, atol=1e-8)
    assert torch.equal(sinkhorn(scores + 4.0, 0.05, 3), q)
    assert torch.equal(sinkhorn(scores * 2, 0.1, 3), q)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    B=sizes(130), K=sizes(130), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS),
    epsilon=st.sampled_from([0.01, 0.05, 0.5]), iterations=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(B, K, dtype, layout, epsilon, iterations, seed):
    check(laid_out(cosines(B, K, seed).to(dtype), layout), epsilon, iterations)


@pytest.mark.parametrize("dtype", DTYPES)
def test_problems_are_apart(dtype):
    scores = problems(3, 64, 30).to(dtype)
    check(scores, 0.05, 3)
    check(scores.transpose(0, 1), 0.05, 3)
    scores[1, 2, 3] = math.nan
    assert sinkhorn(scores, 0.05, 3).isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert sinkhorn(scores[:, :0], 0.05, 3).shape == (3, 0, 30) and sinkhorn(scores[:0], 0.05, 3).shape == (0, 64, 30)


def test_problems_share_the_reductions():
    calls = []
    scores = problems(2, 8, 5)
    check(scores, 0.05, 3, got=sinkhorn(scores, 0.05, 3, all_reduce=lambda t, op: calls.append((op, t.shape))))
    assert calls == [("max", (2, 5))] + [("sum", (2, 5))] * 3


@pytest.mark.parametrize("cuts", [[256], [128, 128], [100, 0, 156], [1, 85, 85, 85]])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.01, 1)])
def test_a_split_batch_is_the_whole(cuts, epsilon, iterations):
    scores = cosines(256, 300)
    whole = over_ranks(list(scores.split(cuts)), epsilon, iterations)
    check(scores, epsilon, iterations, got=whole)


def test_reductions_are_the_documented_ones():
    calls = []
    sinkhorn(cosines(8, 5), 0.05, 3, all_reduce=lambda t, op: calls.append((op, t.shape)))
    assert calls == [("max", (5,))] + [("sum", (5,))] * 3


@pytest.mark.parametrize("split", [False, True])
def test_nan_gives_nan(split):
    scores = cosines(32, 20)
    scores[3, 4] = math.nan
    q = sinkhorn(scores, 0.05, 3, all_reduce=(lambda t, op: None) if split else None)
    assert q.isnan().all()


def test_forbidden_centers_get_nothing():
    scores = cosines(32, 20)
    scores[:5, 7] = -math.inf
    q = sinkhorn(scores, 0.05, 3)
    assert (q[:5, 7] == 0).all() and q.isfinite().all()


def test_empty_batch_is_empty():
    assert sinkhorn(torch.empty(0, 7), 0.05, 3).shape == (0, 7)


@pytest.mark.parametrize(
    ("scores", "epsilon", "iterations", "message"),
    [
        (torch.zeros(3), 0.05, 3, r"scores must be .*got shape \[3\]"),
        (torch.zeros(3, 0), 0.05, 3, r"at least one center, got shape \[3, 0\]"),
        (torch.zeros(2, 3, 4, 5), 0.05, 3, r"got shape \[2, 3, 4, 5\]"),
        (torch.zeros(3, 4, dtype=torch.int64), 0.05, 3, "scores must be fp16, bf16 or fp32, got torch.int64"),
        (torch.zeros(3, 4), 0.0, 3, "epsilon must be a finite number above 0, got 0.0"),
        (torch.zeros(3, 4), -1.0, 3, "epsilon must be"),
        (torch.zeros(3, 4), math.inf, 3, "epsilon must be"),
        (torch.zeros(3, 4), math.nan, 3, "epsilon must be"),
        (torch.zeros(3, 4), 0.05, 0, "iterations must be at least 1"),
    ],
)
def test_bad_input(scores, epsilon, iterations, message):
    with pytest.raises(ValueError, match=f"sinkhorn: .*{message}"):
        sinkhorn(scores, epsilon, iterations)


def test_a_forced_implementation_that_cannot_run_raises():
    if INTERPRET:
        pytest.skip("the interpreter takes CPU tensors")
    with _dispatch.forced("triton"), pytest.raises(RuntimeError, match=r"triton.*cannot run.*cpu"):
        sinkhorn(torch.zeros(3, 4), 0.05, 3)


def test_no_gradient_flows():
    assert not sinkhorn(cosines(8, 5).requires_grad_(), 0.05, 3).requires_grad


@pytest.mark.parametrize(
    "scores",
    [cosines(8, 5), cosines(8, 5).T, torch.empty(0, 5), cosines(8, 5).view(2, 4, 5), torch.empty(2, 0, 5)],
    ids=["whole", "transposed", "empty", "problems", "empty problems"],
)
def test_opcheck(scores):
    peak, share = torch.ones(2, *scores.shape[:-2], scores.shape[-1])
    for op, arguments in (
        (module._sinkhorn_op, (scores, 0.05, 3)),
        (module._columns_op, (scores, 0.05)),
        (module._rows_op, (scores, 0.05, peak, share)),
        (module._assign_op, (scores, 0.05, peak, share)),
    ):
        torch.library.opcheck(op, arguments)


def test_compiles_whole_and_runs_under_autocast():
    scores = cosines(16, 9)
    compiled = torch.compile(lambda s: sinkhorn(s * 2, 0.1, 3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), sinkhorn(scores, 0.05, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn(scores, 0.05, 3), compiled(scores))


@pytest.mark.interp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted(dtype, layout):
    scores = surrounded(laid_out(cosines(70, 50).to(dtype), layout))
    with _dispatch.forced("triton"), guarded_outputs():
        q = sinkhorn(scores, 0.05, 2)
    check(scores, 0.05, 2, got=q)


@pytest.mark.interp
# no shrinking: a failure would take minutes here
@settings(deadline=None, max_examples=12, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(B=sizes(20), K=sizes(130), epsilon=st.sampled_from([0.01, 0.05]), seed=st.integers(0, 99))
def test_interpreted_at_any_shape(B, K, epsilon, seed):
    scores = surrounded(cosines(B, K, seed))
    with pytest.MonkeyPatch.context() as patch, _dispatch.forced("triton"), guarded_outputs():
        # 64 scores a block: one chunk of centers or several, one block of rows or several to a program
        patch.setitem(_tile_sizes.TILES, "sinkhorn", {None: {"BLOCK": 64, "SMALL_BLOCK": 64, "WARP_CELLS": 512}})
        patch.setattr(fused, "_resident_warps", lambda device: 4)
        q = sinkhorn(scores, epsilon, 2)
    check(scores, epsilon, 2, got=q)


@pytest.mark.interp
def test_interpreted_in_one_launch(small_tiles, monkeypatch):
    # one program, which meets nobody at the barriers
    monkeypatch.setattr(fused, "_resident_warps", lambda device: 1)
    monkeypatch.setattr(fused, "INTERPRET", False)
    for shape in ((9, 13), (5, 70)):
        scores = cosines(*shape)
        with guarded_outputs():
            q = fused.assignments(scores, 0.05, 3)
        check(scores, 0.05, 3, got=q)


@pytest.mark.interp
@pytest.mark.parametrize("warps", [12, 2])  # for two programs a problem or more, and for fewer than there are problems
@pytest.mark.parametrize("shape", [(3, 9, 13), (3, 5, 70)])
def test_interpreted_problems_are_apart(small_tiles, shape, warps, monkeypatch):
    monkeypatch.setattr(fused, "_resident_warps", lambda device: warps)
    scores = problems(*shape)
    assert fused.partition(scores).resident == (warps > 3)
    for of in (scores, scores.transpose(1, 2)):
        with _dispatch.forced("triton"), guarded_outputs():
            q = sinkhorn(surrounded(of), 0.05, 2)
        check(of, 0.05, 2, got=q)


@pytest.mark.interp
def test_interpreted_problems_in_one_launch(small_tiles, monkeypatch):
    monkeypatch.setattr(fused, "_resident_warps", lambda device: 3)
    monkeypatch.setattr(fused, "INTERPRET", False)
    for shape in ((9, 13), (5, 70)):
        scores = problems(3, *shape)
        with guarded_outputs():
            q = fused.assignments(scores, 0.05, 3)
        check(scores, 0.05, 3, got=q)


@pytest.mark.interp
@pytest.mark.parametrize("K", [40, 100])
def test_interpreted_parts_add_up(small_tiles, K):
    scores = cosines(9, K)
    parts = scores.split([4, 5])
    with _dispatch.forced("triton"), guarded_outputs():
        peaks, totals = zip(*(module._columns_op(part, 0.05) for part in parts), strict=True)
        peak = torch.stack(peaks).amax(0)
        assert torch.equal(peak, scores.amax(0))
        total = sum(t * ((p - peak) / 0.05).exp() for p, t in zip(peaks, totals, strict=True))
        share = -total.log()
        share = share - sum(module._rows_op(part, 0.05, peak, share) for part in parts).log()
        q = torch.cat([module._assign_op(part, 0.05, peak, share) for part in parts])
    check(scores, 0.05, 2, got=q)


@pytest.mark.interp
@pytest.mark.parametrize("K", [40, 100])
def test_interpreted_nan_gives_nan(small_tiles, K):
    scores = cosines(9, K)
    scores[3, 4] = math.nan
    with _dispatch.forced("triton"):
        assert sinkhorn(scores, 0.05, 2).isnan().all()


@pytest.mark.interp
def test_interpreted_forbidden_centers_get_nothing(small_tiles):
    scores = cosines(9, 40)
    scores[:5, 7] = -math.inf
    with _dispatch.forced("triton"):
        q = sinkhorn(scores, 0.05, 2)
    assert (q[:5, 7] == 0).all() and q.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.01, 1)])
def test_gpu_matches_fp64(shape, dtype, epsilon, iterations):
    scores = cosines(*shape, device="cuda").to(dtype)
    with _dispatch.forced("triton"):
        check(scores, epsilon, iterations)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 257, 300), (10, 64, 8193), (5000, 9, 40)])  # the last: more than are resident
def test_gpu_problems_are_apart(shape):
    scores = surrounded(problems(*shape, device="cuda"))
    with guarded_outputs():
        q = sinkhorn(scores, 0.05, 3)
    check(scores, 0.05, 3, got=q)
    for one, of in zip(q[:2], scores[:2], strict=True):
        torch.testing.assert_close(one, sinkhorn(of, 0.05, 3), rtol=1e-5, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_layouts_and_guard_cells(layout):
    scores = surrounded(laid_out(cosines(300, 777, device="cuda"), layout))
    with guarded_outputs():
        q = sinkhorn(scores, 0.05, 3)
    check(scores, 0.05, 3, got=q)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 512), (2048, 3000), (512, 8193)])
def test_gpu_one_launch_is_the_passes_bit_for_bit(shape, monkeypatch):
    scores = cosines(*shape, device="cuda")
    first = sinkhorn(scores, 0.05, 3)
    for _ in range(50):
        assert torch.equal(sinkhorn(scores, 0.05, 3), first)
    monkeypatch.setattr(fused, "INTERPRET", True)
    assert torch.equal(sinkhorn(scores, 0.05, 3), first)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 512), (2048, 3000)])
def test_gpu_captured_in_a_graph(shape):
    static = torch.zeros(shape, device="cuda")
    sinkhorn(static, 0.05, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = sinkhorn(static, 0.05, 3)
    for seed in range(3):
        scores = cosines(*shape, seed, device="cuda")
        static.copy_(scores)
        graph.replay()
        assert torch.equal(q, sinkhorn(scores, 0.05, 3))


@pytest.mark.gpu
def test_gpu_split_batch_is_the_whole():
    scores = cosines(2048, 3000, device="cuda")
    check(scores, 0.05, 3, got=over_ranks(list(scores.split([1000, 0, 48, 1000])), 0.05, 3))


@pytest.mark.gpu
def test_gpu_nan_gives_nan():
    scores = cosines(2048, 3000, device="cuda")
    scores[3, 4] = math.nan
    assert sinkhorn(scores, 0.05, 3).isnan().all()


@pytest.mark.gpu
def test_gpu_rows_farther_apart_than_32_bits_count():
    base = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    scores = base.as_strided((3, 300), (2**30, 1))
    scores.copy_(cosines(3, 300))
    check(scores, 0.05, 3)


@pytest.mark.gpu
def test_gpu_more_targets_than_32_bits_count():
    B, K = 2**18 + 8, 8192
    scores = torch.randn(B, K, dtype=torch.bfloat16, device="cuda")
    q = sinkhorn(scores, 1.0, 1)
    # one iteration in plain torch, on the last rows only
    peak, total = scores.amax(0).float(), torch.zeros(K, dtype=torch.float64, device="cuda")
    for part in scores.split(4096):
        total += (part.float() - peak).exp().double().sum(0)
    oracle = (scores[-8:].double() - peak.double() - total.log()).softmax(1)
    torch.testing.assert_close(q[-8:].double(), oracle, rtol=1e-5, atol=1e-12)
