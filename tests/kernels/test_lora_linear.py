"""lora_linear: every strategy against the fp64 reference, and every promise of its docstring."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import LAYOUTS, assert_matches, guarded_outputs, laid_out, sizes, surrounded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from upstep_fast.kernels import _dispatch, _tile_sizes
from upstep_fast.kernels.lora_linear import STRATEGIES, lora_linear, lora_linear_reference
from upstep_fast.kernels.lora_linear import strategy as choice
from upstep_fast.kernels.lora_linear import triton as fused
from upstep_fast.kernels.lora_linear.args import LoraArgs
from upstep_fast.kernels.lora_linear.eager import drop
from upstep_fast.kernels.lora_linear.op import _backward_op, _op

PLAIN = ("reference", "split", "wide_k", "merged")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("y", "dx", "da", "db")
QV = ((0, 20), (40, 60))  # of a fused qkv with D = 20

# small blocks, so that a small problem meets several, and their edges
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
SMALL_SWEEP = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def small_tiles(monkeypatch):
    for op in [op for op in _tile_sizes.TILES if op.startswith("lora_linear")]:
        monkeypatch.setitem(_tile_sizes.TILES, op, {None: SMALL_SWEEP if "sweep" in op else SMALL})


def tensors(M, K, N, r, dtype=torch.float32, rows=None, layout="contiguous", device="cpu", frozen=True):
    """x, weight, bias, lora_a, lora_b and a gradient of y. The update is as large as the frozen product."""
    generator = torch.Generator().manual_seed(M + 7 * K + 31 * N + r)
    adapted = N if rows is None else sum(stop - start for start, stop in rows)
    shapes = ((M, K), (N, K), (N,), (r * len(rows or [0]), K), (adapted, r), (M, N))
    x, w, b, a_, b_, g = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    w, a_ = w / math.sqrt(K), a_ / math.sqrt(K)
    if not frozen:
        w, b = torch.zeros_like(w), torch.zeros_like(b)
    x, w, a_, b_, g = (laid_out(t, layout) for t in (x, w, a_, b_, g))
    return x, w, b, a_, b_, g


def with_gradients(function, x, w, b, lora_a, lora_b, g, **kwargs) -> list[Tensor]:
    """y, dx, da, db."""
    leaves = [t.detach().requires_grad_() for t in (x, lora_a, lora_b)]
    y = function(leaves[0], w, b, leaves[1], leaves[2], **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def eager(x, w, b, lora_a, lora_b, scale, *, dropout=0.0, seed=0, rows=None) -> Tensor:
    """As PEFT computes it, in the inputs' own dtype."""
    y = F.linear(x, w, b)
    s = drop(x, dropout, seed) @ lora_a.T
    spans = rows or ((0, w.shape[0]),)
    blocks = lora_b.split([stop - start for start, stop in spans])
    r = lora_b.shape[1]
    for t, ((start, stop), block) in enumerate(zip(spans, blocks, strict=True)):
        update = (s[:, t * r : t * r + r] @ block.T) * scale
        y = torch.cat([y[:, :start], y[:, start:stop] + update, y[:, stop:]], dim=1)
    return y


def check(strategy, given_tensors, scale=0.7, **kwargs) -> None:
    oracle = with_gradients(lora_linear_reference, *(t.double() for t in given_tensors), scale=scale, **kwargs)
    plain = with_gradients(eager, *given_tensors, scale=scale, **kwargs)
    with guarded_outputs():
        guarded = [surrounded(t) for t in given_tensors]
        got = with_gradients(lora_linear, *guarded, scale=scale, strategy=strategy, **kwargs)
    for name, g, o, p in zip(NAMES, got, oracle, plain, strict=True):
        assert_matches(g, o, p, name=f"{strategy} {name}")


