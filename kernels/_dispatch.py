"""Which implementation of an op runs, and why. Never silent.

Every op offers up to four implementations:

    reference   plain torch; runs anywhere; the specification
    triton      the Triton kernels; a CUDA device (or the interpreter, when forced)
    cpp         the compiled op on CPU tensors
    cuda        the compiled op on CUDA tensors

`choose` takes them in order of preference, each with the reason it cannot run (None: it can), returns the
first that can, and remembers the answer for `report()`. `UPSTEP_FAST_KERNELS`, or `forced(...)`, names one for
every op that has it; if that one cannot run, the call raises with the reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from . import _triton

IMPLEMENTATIONS = ("reference", "triton", "cpp", "cuda")

# One namespace per copy of this folder: torch.library lets a second registration of a name replace the first
# without a word, so a copied `kernels/` must not share names with the installed one.
NAMESPACE = (__package__ or "kernels").replace(".", "_")

_log = logging.getLogger(__name__)
_forced: ContextVar[str | None] = ContextVar("forced_implementation", default=None)
_report: dict[tuple[str, str], Choice] = {}
_said: set[Choice] = set()  # in the log


@dataclass(frozen=True)
class Choice:
    """What runs for one op on one kind of device, and why."""

    op: str
    device: str
    implementation: str
    reason: str


@contextlib.contextmanager
def forced(implementation: str | None) -> Iterator[None]:
    """Within this context every op that has `implementation` runs it, or raises saying why it cannot."""
    token = _forced.set(_checked(implementation, "implementation"))
    try:
        yield
    finally:
        _forced.reset(token)


def force(implementation: str | None) -> None:
    """As `forced`, until called again; None (or "auto") returns the choice to the dispatcher."""
    _forced.set(_checked(implementation, "implementation"))


def requested() -> str | None:
    """The implementation asked for by `forced`, `force` or UPSTEP_FAST_KERNELS; None: free choice."""
    return _forced.get() or _checked(os.environ.get("UPSTEP_FAST_KERNELS"), "UPSTEP_FAST_KERNELS")


def choose(op: str, device: torch.device, candidates: Mapping[str, str | None]) -> str:
    """Return the implementation of `op` to run on `device`.

    candidates: implementation -> reason it cannot run (None: it can), in order of preference.
    Raises RuntimeError when the one asked for cannot run.
    """
    want = requested()
    # an op without the wanted kind keeps its own order: forcing "cuda" must not break an op that has no CUDA form
    if want is not None and want in candidates:
        if candidates[want] is not None:
            raise RuntimeError(f"{op}: implementation {want!r} was requested but cannot run: {candidates[want]}")
        return record(op, device, want, "requested", fallback=False)
    passed = []
    for name, why_not in candidates.items():
        if why_not is None:
            return record(op, device, name, "; ".join(passed) or "preferred", fallback=bool(passed))
        passed.append(f"not {name}: {why_not}")
    raise RuntimeError(f"{op}: no implementation can run on {device}: {'; '.join(passed)}")


def triton_unsupported_reason(*tensors: torch.Tensor | None) -> str | None:
    """Why Triton cannot take these tensors, or None if it can."""
    if _triton.MISSING:
        return _triton.MISSING
    given = [t for t in tensors if t is not None]
    if all(t.is_cuda for t in given) or _triton.INTERPRET:
        return None
    return f"needs CUDA tensors, got {given[0].device}"


def report() -> list[Choice]:
    """What has run so far: one row per op and kind of device."""
    return sorted(_report.values(), key=lambda c: (c.op, c.device))


def forget() -> None:
    """Empty the report, so that the next one says what ran after this."""
    _report.clear()


def record(op: str, device: torch.device, implementation: str, reason: str, *, fallback: bool = False) -> str:
    """Note what runs for `op` on `device` (row of `report()`, once in the log) and returns it."""
    choice = Choice(op, device.type, implementation, reason)
    if _report.get((op, device.type)) != choice:
        _report[op, device.type] = choice
        if choice not in _said:
            _said.add(choice)
            # on a GPU a passed-over kernel costs speed, so it is said aloud; on a CPU it is the normal case
            level = logging.DEBUG if device.type == "cpu" else logging.WARNING if fallback else logging.INFO
            _log.log(level, "%s on %s: %s (%s)", op, device.type, implementation, reason)
    return implementation


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: {name!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}")
    return name
