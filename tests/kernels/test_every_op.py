"""What holds for every op of the kernels: the problems of kernels/_sample_inputs.py, on a CPU."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upstep_fast.kernels import _dispatch, _tile_sizes
from upstep_fast.kernels._dispatch import IMPLEMENTATIONS, choose, forced, forget, report
from upstep_fast.kernels._sample_inputs import SAMPLE_INPUTS, SampleInputs, sample_inputs
from upstep_fast.kernels._transforms import REASON

GPU = torch.device("cuda", 0)


def made(name: str) -> SampleInputs:
    return sample_inputs(name)


@pytest.fixture(params=list(SAMPLE_INPUTS))
def problem(request) -> SampleInputs:
    return made(request.param)


WITH_GRADIENT = [name for name in SAMPLE_INPUTS if made(name).wrt]
OF_SEVERAL = [name for name in SAMPLE_INPUTS if len(made(name).wrt) > 1]


def leaves(problem: SampleInputs, wrt: tuple[int, ...]) -> list[Tensor]:
    return [t.clone().requires_grad_(i in wrt) for i, t in enumerate(problem.inputs)]


def gradients(problem: SampleInputs, wrt: tuple[int, ...], call=None) -> dict[int, Tensor]:
    inputs = leaves(problem, wrt)
    out = (call or problem.call)(*inputs)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return dict(zip(wrt, torch.autograd.grad(out, [inputs[i] for i in wrt], weight), strict=True))


@pytest.mark.parametrize("problem", OF_SEVERAL, indirect=True)
def test_gradients_of_some_inputs_are_those_of_all(problem):
    of_all = gradients(problem, problem.wrt)
    for count in range(1, len(problem.wrt)):
        for some in itertools.combinations(problem.wrt, count):
            for i, gradient in gradients(problem, some).items():
                torch.testing.assert_close(gradient, of_all[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("problem", WITH_GRADIENT, indirect=True)
def test_what_is_forced_reaches_the_threads_of_backward(problem):
    # autograd runs backward of CUDA tensors in threads of its own; any other thread stands in
    _dispatch.forget()
    with forced("reference"):
        inputs = leaves(problem, problem.wrt)
        out = problem.call(*inputs).sum()
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
    assert all(inputs[i].grad is not None for i in problem.wrt)
    assert {choice.implementation for choice in _dispatch.report()} == {"reference"}


@pytest.mark.parametrize("problem", WITH_GRADIENT, indirect=True)
def test_gradients_accumulate(problem):
    inputs = leaves(problem, problem.wrt)
    for _ in range(2):
        problem.call(*inputs).sum().backward()
    once = leaves(problem, problem.wrt)
    problem.call(*once).sum().backward()
    for i in problem.wrt:
        torch.testing.assert_close(inputs[i].grad, 2 * once[i].grad)


# forward mode, the transforms of torch.func, and second derivatives: those of the reference, or an error. An op that
# torch.library knows no formula for gives a derivative of zero, or None

WITHOUT = ("sinkhorn", "quantize")  # no gradient flows to their inputs, by definition


def of_one(problem: SampleInputs, call):
    i = problem.wrt[0]
    return lambda x: call(*[x if j == i else t for j, t in enumerate(problem.inputs)])


def weighted(problem: SampleInputs, call):
    def loss(x):
        out = of_one(problem, call)(x)
        return (out.sin() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum()

    return loss


def forward_mode(problem, call, x, v):
    return torch.func.jvp(of_one(problem, call), (x,), (v,))[1]


def dual_numbers(problem, call, x, v):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        return torch.autograd.forward_ad.unpack_dual(of_one(problem, call)(dual)).tangent


def dual_numbers_with_gradient(problem, call, x, v):
    return dual_numbers(problem, call, x.requires_grad_(), v).detach()


def functional_gradient(problem, call, x, v):
    return torch.func.grad(weighted(problem, call))(x)


def mapped_gradient(problem, call, x, v):
    return torch.func.vmap(torch.func.grad(weighted(problem, call)))(torch.stack([x, v]))


def hessian_product(problem, call, x, v):
    return torch.func.jvp(torch.func.grad(weighted(problem, call)), (x,), (v,))[1]


def gradient_of_gradient(problem, call, x, v):
    return torch.func.grad(lambda x: (torch.func.grad(weighted(problem, call))(x) * v).sum())(x)


def compiled_forward_mode(problem, call, x, v):
    torch._dynamo.reset()
    return torch.compile(lambda x, v: forward_mode(problem, call, x, v), backend="eager")(x, v)


TRANSFORMS = [forward_mode, dual_numbers, dual_numbers_with_gradient, functional_gradient, mapped_gradient]
SECOND = [hessian_product, gradient_of_gradient]


@pytest.mark.parametrize("transform", [*TRANSFORMS, *SECOND])
@pytest.mark.parametrize("problem", WITH_GRADIENT, indirect=True)
def test_every_transform_is_that_of_the_reference(problem, transform):
    x = problem.inputs[problem.wrt[0]]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    wanted = transform(problem, problem.reference, x.clone(), v)
    assert wanted.norm() > 0
    torch.testing.assert_close(transform(problem, problem.call, x.clone(), v), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora_linear", "gelu"])
def test_forward_mode_compiles(name):
    problem = made(name)
    x = problem.inputs[0]
    wanted = forward_mode(problem, problem.reference, x, x.cos())
    torch.testing.assert_close(compiled_forward_mode(problem, problem.call, x, x.cos()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("problem", WITH_GRADIENT, indirect=True)
def test_a_second_derivative_of_plain_autograd_is_an_error_where_it_is_not_zero(problem):
    def second(call):
        x = problem.inputs[problem.wrt[0]].clone().requires_grad_()
        # the gradient, and another way to x beside it, which would hide a part that is missing
        (first,) = torch.autograd.grad(weighted(problem, call)(x), x, create_graph=True)
        return torch.autograd.grad((first.cos() * x.sin()).sum(), x)[0]

    wanted = second(problem.reference)
    try:
        torch.testing.assert_close(second(problem.call), wanted, rtol=1e-4, atol=1e-5)
    except (RuntimeError, NotImplementedError) as error:
        assert re.search("no autograd formula|its backward has no derivative", str(error))


@pytest.mark.parametrize("name", WITHOUT)
def test_no_derivative_flows_where_none_is_defined(name):
    problem = replace(made(name), wrt=(0,))
    x = problem.inputs[0]
    assert forward_mode(problem, problem.call, x, x.cos()).abs().max() == 0
    assert not problem.call(x.clone().requires_grad_()).requires_grad


def test_views_have_no_derivative():
    problem = replace(made("views"), wrt=(3,))
    x = problem.inputs[3]
    for transform in TRANSFORMS:
        with pytest.raises(NotImplementedError, match="make_views: has no derivative"):
            transform(problem, problem.call, x.clone(), x.clone())
    with pytest.raises(NotImplementedError, match="make_views: has no derivative"):
        problem.call(*problem.inputs[:3], x.clone().requires_grad_(), *problem.inputs[4:])


def test_what_a_transform_runs_is_reported():
    forget()
    problem = made("gelu")
    forward_mode(problem, problem.call, problem.inputs[0], problem.inputs[0])
    assert [(row.implementation, row.reason) for row in report()] == [("reference", REASON)]


def test_compiles_as_one_graph_backward_too(problem):
    torch._dynamo.reset()
    compiled = torch.compile(problem.call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*problem.inputs), problem.call(*problem.inputs))
    if problem.wrt:
        wanted = gradients(problem, problem.wrt)
        for i, gradient in gradients(problem, problem.wrt, compiled).items():
            torch.testing.assert_close(gradient, wanted[i])


def test_meta_tensors_have_the_shape_and_dtype(problem):
    found, wanted = problem.call(*(t.to("meta") for t in problem.inputs)), problem.call(*problem.inputs)
    assert (found.device.type, found.shape, found.dtype) == ("meta", wanted.shape, wanted.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_forced_runs_or_the_reason_is_raised(problem, implementation):
    wanted = problem.call(*problem.inputs)
    with forced(implementation):
        try:
            got = problem.call(*problem.inputs)
        except RuntimeError as error:
            assert implementation != "reference"
            assert re.search(f"'{implementation}' was requested but cannot run: .", str(error))
            return
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_a_fallback_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_report", {})
    monkeypatch.setattr(_dispatch, "_logged", set())
    wide = {"triton": "a row is too wide", "reference": None}
    with caplog.at_level(logging.INFO):
        # a model whose layers differ asks in turn
        for _ in range(3):
            assert choose("norm", GPU, {"triton": None, "reference": None}) == "triton"
            assert choose("norm", GPU, wide) == "reference"
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert caplog.records[1].getMessage() == "norm on cuda: reference (not triton: a row is too wide)"
    assert [row.implementation for row in _dispatch.report()] == ["reference"]


def test_on_a_cpu_a_fallback_is_no_warning(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_report", {})
    monkeypatch.setattr(_dispatch, "_logged", set())
    with caplog.at_level(logging.INFO):
        choose("norm", torch.device("cpu"), {"triton": "needs CUDA tensors, got cpu", "reference": None})
    assert not caplog.records


@pytest.mark.parametrize("op", list(_tile_sizes.TILES))
def test_an_unknown_gpu_has_tiles(op, monkeypatch):
    monkeypatch.setattr(_tile_sizes, "_capability", lambda device: (99, 0))
    assert _tile_sizes.tile(op, GPU) == _tile_sizes.TILES[op][None]
