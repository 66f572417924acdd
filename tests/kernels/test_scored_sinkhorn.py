"""Scores with their Sinkhorn targets against fp64, on the CPU, in the interpreter and on a GPU."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, assert_matches, guarded_outputs, laid_out, sizes, surrounded
from torch import Tensor

from upstep_fast.kernels import _dispatch, _tile_sizes, set_tuned
from upstep_fast.kernels.sinkhorn import sinkhorn_reference
from upstep_fast.kernels.sinkhorn import triton as fused
from upstep_fast.kernels.sinkhorn.scored import scored_sinkhorn

# the package exports the function under the module's name
module = importlib.import_module("upstep_fast.kernels.sinkhorn.scored")

# masked lanes divide by zero on purpose; numpy remarks on it
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def embeddings(B: int, K: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z, c = (F.normalize(torch.randn(n, D, generator=g), dim=1).to(dtype) for n in (B, K))
    return z, c


def check(z: Tensor, c: Tensor, epsilon: float, got: tuple[Tensor, Tensor] | None = None) -> None:
    scores, q = scored_sinkhorn(z, c, epsilon, 3) if got is None else got
    assert scores.dtype == q.dtype == torch.float32
    assert_matches(scores, z.double() @ c.double().T, z.float() @ c.float().T, name="scores")
    # the targets are those of these scores: what the scores' rounding does to them is not Sinkhorn's
    assert_matches(q, sinkhorn_reference(scores.double(), epsilon, 3), sinkhorn_reference(scores, epsilon, 3))
    assert (q.double().sum(1) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_matches_fp64(dtype, epsilon):
    check(*embeddings(64, 50, 24, dtype), epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_reaches_both_from_the_scores_alone(dtype):
    z, c = (t.requires_grad_() for t in embeddings(20, 15, 8, dtype))
    weight = torch.randn(20, 15, generator=torch.Generator().manual_seed(1))
    scores, q = scored_sinkhorn(z, c, 0.05, 3)
    assert not q.requires_grad
    got = torch.autograd.grad((scores * weight).sum() + q.sum(), (z, c))
    for name, grad, left, right in (("z", got[0], weight, c), ("centers", got[1], weight.T, z)):
        eager = (left @ right.detach().float()).to(dtype)
        assert_matches(grad, left.double() @ right.detach().double(), eager, name=name)


def test_frozen_centers_get_no_gradient():
    z, c = embeddings(6, 5, 4)
    scored_sinkhorn(z.requires_grad_(), c, 0.05, 3)[0].sum().backward()
    torch.testing.assert_close(z.grad, c.sum(0).expand(6, 4))


def test_nan_gives_nan_and_an_empty_batch_is_empty():
    z, c = embeddings(8, 5, 4)
    z[2, 1] = math.nan
    scores, q = scored_sinkhorn(z, c, 0.05, 3)
    assert q.isnan().all() and scores.isnan().sum() == 5
    assert [t.shape for t in scored_sinkhorn(z[:0], c, 0.05, 3)] == [(0, 5)] * 2


@pytest.mark.parametrize("shapes", [((8, 4), (5, 4)), ((0, 4), (5, 4)), ((1, 1), (1, 1))])
def test_opcheck(shapes):
    z, c = (torch.randn(s).requires_grad_() for s in shapes)
    torch.library.opcheck(module._op, (z, c, 0.05, 3))


def test_compiles_whole_and_runs_under_autocast():
    z, c = embeddings(16, 9, 8)
    compiled = torch.compile(lambda z: scored_sinkhorn(z * 2, c, 0.1, 3), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(z), scored_sinkhorn(z * 2, c, 0.1, 3), strict=True):
        assert torch.equal(got, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scored_sinkhorn(z * 2, c, 0.1, 3)[0], compiled(z)[0])


@pytest.mark.parametrize(
    ("z", "c", "epsilon", "iterations", "message"),
    [
        ((3,), (5, 4), 0.05, 3, r"z must be \[samples, width\].*got \[3\]"),
        ((3, 4), (5, 3), 0.05, 3, r"centers must be \[centers, 4\].*got \[5, 3\]"),
        ((3, 4), (0, 4), 0.05, 3, r"at least one center, got \[0, 4\]"),
        ((3, 4), (5, 4), 0.0, 3, "epsilon must be a finite number above 0, got 0.0"),
        ((3, 4), (5, 4), 0.05, 0, "iterations must be at least 1.*got 0"),
    ],
)
def test_bad_input_is_named(z, c, epsilon, iterations, message):
    with pytest.raises(ValueError, match=f"scored_sinkhorn: .*{message}"):
        scored_sinkhorn(torch.zeros(z), torch.zeros(c), epsilon, iterations)


def test_unlike_dtypes_are_named():
    with pytest.raises(ValueError, match=r"centers must be torch.float32 on cpu as z is, got torch.float16"):
        scored_sinkhorn(torch.zeros(3, 4), torch.zeros(5, 4).half(), 0.05, 3)


@pytest.mark.interp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted(dtype, layout):
    z, c = (surrounded(laid_out(t, layout)) for t in embeddings(70, 90, 40, dtype))
    with _dispatch.forced("triton"), guarded_outputs():
        got = scored_sinkhorn(z, c, 0.05, 3)
    check(z, c, 0.05, got=got)


@pytest.mark.interp
# no shrinking: a failure would take minutes here
@settings(deadline=None, max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(B=sizes(40), K=sizes(130), D=sizes(70), seed=st.integers(0, 99))
def test_interpreted_at_any_shape(B, K, D, seed):
    z, c = (surrounded(t) for t in embeddings(B, K, D, seed=seed))
    with pytest.MonkeyPatch.context() as patch, _dispatch.forced("triton"), guarded_outputs():
        # 64 scores a block, and few programs: several tiles, blocks and parts to each
        patch.setitem(_tile_sizes.TILES, "sinkhorn", {None: {"BLOCK": 64, "SMALL_BLOCK": 64, "WARP_CELLS": 512}})
        patch.setattr(fused, "_resident_warps", lambda device: 8)
        got = scored_sinkhorn(z, c, 0.05, 3)
    check(z, c, 0.05, got=got)


@pytest.mark.interp
@pytest.mark.parametrize("shape", [(9, 13, 5), (20, 70, 40)])
def test_interpreted_in_one_launch(shape, monkeypatch):
    # one program, which meets nobody at the barriers
    monkeypatch.setitem(_tile_sizes.TILES, "sinkhorn", {None: {"BLOCK": 64, "SMALL_BLOCK": 64, "WARP_CELLS": 512}})
    monkeypatch.setattr(fused, "_resident_warps", lambda device: 4)
    z, c = embeddings(*shape)
    with pytest.MonkeyPatch.context() as patch, guarded_outputs():
        patch.setattr(module, "INTERPRET", False)
        got = module._fused(z, c, 0.05, 3)
    check(z, c, 0.05, got=got)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (128, 512, 128), (257, 300, 100), (2048, 3000, 128), (512, 8193, 64)])
def test_gpu_matches_fp64(shape, dtype):
    z, c = (t.cuda() for t in embeddings(*shape, dtype))
    with _dispatch.forced("triton"):
        check(z, c, 0.05)


@pytest.mark.gpu
def test_gpu_layouts_and_guard_cells():
    for layout in LAYOUTS:
        z, c = (surrounded(laid_out(t.cuda(), layout)) for t in embeddings(300, 777, 128))
        with _dispatch.forced("triton"), guarded_outputs():
            got = scored_sinkhorn(z, c, 0.05, 3)
        check(z, c, 0.05, got=got)


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit_and_replays():
    z, c = (t.cuda() for t in embeddings(128, 512, 128))
    with _dispatch.forced("triton"):
        first = scored_sinkhorn(z, c, 0.05, 3)
        for _ in range(50):
            assert all(map(torch.equal, scored_sinkhorn(z, c, 0.05, 3), first))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = scored_sinkhorn(z, c, 0.05, 3)
    graph.replay()
    assert all(map(torch.equal, captured, first))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["fused", "apart"])
def test_gpu_runs_the_way_that_is_pinned(way):
    z, c = (t.cuda() for t in embeddings(100, 60, 32))
    try:
        set_tuned({"scored_sinkhorn float32 B128 K60 D32": way})
        check(z, c, 0.05)
    finally:
        set_tuned({})
    assert any(row.op.startswith("scored_sinkhorn float32") and row.implementation == way for row in _dispatch.report())
