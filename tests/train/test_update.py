"""The backward half of a step: which parameters have got a gradient."""

import math

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from upstep_fast.train.update import _has_gradient


class Count(TorchDispatchMode):
    """Number of operators that run."""

    def __init__(self):
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return func(*args, **(kwargs or {}))


def test_any_entry_other_than_zero_is_a_gradient():
    values = {0.0: False, 1e-45: True, -1e-30: True, math.nan: True, -math.inf: True}
    parameters = [Parameter(torch.zeros(3, 2)) for _ in range(len(values) + 1)]
    for parameter, value in zip(parameters, values, strict=False):
        parameter.grad = torch.zeros(3, 2)
        parameter.grad[2, 1] = value
    assert _has_gradient(parameters).tolist() == [*values.values(), False]


def test_the_number_of_operators_does_not_grow_with_the_parameters():
    counts = []
    for number in (2, 50):
        parameters = [Parameter(torch.zeros(3, 2)) for _ in range(number)]
        for parameter in parameters:
            parameter.grad = torch.ones(3, 2)
        with Count() as count:
            _has_gradient(parameters)
        counts.append(count.operators)
    assert counts[0] == counts[1]
