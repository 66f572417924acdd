"""Launches that are remembered: what goes back to Triton, and what reaches the driver; ops without their wrapper."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from upstep_fast.kernels import _triton
from upstep_fast.kernels._triton import launch
from upstep_fast.kernels.layer_norm import layer_norm_backward, layer_norm_forward


class Kernel:
    """A kernel of Triton's that compiles nothing: what it was asked for, and what its compiled form was given."""

    arg_names = ("x", "y", "n", "eps", "FIRST", "BLOCK")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.compiled.append((grid, args, constants))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_triton, "_compiled", {})
    return Kernel()


CONSTANTS = {"BLOCK": 64, "FIRST": True, "num_warps": 4, "enable_fp_fusion": True}  # not in the order of the signature


def test_the_second_launch_skips_the_lookup_and_passes_what_the_signature_wants(kernel):
    x, y = torch.empty(8), torch.empty(8)
    for programs in (3, 5):
        launch(kernel, programs, (x, y, 8, 1e-6), **CONSTANTS)
    assert len(kernel.compiled) == 1 and kernel.compiled[0] == ((3,), (x, y, 8, 1e-6), CONSTANTS)
    ((grid, args),) = kernel.launched
    assert grid == (5, 1, 1) and args[2:] == (8, 1e-6, True, 64) and args[0] is x and args[1] is y


@pytest.mark.parametrize(
    ("x", "n", "constants"),
    [
        (torch.empty(8).half(), 8, {}),
        (torch.empty(9)[1:], 8, {}),  # not aligned to 16 bytes, which Triton compiles loads for
        (torch.empty(8), 9, {}),
        (torch.empty(8), 8, {"BLOCK": 128}),
        (torch.empty(8), 8, {"num_warps": 8}),
        (torch.empty(8), 8.0, {}),  # equal to 8, and another type
        (torch.empty(8), 8, {"num_stages": 2}),
    ],
)
def test_what_triton_would_compile_anew_goes_back_to_it(kernel, x, n, constants):
    launch(kernel, 1, (torch.empty(8), torch.empty(8), 8, 1e-6), **CONSTANTS)
    launch(kernel, 1, (x, torch.empty(8), n, 1e-6), **CONSTANTS | constants)
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_constants_of_equal_values_and_other_names_are_others(kernel):
    for name in ("maxnreg", "num_stages"):
        launch(kernel, 1, (torch.empty(8), torch.empty(8), 8, 1e-6), **CONSTANTS, **{name: 2})
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_the_interpreter_which_compiles_nothing_is_asked_each_time(kernel):
    kernel.__class__ = type("Interpreted", (Kernel,), {"__getitem__": lambda self, grid: self.compiled.append})
    for _ in range(2):
        launch(kernel, 1, (torch.empty(8),))
    assert len(kernel.compiled) == 2 and not _triton._compiled


def test_memory_for_shapes_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(_triton, "MAX_COMPILED", 4)
    for n in range(20):
        launch(kernel, 1, (torch.empty(8), torch.empty(8), n, 1e-6), **CONSTANTS)
    assert len(_triton._compiled) <= 4


def test_an_op_is_seen_by_whoever_observes_operators_and_gives_the_same_unobserved():
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 8)
    with torch.no_grad():
        unobserved = layer_norm_forward(x, residual=x)
        with Names():
            observed = layer_norm_forward(x, residual=x)
            layer_norm_backward(x, observed.y, observed.rstd)
    assert torch.equal(observed.y, unobserved.y) and {"layer_norm_forward", "layer_norm_backward"} <= set(names)


def test_a_backward_by_hand_leaves_no_graph():
    x = torch.randn(3, 8, requires_grad=True)
    out = layer_norm_forward(x.detach())
    assert not layer_norm_backward(x, out.y, out.rstd)[0].requires_grad
