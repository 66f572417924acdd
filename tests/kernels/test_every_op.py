"""What holds for every op of the kernels: the problems of kernels/_sample_inputs.py, on a CPU."""

from __future__ import annotations

import itertools
import logging
import re
import threading

import pytest
import torch
from torch import Tensor

from upstep_fast.kernels import _dispatch, _tile_sizes
from upstep_fast.kernels._dispatch import IMPLEMENTATIONS, choose, forced
from upstep_fast.kernels._sample_inputs import SAMPLE_INPUTS, SampleInputs, sample_inputs

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
