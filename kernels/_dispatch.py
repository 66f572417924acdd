"""Dispatch: which implementation of an op runs, and why. Never silent.

Every op offers up to four implementations:

    reference   plain torch; runs anywhere; the specification
    triton      the Triton kernels; a CUDA device (or the interpreter, when forced)
    cpp         the compiled op on CPU tensors
    cuda        the compiled op on CUDA tensors

`choose` takes them in order of preference, each with the reason it cannot run (None: it can), returns the
first that can, and records it for `report()`. `UPSTEP_FAST_KERNELS`, or `forced(...)`, names one for
every op that has it; if that one cannot run, the call raises with the reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from . import _triton

IMPLEMENTATIONS = ("reference", "triton", "cpp", "cuda")

# One namespace per copy of this folder: torch.library lets a second registration of a name replace the first
# without a word, so a copied `kernels/` must not share names with the installed one.
NAMESPACE = (__package__ or "kernels").replace(".", "_")

_log = logging.getLogger(__name__)
# of the process, not of the thread: backward of CUDA tensors runs in autograd's own threads
_forced: str | None = None
_report: dict[tuple[str, str], Choice] = {}
_logged: set[Choice] = set()


@dataclass(frozen=True)
class Choice:
    """Implementation of one op on one kind of device, and the reason."""

    op: str
    device: str
    implementation: str
    reason: str


@contextlib.contextmanager
def forced(implementation: str | None) -> Iterator[None]:
    """Run `implementation` within this context, for every op that has it; an op that cannot run it raises.

    Holds for all threads of the process.
    """
    before = _forced
    force(implementation)
    try:
        yield
    finally:
        force(before)


def force(implementation: str | None) -> None:
    """Set `implementation` as `forced` does, until called again; None or "auto" gives the choice back."""
    global _forced
    _forced = _checked(implementation, "implementation")


def requested() -> str | None:
    """Return the implementation requested by `forced`, `force` or UPSTEP_FAST_KERNELS; None: free choice."""
    return _forced or _checked(os.environ.get("UPSTEP_FAST_KERNELS"), "UPSTEP_FAST_KERNELS")


def choose(op: str, device: torch.device, candidates: Mapping[str, str | None]) -> str:
    """Return the implementation of `op` to run on `device`.

    candidates: implementation -> reason it cannot run (None: it can), in order of preference.
    Raises RuntimeError when the requested one, or all of them, cannot run.
    """
    request = requested()
    # an op without the requested kind has its own order: forcing "cuda" must not break an op that has no CUDA form
    if request is not None and request in candidates:
        if candidates[request] is not None:
            raise RuntimeError(f"{op}: implementation {request!r} was requested but cannot run: {candidates[request]}")
        return record(op, device, request, "requested", fallback=False)
    unsupported: list[str] = []
    for name, reason in candidates.items():
        if reason is None:
            return record(op, device, name, "; ".join(unsupported) or "preferred", fallback=bool(unsupported))
        unsupported.append(f"not {name}: {reason}")
    raise RuntimeError(f"{op}: no implementation can run on {device}: {'; '.join(unsupported)}")


def triton_unsupported_reason(*tensors: torch.Tensor | None) -> str | None:
    """Return why Triton cannot take these tensors, or None if it can."""
    if _triton.MISSING:
        return _triton.MISSING
    if not _triton.INTERPRET:
        for t in tensors:
            if t is not None and not t.is_cuda:
                return f"needs CUDA tensors, got {t.device}"
    return None


def report() -> list[Choice]:
    """Return the choices so far: one row per op and kind of device."""
    return sorted(_report.values(), key=lambda c: (c.op, c.device))


def forget() -> None:
    """Clear the report, so that the next one holds what ran since."""
    _report.clear()


def record(op: str, device: torch.device, implementation: str, reason: str, *, fallback: bool = False) -> str:
    """Record what runs for `op` on `device` (row of `report()`, logged once); returns `implementation`."""
    last = _report.get((op, device.type))
    if last is None or last.implementation != implementation or last.reason != reason:
        choice = _report[op, device.type] = Choice(op, device.type, implementation, reason)
        if choice not in _logged:
            _logged.add(choice)
            # on a GPU a fallback costs speed, so it is a warning; on a CPU it is the normal case
            level = logging.DEBUG if device.type == "cpu" else logging.WARNING if fallback else logging.INFO
            _log.log(level, "%s on %s: %s (%s)", op, device.type, implementation, reason)
    return implementation


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: {name!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}")
    return name
