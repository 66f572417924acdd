"""Adapters' products, gradients and merging: right in both layouts, in few launches and bytes."""

import copy
from collections import Counter

import pytest
import torch
from engine_models import model, relative
from torch.utils._python_dispatch import TorchDispatchMode

from upstep_fast.engine import vit as engine
from upstep_fast.engine.adapters import group_adapters
from upstep_fast.engine.block import run_block
from upstep_fast.engine.low_rank import LowRank
from upstep_fast.kernels._dispatch import forced
from upstep_fast.model import lora, pooling

M, N_PART, PARTS, K, R = 23, 6, 3, 10, 2
VIEWS = {
    "detach",
    "unbind",
    "view",
    "select",
    "slice",
    "t",
    "alias",
    "_unsafe_view",
    "unsqueeze",
    "transpose",
    "permute",
}


class Operators(TorchDispatchMode):
    """Names of the operators that run while this is active, and the bytes of what they allocate."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in VIEWS and not name.startswith(("empty", "new_empty")):
            self.names[name] += 1
            if not name.endswith("_") and isinstance(out, torch.Tensor):
                self.bytes += out.numel() * out.element_size()
        return out


def folded(parts, is_wide, dtype=torch.float64):
    """A group's factors of one block, in float64, and the LowRank of `dtype` made of them."""
    vit, _ = model(targets=[("q", "k", "v")[p] for p in parts], depth=1)
    engine_vit = engine.build(vit, torch.float32, fused=is_wide)
    (group,) = group_adapters(dict(enumerate(engine_vit.blocks)))
    g = torch.Generator().manual_seed(0)
    a = torch.randn(1, len(parts), R, K, generator=g, dtype=torch.float64)
    shift = torch.randn(1, len(parts), R, generator=g, dtype=torch.float64)
    b = torch.randn(1, len(parts), vit.embed_dim, R, generator=g, dtype=torch.float64)
    layout = group.layout(b)
    return group, (a[0], shift[0], b[0]), LowRank(
        a[0].flatten(0, 1).to(dtype), shift[0].flatten().to(dtype), layout[0].to(dtype), group.first_columns()
    )  # fmt: skip


def by_formula(parts, a, shift, b, x):
    """The adapters' output by the definition, part by part."""
    y = x.new_zeros(len(x), PARTS, b.shape[1])
    return torch.cat([y[:, p] if p not in parts else (x @ a[i].T + shift[i]) @ b[i].T
                      for p in range(PARTS) for i in [parts.index(p) if p in parts else 0]], -1)  # fmt: skip


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 2), (1, 2), (2,)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_products_and_gradients_are_those_of_float64(parts, is_wide, dtype, limit):
    group, factors, low_rank = folded(parts, is_wide, dtype)
    assert len(low_rank.b) == (1 if is_wide else len(parts))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=g, dtype=torch.float64).to(dtype)
    dy = torch.randn(M, PARTS * factors[2].shape[1], generator=g, dtype=torch.float64).to(dtype)
    leaves = [f.to(dtype).double().requires_grad_() for f in factors]
    x64 = x.double().requires_grad_()
    y64 = by_formula(list(parts), *leaves, x64)
    expected = torch.autograd.grad(y64, [*leaves, x64], dy.double())
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    low_rank.add_output(y, x)
    low_rank.add_input_gradient(dx, dy)
    assert relative(y.double(), y64.detach()) < limit and relative(dx.double(), expected[3]) < limit
    for form in (None, "reference"):
        with forced(form):
            d_a, d_shift, d_b = low_rank.gradients(dy, x)
        assert d_shift.dtype == torch.float32
        of_b = torch.zeros(1, *factors[2].shape, dtype=torch.float64, requires_grad=True)
        (d_b,) = torch.autograd.grad(group.layout(of_b), of_b, d_b[None].double())
        for ours, theirs in zip((d_a, d_shift, d_b), expected, strict=False):
            assert relative(ours.double().flatten(), theirs.flatten()) < limit


def test_what_overflows_outside_the_diagonal_is_dropped():
    group, (_, _, b), _ = folded((0, 1, 2), True)
    b = b[None].requires_grad_()
    d = torch.full_like(group.layout(b), torch.inf)
    n, r = b.shape[2:]
    for t in range(3):
        d[:, :, t * n : (t + 1) * n, t * r : (t + 1) * r] = 1
    (d_b,) = torch.autograd.grad(group.layout(b), b, d)
    assert torch.equal(d_b, torch.ones_like(b))


def test_two_wide_products_read_dy_where_parts_take_six():
    counts = {}
    for is_wide in (False, True):
        _, factors, low_rank = folded((0, 1, 2), is_wide, torch.float32)
        dy, x = torch.randn(M, PARTS * factors[2].shape[1]), torch.randn(M, K)
        with Operators() as seen, forced("reference"):  # the library's products, as on a GPU
            low_rank.gradients(dy, x)
        counts[is_wide] = seen.names["mm"] - 1  # the last is A's, from x
    assert counts == {False: 6, True: 2}


def test_the_adapter_beside_fp8_weights_is_added_without_a_copy_of_the_output():
    for is_wide in (False, True):
        _, factors, low_rank = folded((0, 1, 2), is_wide, torch.bfloat16)
        x, y = torch.randn(M, K).bfloat16(), torch.zeros(M, PARTS * factors[2].shape[1]).bfloat16()
        with Operators() as seen:
            low_rank.add_output(y, x)
        assert seen.bytes == M * PARTS * R * 2  # low alone
        dx = torch.zeros_like(x)
        with Operators() as seen:
            low_rank.add_input_gradient(dx, y)
        assert seen.bytes <= 2 * M * PARTS * R * 2


