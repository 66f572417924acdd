"""Self-check: every op, by every implementation that runs here, against its reference in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _dispatch as dispatch
from ._sample_inputs import SAMPLE_INPUTS, SampleInputs, sample_inputs

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of ||difference|| / ||reference||


@dataclass(frozen=True)
class Outcome:
    """Result of one check. Errors are relative, and None where nothing was computed."""

    op: str
    device: str
    dtype: str
    implementation: str
    forward: float | None
    backward: float | None
    limit: float
    passed: bool | None  # None: this implementation cannot run here, which `note` explains
    note: str = ""


def check_all(device: torch.device) -> tuple[list[Outcome], list[dispatch.Choice]]:
    """Return the outcome of every check on `device`, and the choices for each op when nothing is forced."""
    outcomes: list[Outcome] = []
    choices: list[dispatch.Choice] = []
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16)
    for name in SAMPLE_INPUTS:
        for dtype in dtypes:
            outcome, ran = check(name, device, dtype)
            kinds = " and ".join(sorted({choice.implementation for choice in ran}))
            outcomes.append(replace(outcome, implementation=f"{kinds} (chosen)".lstrip()))
            choices += [choice for choice in ran if choice not in choices]
            for implementation in (other for other in dispatch.IMPLEMENTATIONS if other != kinds):
                outcome, ran = check(name, device, dtype, implementation)
                # an op without this implementation has run as it does when nothing is forced
                if outcome.passed is None or any(choice.implementation == implementation for choice in ran):
                    outcomes.append(outcome)
    return outcomes, choices


def check(
    name: str, device: torch.device, dtype: torch.dtype, implementation: str | None = None
) -> tuple[Outcome, list[dispatch.Choice]]:
    """Check one op in one dtype by one implementation (None: the chosen one); returns the outcome and what ran."""
    dispatch.forget()
    limit, forward, backward, note = LIMITS[dtype], None, None, ""
    passed: bool | None = False
    try:
        sample = sample_inputs(name)
        limit = max(limit, sample.limit)
        with dispatch.forced(implementation):
            forward, backward = _errors(sample, device, dtype)
        passed = forward <= limit and (backward is None or backward <= limit)  # a NaN fails
    except Exception as error:  # whatever is broken, the other checks still run
        note = str(error).split("\n")[0]
        lacks_float64 = device.type == "mps" and "float64" in note  # such ops are left to the CPU
        passed = None if lacks_float64 or "was requested but cannot run" in note else False
    kind = str(dtype).removeprefix("torch.")
    outcome = Outcome(name, device.type, kind, implementation or "", forward, backward, limit, passed, note)
    return outcome, dispatch.report()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Compute ||got - expected|| / ||expected|| in float64."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    return float((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _errors(sample: SampleInputs, device: torch.device, dtype: torch.dtype) -> tuple[float, float | None]:
    # both see the same numbers, those that `dtype` can hold
    inputs = sample.to(device, dtype)
    exact = [t.detach().cpu().double() if t.is_floating_point() else t.cpu() for t in inputs]
    for i in sample.wrt:
        inputs[i].requires_grad_()
        exact[i].requires_grad_()
    got, expected = sample.call(*inputs), sample.reference(*exact)
    forward = relative_error(got, expected)
    if not sample.wrt:
        return forward, None
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(got.dtype)
    grads = torch.autograd.grad(got, [inputs[i] for i in sample.wrt], weight.to(device))
    exact_grads = torch.autograd.grad(expected, [exact[i] for i in sample.wrt], weight.to(expected.dtype))
    return forward, max(map(relative_error, grads, exact_grads))
