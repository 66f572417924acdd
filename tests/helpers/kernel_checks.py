"""What every kernel is held to: numerics (RELIABILITY section 6), guard cells, poisoned outputs.

conftest.py makes this a plain import in any test: `from kernel_checks import assert_matches, ...`.

    oracle = X_reference(*(t.double() for t in inputs))    fp64, on the same rounded inputs
    eager = X_reference(*inputs)                            what a user would write, in the inputs' dtype
    with guarded_outputs():                                 NaN in, and guard cells around, all that X allocates
        got = X(*(surrounded(t) for t in inputs))           NaN around each input
    assert_matches(got, oracle, eager)

Compare the adapter's part of a LoRA product apart from the frozen part: pass differences from the base.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

GUARD_BYTES = 512  # a multiple of any alignment a kernel may count on
POISON = 0xFF  # of every byte: NaN in each float format, fp8 included; -1 in the integers
MIN_GROUPS = 8

# condition (b): the largest relative RMS error, whatever eager does
RMS_LIMIT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def assert_matches(
    got: Tensor,
    oracle: Tensor,
    eager: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """Raises AssertionError unless `got` meets the three conditions against the fp64 `oracle`.

    (a) max error <= 2 x eager's + eps max|oracle|
    (b) relative RMS error <= 2 x eager's + eps / sqrt(12), and <= RMS_LIMIT
    (c) mean error, signed and also toward or away from zero, within 3 standard errors + eps / 8 of zero, in a
        matrix of at least 8 rows and 8 columns (fewer say nothing of a mean)
    The eps terms are what correct rounding costs where eager is exact; truncation has a mean error of 0.36 eps.

    eager: the plain computation in the same precision; None: an exact one, rounded, so only the floors count.
    dtype: whose eps and RMS_LIMIT hold; None: that of `got`. Name it where a result in fp32 was made of products
        rounded to fp16 or bf16. NaN and infinities must lie in the same cells.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, oracle has {tuple(oracle.shape)}"
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, got {oracle.dtype}"
    if eager is not None:
        assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, eager has {eager.dtype}"
    dtype = got.dtype if dtype is None else dtype
    # the interpreter truncates when it stores bf16: one more step of error there, and a bias
    truncates = interpreting() and got.dtype == torch.bfloat16
    plain = oracle.to(got.dtype) if eager is None else eager
    got, plain, oracle = (t.detach().double().cpu() for t in (got, plain, oracle))

    finite = oracle.isfinite()
    differ = (got.isfinite() != finite) | (got.isnan() != oracle.isnan()) | (~finite & (got.sign() != oracle.sign()))
    differ &= ~(got.isnan() & oracle.isnan())
    assert not differ.any(), f"{name}: {int(differ.sum())} of {got.numel()} cells are NaN or infinite on one side only"
    if not finite.any():
        return
    eps = torch.finfo(dtype).eps
    error, plain_error = ((t - oracle).where(finite, 0.0) for t in (got, plain))
    size = oracle.where(finite, 0.0)

    worst, limit = float(error.abs().max()), float(2 * plain_error.abs().max() + eps * size.abs().max())
    limit += truncates * eps * float(size.abs().max())
    assert worst <= limit, f"{name}: (a) max error {worst:.3e} > {limit:.3e} (twice eager's and one rounding)"

    scale = float(size.square().mean().sqrt())
    if scale > 0:
        rms, plain_rms = (float(e.square().mean().sqrt()) / scale for e in (error, plain_error))
        limit = min(2 * plain_rms + eps / math.sqrt(12), RMS_LIMIT[dtype])
        limit += truncates * eps
        assert rms <= limit, f"{name}: (b) relative RMS error {rms:.3e} > {limit:.3e} (eager {plain_rms:.3e})"

    if not truncates:
        slack = eps / 8 * float(size.abs().mean())
        for direction, signed in (("signed", error), ("away from zero", error * size.sign())):
            mean, limit = float(signed.mean()), 3 * _standard_error(signed) + slack
            assert abs(mean) <= limit, f"{name}: (c) mean error {mean:.3e} ({direction}) beyond {limit:.3e}"


def _standard_error(error: Tensor) -> float:
    """Of the mean, where cells of one row, or of one column, may share their error; infinite if they are too few."""
    matrix = error.flatten(0, -2) if error.dim() > 1 else error[:, None].expand(-1, MIN_GROUPS)
    if min(matrix.shape) < MIN_GROUPS:
        return math.inf
    groupings = (matrix.flatten(), matrix.mean(1), matrix.mean(0))
    return max(float(g.std()) / math.sqrt(len(g)) for g in groupings)


def surrounded(t: Tensor) -> Tensor:
    """A copy of `t` with its strides, and NaN (integers: -1) before, after and in the gaps of it."""
    inside, _ = _in_guard_cells(t)
    return inside.copy_(t.detach()).requires_grad_(t.requires_grad)


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Within it torch.empty, empty_like, empty_strided and new_empty give NaN with guard cells around.

    On leaving raises AssertionError if any guard cell was written. A cell that no kernel wrote stays NaN, and
    `assert_matches` finds it.
    """
    made: list[tuple[Tensor, Tensor]] = []

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            t = allocate(*args, **kwargs)
            if type(t) is not Tensor or t.device.type == "meta" or not t.numel() or kwargs.get("out") is not None:
                return t
            inside, buffer = _in_guard_cells(t)
            made.append((inside, buffer))
            return inside

        return wrapper

    places = [(torch, n) for n in ("empty", "empty_like", "empty_strided")] + [(Tensor, "new_empty")]
    originals = [getattr(place, name) for place, name in places]
    for (place, name), original in zip(places, originals, strict=True):
        setattr(place, name, poisoned(original))
    try:
        yield
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)
    for inside, buffer in made:
        guards = torch.cat([buffer[:GUARD_BYTES], buffer[-GUARD_BYTES:]])
        written = int((guards != POISON).sum())
        assert not written, f"{written} bytes written outside an output of shape {tuple(inside.shape)}"


def _in_guard_cells(t: Tensor) -> tuple[Tensor, Tensor]:
    """A poisoned tensor like `t` (shape, strides, dtype, device) and the bytes it lies in."""
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    num_bytes = 2 * GUARD_BYTES + span * t.element_size()
    buffer = torch.full((num_bytes,), POISON, dtype=torch.uint8, device=t.device)
    cells = buffer[GUARD_BYTES : num_bytes - GUARD_BYTES].view(t.dtype)
    return cells.as_strided(t.shape, t.stride()), buffer


def interpreting() -> bool:
    """Whether Triton kernels run in the CPU interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of a matrix `t`, laid out as "contiguous", a "slice" of wider rows, or a "transpose"."""
    if layout == "slice":
        return torch.cat([t, t.new_zeros(t.shape[0], 3)], dim=1)[:, : t.shape[1]]
    return t.T.contiguous().T if layout == "transpose" else t.contiguous()


LAYOUTS = ("contiguous", "slice", "transpose")


def sizes(high: int = 130, low: int = 1) -> st.SearchStrategy[int]:
    """Hypothesis: a size from `low` to `high`, most often at the edge of a tile."""
    edges = sorted({n + d for n in (1, 2, 16, 32, 64, 128, 256) for d in (-1, 0, 1) if low <= n + d <= high})
    return st.sampled_from(edges) | st.integers(low, high)