def merged_in(depth, targets=("q", "k", "v"), **options):
    vit, _ = model("registers, LayerScale", targets, depth=depth)
    built = engine.build(vit, torch.bfloat16, fused=True, **options)
    built.merge_adapters()
    with Operators() as seen:
        built.merge_adapters()
    return sum(seen.names.values())


def test_merging_takes_a_few_launches_at_any_depth():
    few = merged_in(2)
    assert merged_in(5) == few <= 30
    assert merged_in(4, ("q", "v", "proj", "fc1", "fc2")) <= 4 * 30


@pytest.mark.parametrize("variant", ["registers, LayerScale", "EVA-02, q k v apart", "SwiGLU in two matrices"])
def test_wide_merging_rounds_the_sum_to_the_nearest(variant):
    vit, _ = model(variant, ("q", "v", "fc1"))
    truth = engine.build(vit, torch.float32).merge_adapters()
    errors = {}
    for fused in (False, True):
        merged = engine.build(vit, torch.bfloat16, fused=fused).merge_adapters()
        errors[fused] = [
            relative(getattr(ours, name).float(), getattr(exact, name))
            for index in merged
            for ours, exact in zip(merged[index].projections, truth[index].projections, strict=True)
            for name in ("weight", "bias")
        ]
    # bf16 itself is off by 1.7e-3; rounding the factors as well adds what 2^-9 of s B A is beside W
    assert all(wide < 1.15 * each + 1e-4 for each, wide in zip(errors[False], errors[True], strict=True))


def test_gradients_do_not_pass_through_what_the_next_step_merges():
    # the first step's backward, after a second forward has merged again
    vit, images = model()
    run = engine.build(vit, torch.float32, fused=True).features
    parameters = [p for p in vit.parameters() if p.requires_grad]
    alone = torch.autograd.grad(run(images).sum(), parameters)
    first = run(images)
    run(images.flip(0))
    for a, b in zip(torch.autograd.grad(first.sum(), parameters), alone, strict=True):
        assert torch.equal(a, b)


def test_forward_only_gelu_is_the_kernels_where_the_engine_is_fused():
    vit, images = model("class token")
    found = {}
    for fused in (False, True):
        built = engine.build(vit, torch.bfloat16, fused=fused)
        merged = built.merge_adapters()
        x = built.embed(images)
        # by name: on a CPU a compiled pass may be measured as faster than torch's GELU
        with torch.no_grad(), forced("reference"), Operators() as seen:
            found[fused] = run_block(x, None, merged[0])[1]
        assert (seen.names["gelu"] > 0) == (not fused) and (seen.names["gelu_forward"] > 0) == fused
    assert relative(found[True].float(), found[False].float()) < 1e-2


def test_frozen_adapters_are_merged_once():
    vit, _ = model()
    for adapter in lora.find(vit).values():
        adapter.requires_grad_(False)
    built = engine.build(vit, torch.bfloat16, fused=True)
    built.merge_adapters()
    with Operators() as seen:
        built.merge_adapters()
    assert not seen.names
    with torch.no_grad():
        next(iter(lora.find(vit).values())).lora_b.mul_(2)
    with Operators() as seen:
        built.merge_adapters()
    assert seen.names["baddbmm_"]


def test_adapters_frozen_after_training_are_merged_as_they_were_trained_last():
    vit, images = model()
    run = engine.build(vit, torch.float32).features
    run(images)
    for adapter in lora.find(vit).values():
        adapter.lora_b.data.mul_(2)  # moves no version counter, as fused optimizers do not
        adapter.requires_grad_(False)
    with torch.no_grad():
        assert relative(run(images), vit(images)) < 1e-5


def test_one_adapter_for_all_of_qkv_and_one_for_q_are_of_two_groups():
    (vit, images), (other, _) = model(targets=("qkv",)), model(targets=("q",))
    vit.blocks[1] = other.blocks[1]
    with torch.no_grad():
        assert relative(engine.build(vit, torch.float32).features(images), vit(images)) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_of_any_type_are_merged_in_fp32(dtype, fused):
    vit, images = model(targets=["q", "v", "proj", "fc1"])
    adapters = [(name, p) for name, p in vit.named_parameters() if "lora_" in name]
    for _, p in adapters:
        p.data = p.data.to(dtype)
    wide = copy.deepcopy(vit).double()
    got = engine.build(vit, torch.float32, fused=fused).features(images)
    wanted = pooling.features(wide, images.double())
    assert got.dtype == torch.float32 and relative(got, wanted) < 1e-6
    got.double().square().sum().backward()
    wanted.square().sum().backward()
    # the fused form keeps GELU's derivative as one byte, and a gradient is rounded to its adapter's type
    limit = 5e-3 if fused or dtype == torch.bfloat16 else 2e-6
    for name, p in adapters:
        assert p.grad.dtype == dtype and relative(p.grad.double(), wide.get_parameter(name).grad) < limit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_other_weights_than_fp32_is_refused_in_one_line(dtype):
    vit, _ = model()
    with pytest.raises(ValueError, match=r"^engine: cannot fold this model: its weights are in \w+, not float32: .*$"):
        engine.build(vit.to(dtype), torch.float32)