def check_without_cancellation(strategy, M, K, N, r) -> None:
    """All terms positive: then every cell is right to a few eps, whatever the shape."""
    positive = [t.abs() for t in tensors(M, K, N, r)]
    oracle = with_gradients(lora_linear_reference, *(t.double() for t in positive), scale=0.7)
    with guarded_outputs():
        got = with_gradients(lora_linear, *map(surrounded, positive), scale=0.7, strategy=strategy)
    for name, g, o in zip(NAMES, got, oracle, strict=True):
        bound = (M + K + N + r + 8) * torch.finfo(torch.float32).eps
        assert ((g - o).abs() <= bound * o).all(), name


@pytest.mark.parametrize("rows", [None, QV, ((3, 9),)], ids=["all", "qv", "one"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", PLAIN)
def test_matches_fp64(strategy, dtype, rows):
    check(strategy, tensors(70, 45, 60, 5, dtype, rows), rows=rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", PLAIN)
def test_adapters_part_apart(strategy, dtype):
    check(strategy, tensors(70, 45, 60, 5, dtype, frozen=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", PLAIN)
def test_layouts(strategy, layout):
    check(strategy, tensors(33, 17, 60, 3, torch.bfloat16, QV, layout), rows=QV)


@pytest.mark.parametrize("strategy", ["reference", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_matches_fp64(strategy, dtype):
    check(strategy, tensors(70, 45, 60, 5, dtype, QV), rows=QV, dropout=0.3, seed=11)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes(), sizes(), sizes(), st.integers(1, 20), st.sampled_from(["split", "wide_k", "merged"]))
def test_any_shape(M, K, N, r, strategy):
    check_without_cancellation(strategy, M, K, N, r)


@pytest.mark.parametrize("strategy", ["split", "wide_k", "reference"])
@pytest.mark.parametrize("rank", [1, 3, 16, 129, 256])
def test_ranks(rank, strategy):
    check(strategy, tensors(20, 40, 30, rank))


@pytest.mark.parametrize("strategy", ["split", "merged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_b_zero_and_scale_zero_equal_the_base_bit_for_bit(strategy, dtype):
    x, w, b, lora_a, lora_b, _ = tensors(33, 40, 48, 4, dtype)
    base = F.linear(x, w, b)
    assert torch.equal(lora_linear(x, w, b, lora_a, torch.zeros_like(lora_b), 2.0, strategy=strategy), base)
    assert torch.equal(lora_linear(x, w, b, lora_a, lora_b, 0.0, strategy=strategy), base)


def test_rows_outside_the_ranges_are_the_base():
    x, w, b, lora_a, lora_b, _ = tensors(33, 40, 60, 4, rows=QV)
    y = lora_linear(x, w, b, lora_a, lora_b, 1.0, rows=QV)
    assert torch.equal(y[:, 20:40], F.linear(x, w, b)[:, 20:40])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_subsets_of_gradients(needs):
    *args, g = tensors(9, 8, 12, 3)
    wanted = with_gradients(lora_linear, *args, g, scale=0.5)[1:]
    leaves = [t.requires_grad_(need) for t, need in zip((args[0], args[3], args[4]), needs, strict=True)]
    lora_linear(*args, 0.5).backward(g)
    for leaf, gradient, need in zip(leaves, wanted, needs, strict=True):
        assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None


def test_gradients_accumulate_over_calls_with_the_same_tensors():
    x, w, b, lora_a, lora_b, g = tensors(9, 8, 12, 3)
    _, dx, da, db = with_gradients(lora_linear, x, w, b, lora_a, lora_b, g, scale=0.5)
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    y = lora_linear(x, w, b, lora_a, lora_b, 0.5)
    (y + lora_linear(x, w, b, lora_a, lora_b, 0.5)).backward(g)
    y_again = lora_linear(x, w, b, lora_a, lora_b, 0.5)
    y_again.backward(g, retain_graph=True)
    y_again.backward(g)
    for leaf, gradient in zip(leaves, (dx, da, db), strict=True):
        torch.testing.assert_close(leaf.grad, 4 * gradient)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (2, 3)])
def test_leading_dimensions(shape):
    _, w, b, lora_a, lora_b, _ = tensors(1, 8, 12, 3)
    x = torch.randn(*shape, 8, requires_grad=True)
    y = lora_linear(x, w, b, lora_a.requires_grad_(), lora_b, 0.5)
    torch.testing.assert_close(y, lora_linear_reference(x, w, b, lora_a, lora_b, 0.5))
    y.sum().backward()
    assert x.grad.shape == x.shape and lora_a.grad.shape == lora_a.shape


@pytest.mark.parametrize("rows", [None, ((0, 2), (3, 4))])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(rows, dropout):
    x, w, b, lora_a, lora_b, _ = tensors(3, 4, 5, 2, torch.float64, rows)
    kwargs = {"dropout": dropout, "seed": 3, "rows": rows}

    def reference(*args):
        return lora_linear_reference(*args, 0.7, **kwargs)

    def op(x, lora_a, lora_b):
        return lora_linear(x, w, b, lora_a, lora_b, 0.7, **kwargs)

    assert torch.autograd.gradcheck(reference, [t.requires_grad_() for t in (x, w, b, lora_a, lora_b)])
    w, b = w.detach(), b.detach()
    assert torch.autograd.gradcheck(op, (x, lora_a, lora_b))


def test_dropout_zeroes_its_share_scales_the_rest_and_follows_the_seed():
    n, p = 200, 0.3
    x, eye, zero = torch.randn(n, n), torch.eye(n), torch.zeros(n, n)

    def dropped(seed):
        return lora_linear(x, zero, None, eye, eye, 1.0, dropout=p, seed=seed)

    first = dropped(1)
    gone = first == 0
    # four standard deviations of the binomial count
    assert abs(int(gone.sum()) - p * n * n) < 4 * math.sqrt(n * n * p * (1 - p))
    for axis in (0, 1):
        assert (gone.sum(axis) - p * n).abs().max() < 5 * math.sqrt(n * p * (1 - p))
    torch.testing.assert_close(first[~gone], x[~gone] / (1 - p))
    assert torch.equal(first, dropped(1)) and torch.equal(first, dropped(torch.tensor(1)))
    both = (gone & (dropped(2) == 0)).float().mean()
    assert abs(both - p * p) < 4 * math.sqrt(p * p / (n * n))


def test_unseeded_dropout_follows_torchs_generator():
    x, w, b, lora_a, lora_b, _ = tensors(9, 8, 12, 3)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(lora_linear(x, w, b, lora_a, lora_b, 1.0, dropout=0.5))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_adapter_on_a_16_bit_base_gets_fp32_gradients(dtype):
    x, w, b, lora_a, lora_b, g = tensors(33, 40, 48, 4, dtype)
    wide = (x, w, b, lora_a.float(), lora_b.float(), g)
    got = with_gradients(lora_linear, *wide, scale=0.5)
    oracle = with_gradients(lora_linear_reference, *(t.double() for t in wide), scale=0.5)
    assert got[0].dtype == dtype and got[2].dtype == got[3].dtype == torch.float32
    assert_matches(got[0], oracle[0], name="y")
    # their factors S and dS are in 16 bit
    for gradient, wanted in zip(got[1:], oracle[1:], strict=True):
        assert (gradient - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("enabled_in_backward", [False, True])
def test_autocast(enabled_in_backward):
    args = tensors(33, 40, 48, 4)
    leaves = [t.requires_grad_() for t in (args[0], args[3], args[4])]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*args[:5], 0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled_in_backward):
        gradients = torch.autograd.grad(y, leaves, args[5].bfloat16())
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients)
    rounded = [t.detach().bfloat16() for t in args]
    wanted = with_gradients(lora_linear, *rounded, scale=0.5)
    for got, want in zip((y, *gradients), wanted, strict=True):
        torch.testing.assert_close(got.bfloat16(), want, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["plain", "layout", "empty", "rows", "dropout", "no bias"])
def test_opcheck(case):
    rows = QV if case == "rows" else None
    x, w, b, lora_a, lora_b, g = tensors(
        0 if case == "empty" else 9, 8, 60, 3, rows=rows, layout="transpose" if case == "layout" else "contiguous"
    )
    b = None if case == "no bias" else b
    p, seed = (0.4, torch.tensor(5)) if case == "dropout" else (0.0, None)
    flat = [edge for span in rows or () for edge in span]
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    torch.library.opcheck(_op, (leaves[0], w, b, leaves[1], leaves[2], 0.5, p, seed, flat, True, ""))
    s = drop(x, p, seed).detach() @ lora_a.detach().T
    x, lora_a, lora_b = (t.detach() for t in leaves)
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(_backward_op, (g, x, w, lora_a, lora_b, s, 0.5, p, seed, flat, "", needs))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_as_one_graph(dropout):
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def f(x, w, b, lora_a, lora_b):
        return lora_linear(x.relu(), w, b, lora_a, lora_b, 0.5, dropout=dropout, seed=3) * 2

    for M in (9, 5):
        *args, g = tensors(M, 8, 60, 3)
        got = with_gradients(f, *args, g)
        wanted = with_gradients(f._torchdynamo_orig_callable, *args, g)
        for name, a, b in zip(NAMES, got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_compiles_under_autocast_without_a_seed():
    *args, _ = tensors(9, 8, 60, 3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear(*args, 0.5, dropout=0.5)

    assert f(*args).dtype == torch.bfloat16


def test_nan_stays_in_its_row():
    x, w, b, lora_a, lora_b, _ = tensors(9, 8, 12, 3)
    x[4, 2] = math.nan
    y = lora_linear(x, w, b, lora_a, lora_b, 0.5)
    assert y[4].isnan().all() and y.isnan().sum() == 12


def test_a_trained_weight_runs_the_reference_and_says_so():
    *args, g = tensors(9, 8, 12, 3)
    args[1].requires_grad_()
    lora_linear(*args, 0.5).backward(g)
    wanted = args[1].detach().clone().requires_grad_()
    lora_linear_reference(args[0], wanted, *args[2:], 0.5).backward(g)
    assert torch.equal(args[1].grad, wanted.grad)
    assert any("requires a gradient" in row.reason for row in _dispatch.report() if row.op == "lora_linear")
    with pytest.raises(ValueError, match="frozen weight"):
        lora_linear(*args, 0.5, strategy="split")


def test_report_names_the_strategy():
    *args, g = tensors(9, 8, 12, 3)
    with_gradients(lora_linear, *args, g, scale=1.0, strategy="merged")
    named = {row.op: row.implementation for row in _dispatch.report() if row.device == "cpu"}
    assert named["lora_linear"] == named["lora_linear_input"] == "merged"
    assert named["lora_linear_adapter"] == "split"


def test_triton_on_a_cpu_raises_with_the_reason():
    if fused.INTERPRET:
        pytest.skip("the interpreter takes CPU tensors")
    *args, _ = tensors(9, 8, 12, 3)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
        lora_linear(*args, 1.0, strategy="triton")
    with _dispatch.forced("triton"), pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
        lora_linear(*args, 1.0)


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_input", "lora_linear_adapter", "lora_linear_fp8"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_on_a_gpu_triton_is_measured_only_where_the_library_has_no_rival(monkeypatch, op, dropout):
    # no GPU here: fake tensors of one, and the choice itself caught
    offered = []

    def caught(problem, device, candidates):
        offered.extend(candidates)
        return "split", "caught"

    monkeypatch.setattr(choice, "autotune", caught)
    monkeypatch.setattr(choice, "triton_unsupported_reason", lambda *_: None)
    with FakeTensorMode():
        x = torch.empty(8, 16, dtype=torch.bfloat16, device="cuda")
        lora = LoraArgs(x[:4], x[:, :4], 1.0, dropout, None, [])
        forms = dict.fromkeys(("split", "triton", "reference"), lambda *_: x)
        assert choice.run(op, forms, (x,), lora, "", "M8") is x
    has_triton = dropout or op in ("lora_linear_adapter", "lora_linear_fp8")
    assert offered == (["split", "triton"] if has_triton else ["split"])


BAD = {
    "x must be one of": {"x": torch.zeros(2, 8, dtype=torch.int64)},
    r"x must be \[\.\.\., 8\]": {"x": torch.zeros(2, 7)},
    r"weight must be \[N, K\] with": {"weight": torch.zeros(8)},
    "weight must be torch.float32": {"weight": torch.zeros(12, 8, dtype=torch.float16)},
    r"bias must be \[12\]": {"bias": torch.zeros(11)},
    "bias must be on cpu": {"bias": torch.zeros(12, device="meta")},
    r"lora_a must be \[3, 8\]": {"lora_a": torch.zeros(4, 8)},
    r"lora_b must be \[12, r\]": {"lora_b": torch.zeros(11, 3)},
    r"lora_b must be \[rows, r\]": {"lora_b": torch.zeros(12, 0)},
    "lora_a must be torch.float32": {"lora_a": torch.zeros(3, 8, dtype=torch.float16)},
    "scale must be finite": {"scale": math.inf},
    r"dropout must be in \[0, 1\)": {"dropout": 1.0},
    "strategy must be None": {"strategy": "fast"},
    "has no dropout": {"strategy": "merged", "dropout": 0.1},
    "rows must be rising": {"rows": ((0, 13),)},
    r"lora_b must be \[4, r\]": {"rows": ((0, 4),)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    x, weight, bias, lora_a, lora_b, _ = tensors(2, 8, 12, 3)
    good = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "scale": 1.0}
    with pytest.raises(ValueError, match=f"lora_linear: .*{message}"):
        lora_linear(**{**good, **BAD[message]})


# the Triton kernels in the interpreter


@pytest.mark.interp
@pytest.mark.usefixtures("small_tiles")
class TestInterpreted:
    @pytest.mark.parametrize("rows", [None, QV], ids=["all", "qv"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_fp64(self, dtype, rows):
        check("triton", tensors(70, 45, 60, 5, dtype, rows), rows=rows)

    def test_adapters_part_apart(self):
        check("triton", tensors(70, 45, 60, 5, torch.float16, frozen=False))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout):
        check("triton", tensors(33, 40, 60, 3, torch.float16, QV, layout), rows=QV)

    @pytest.mark.parametrize("rank", [1, 20, 70])
    def test_ranks_and_dropout(self, rank):
        check("triton", tensors(40, 33, 35, rank), dropout=0.3, seed=11)

    @pytest.mark.parametrize("M", [0, 1])
    def test_few_rows(self, M):
        check("triton", tensors(M, 8, 12, 3))

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(sizes(70), sizes(70), sizes(70), st.integers(1, 20))
    def test_any_shape(self, M, K, N, r):
        check_without_cancellation("triton", M, K, N, r)

    def test_b_zero_equals_the_bare_kernel_bit_for_bit(self):
        x, w, b, lora_a, lora_b, _ = tensors(33, 40, 48, 4)
        base = torch.empty(33, 48)
        fused._launch(x, w, base, bias=b)
        for scale, lora_b_ in ((2.0, torch.zeros_like(lora_b)), (0.0, lora_b)):
            assert torch.equal(lora_linear(x, w, b, lora_a, lora_b_, scale, strategy="triton"), base)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_tensor_descriptors_equal_pointers(self, transposed):
        x, w, b, lora_a, lora_b, _ = tensors(70, 48, 64, 5, torch.float16)
        w = w.T.contiguous().T if transposed else w
        outputs = []
        for tma in (False, True):
            y, s = torch.empty(70, 64, dtype=x.dtype), torch.empty(70, 5, dtype=x.dtype)
            fused._launch(x, w, y, bias=b, a=lora_a, b=lora_b, s=s, scale=0.5, tma=tma)
            outputs.append((y, s))
        assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize(
    ("matrix", "fits"),
    [
        (torch.empty(6, 16), True),
        (torch.empty(6, 32)[:, 16:], True),
        (torch.empty(6, 32)[:, 1:17], False),  # starts within 16 bytes
        (torch.empty(6, 17)[:, :16], False),  # so do its rows
        (torch.empty(16, 6).T, False),
        (torch.empty(1, 16).expand(6, 16), False),
        (torch.empty(64).as_strided((6, 16), (8, 1)), False),  # windows that overlap
    ],
    ids=["whole", "columns", "start", "rows", "transposed", "expanded", "windows"],
)
def test_tensor_descriptors_want_rows_apart(matrix, fits):
    assert fused._fits_tma(matrix) == fits


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("rows", [None, ((0, 384), (768, 1152))], ids=["all", "qv"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_matches_fp64(self, strategy, dtype, rows):
        check(strategy, tensors(1003, 384, 1152, 16, dtype, rows, device="cuda"), rows=rows)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "merged"])
    def test_adapters_part_apart(self, strategy, dtype):
        check(strategy, tensors(1003, 384, 1152, 16, dtype, device="cuda", frozen=False))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(1, 45, 61, 1), (257, 200, 333, 70), (300, 130, 129, 256)])
    @pytest.mark.parametrize("strategy", ["split", "wide_k", "triton"])
    def test_layouts_and_odd_shapes(self, strategy, shape, layout):
        check(strategy, tensors(*shape, torch.bfloat16, layout=layout, device="cuda"))

    @pytest.mark.parametrize("strategy", ["split", "triton"])
    def test_dropout(self, strategy):
        check(strategy, tensors(1003, 384, 640, 16, torch.bfloat16, device="cuda"), dropout=0.3, seed=11)

    def test_descriptors_equal_pointers(self):
        x, w, b, lora_a, lora_b, _ = tensors(1003, 384, 1152, 16, torch.bfloat16, device="cuda")
        if not fused._has_tma(x.device):
            pytest.skip("no TMA before sm_90")
        outputs = [torch.empty(1003, 1152, dtype=x.dtype, device="cuda") for _ in range(2)]
        s = x.new_empty(0, 16)
        for y, tma in zip(outputs, (False, True), strict=True):
            fused._launch(x, w, y, bias=b, a=lora_a, b=lora_b, s=s, scale=0.5, tma=tma)
        assert torch.equal(*outputs)

    def test_a_hundred_runs_give_one_answer(self):
        *args, g = tensors(1003, 384, 1152, 16, torch.bfloat16, device="cuda")
        runs = [with_gradients(lora_linear, *args, g, scale=0.5, strategy="triton") for _ in range(100)]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

    def test_measured_choice_is_reported_and_repeated(self):
        *args, g = tensors(1003, 384, 1152, 16, torch.bfloat16, device="cuda")
        with_gradients(lora_linear, *args, g, scale=0.5)
        rows = {row.op: row for row in _dispatch.report() if row.op.startswith("lora_linear") and " M1024 " in row.op}
        assert {op.split()[0] for op in rows} == {"lora_linear", "lora_linear_adapter", "lora_linear_input"}
        assert all(row.reason in ("measured", "pinned") for row in rows.values())

    def test_graph_capture_forward_and_backward(self):
        *args, g = tensors(512, 384, 1152, 16, torch.bfloat16, device="cuda")
        leaves = [t.requires_grad_() for t in (args[0], args[3], args[4])]

        def step():
            return torch.autograd.grad(lora_linear(*args, 0.5), leaves, g)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            wanted = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)

    def test_capture_of_a_shape_never_measured(self):
        *args, _ = tensors(77, 96, 80, 7, torch.bfloat16, device="cuda")
        torch.mm(args[0], args[1].T)  # cuBLAS's workspace
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = lora_linear(*args, 0.5)
        graph.replay()
        torch.testing.assert_close(y, lora_linear_reference(*args, 0.5), rtol=2e-2, atol=2e-2)

    @pytest.mark.long
    def test_more_than_2_to_the_31_elements(self):
        M, K, N = 2**31 // 2048 + 300, 64, 2048
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        _, w, b, lora_a, lora_b, _ = tensors(1, K, N, 8, torch.bfloat16, device="cuda")
        y = lora_linear(x, w, b, lora_a, lora_b, 0.5, strategy="triton")
        tail = x[-256:]
        wanted = lora_linear(tail, w, b, lora_a, lora_b, 0.5, strategy="triton")
        assert torch.equal(y[-256:], wanted)
