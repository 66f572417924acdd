"""center_vector: unit rows, center, running center and gate against the plain torch sequence.

    pytest bench/kernels/bench_center_vector.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

In one group: `eager` (plain torch in fp32, the decision left on the device), the reference, the compiled op; `graph`
replays the op from a CUDA graph, which leaves the device's share, and `copy` moves the same bytes (u read, z written).
No time is given for a variant whose result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.kernels import _dispatch, _native
from upstep_fast.kernels import center_vector as cv
from upstep_fast.kernels.gate import HEAD, new_gate_state

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
SHAPES = ((256, 128), (2048, 256), (65536, 256), (8192, 4096)) if ON_GPU else ((256, 128), (2048, 256))
VIEWS = 2
COMPILED = "cuda" if ON_GPU else "cpp"
FORWARD = ("eager", "reference", COMPILED, *(("graph", "copy") if ON_GPU else ()))


def embeddings(shape: tuple[int, int]) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=g) + 0.5).to(DEVICE, DTYPE)


def eager(u: Tensor, running: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    z = F.normalize(u.float(), dim=1)
    s = z.mean(0)
    m = s.norm()
    is_open = m <= reference
    reference.lerp_(m, 0.1)
    running.lerp_(s, 0.1)
    return z, s, is_open


def op(u: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    state = new_gate_state(u.shape[1], DEVICE)
    return lambda: cv.center_vector_update(u, state, num_views=VIEWS)


def variant(name: str, u: Tensor) -> Callable[[], object]:
    if name == "eager":
        running, reference = torch.zeros(u.shape[1], device=DEVICE), torch.zeros((), device=DEVICE)
        return lambda: eager(u, running, reference)
    if name == "copy":
        z = torch.empty(u.shape, device=DEVICE)
        return lambda: z.copy_(u)
    if name != "graph":
        return op(u)
    call, graph = op(u), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return out

    return replay


def check(name: str, got, u: Tensor) -> None:
    wanted = cv.center_vector_reference(u.double(), new_gate_state(u.shape[1], DEVICE), num_views=VIEWS)
    for what, a, b in (("z", got[0], wanted.z), ("center", got[1], wanted.center)):
        error = float((a - b).norm() / b.norm())
        assert error < 4e-7, f"{name}: {what} is wrong (error {error:.1e}); no time given"


def needs(name: str) -> None:
    if name in (COMPILED, "graph") and (reason := _native.native_unsupported_reason(COMPILED, torch.device(DEVICE))):
        pytest.skip(reason)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_center_vector(measure, shape, name):
    needs(name)
    u = embeddings(shape)
    wanted = COMPILED if name == "graph" else name
    with torch.no_grad(), _dispatch.forced(wanted if wanted in _dispatch.IMPLEMENTATIONS else None):
        call = variant(name, u)
        if name != "copy":
            check(name, call(), u)
        num_bytes = u.numel() * (u.element_size() + 4) + 8 * (len(u) + HEAD + u.shape[1])
        measure(call, f"center_vector {shape[0]}x{shape[1]}", "center_vector", bytes=num_bytes, dtype=str(DTYPE))


@pytest.mark.parametrize("name", ("eager", "reference", COMPILED))
@pytest.mark.parametrize("shape", SHAPES)
def test_center_vector_backward(measure, shape, name):
    """From the gradient of z and the penalty |s|^2 to the gradient of u."""
    needs(name)
    u = embeddings(shape).requires_grad_()
    grad_z = torch.randn(shape, device=DEVICE)
    with _dispatch.forced(name if name in _dispatch.IMPLEMENTATIONS else None):
        z, s, *rest = cv.center_vector_update(u, new_gate_state(shape[1], DEVICE))
        coefficient = 2 / shape[0]

        def by_hand() -> Tensor:
            return cv.center_vector_backward(grad_z, s.detach(), coefficient, z.detach(), rest[1], u.dtype)

        x = u.detach().double().requires_grad_()
        z64, s64, *_ = cv.center_vector_reference(x, new_gate_state(shape[1], DEVICE))
        (truth,) = torch.autograd.grad((z64 * grad_z).sum() + s64.square().sum(), x)
        error = float((by_hand() - truth).norm() / truth.norm())
        assert error < 2 * torch.finfo(DTYPE).eps, f"{name}: du is wrong (error {error:.1e}); no time given"
        if name == "eager":
            z, s, _ = eager(u, torch.zeros(shape[1], device=DEVICE), torch.zeros((), device=DEVICE))
            outputs, grads = (z, s), (grad_z, 2 * s.detach())
            call = lambda: torch.autograd.grad(outputs, u, grads, retain_graph=True)  # noqa: E731
        else:
            call = by_hand
        num_bytes = u.numel() * (u.element_size() + 8)
        group = f"center_vector backward {shape[0]}x{shape[1]}"
        measure(call, group, "center_vector", bytes=num_bytes, dtype=str(DTYPE))
