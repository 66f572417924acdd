"""Autotuning: the fastest of several forms of an op, measured once per machine, cached, and settable from outside.

A choice is named by a problem (op, dtype, shape class: "lora_linear bfloat16 M32768 K1024 ...") and holds for
one machine (GPU, torch, triton, the source files of this folder). In order: what `set_tuned` says; what this process or
an earlier one measured (JSON under XDG_CACHE_HOME); a measurement now. Ranks agree by one of them measuring and
broadcasting `tuned()`. Nothing is measured while a CUDA graph is captured, nor here on a CPU (_fastest_on_cpu.py): the
first candidate runs there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from ._dispatch import NAMESPACE
from ._triton import MISSING, triton

ROUNDS = 7
BUSY_CYCLES = 1_000_000  # 0.5 ms at 2 GHz; a launch takes the host up to 0.1 ms

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_pinned: dict[str, str] = {}
_known: dict[str, dict[str, str]] = {}  # machine -> problem -> choice


def set_tuned(choices: Mapping[str, str]) -> None:
    """Fix the choice of each problem in `choices` (as `tuned` returns them); an empty mapping frees all."""
    _pinned.clear()
    _pinned.update(choices)


def tuned() -> dict[str, str]:
    """Return problem -> choice: what was fixed by `set_tuned`, measured for the current GPU or on the CPU. For JSON."""
    on_cpu = {problem: name for rows in _known.values() for problem, name in rows.items() if problem.startswith("cpu ")}
    if not torch.cuda.is_available():
        return {**on_cpu, **_pinned}
    return {**on_cpu, **_known.get(_machine(torch.device("cuda", torch.cuda.current_device())), {}), **_pinned}


def known(machine: str) -> dict[str, str]:
    """Return the choices measured on `machine`, by this process or an earlier one: problem -> choice."""
    if machine not in _known:
        _known[machine] = _read().get(machine, {})
    return _known[machine]


def autotune(problem: str, device: torch.device, candidates: Mapping[str, Callable[[], object]]) -> tuple[str, str]:
    """Return the name of the candidate to run for `problem`, and the reason.

    candidates: name -> a call that does the whole work on the caller's tensors; the first is the default.
    Raises RuntimeError if the choice fixed for `problem` is not among them.
    """
    if problem in _pinned:
        if _pinned[problem] not in candidates:
            can = ", ".join(candidates)
            raise RuntimeError(f"{problem}: pinned to {_pinned[problem]!r}, which cannot run here; can: {can}")
        return _pinned[problem], "pinned"
    default = next(iter(candidates))
    if device.type != "cuda":
        return default, "the default: nothing is measured on a CPU"
    machine = _machine(device)
    with _lock:
        choices = known(machine)
        if choices.get(problem) in candidates:
            return choices[problem], "measured"
        if len(candidates) == 1:
            return default, "the only one that can run"
        if torch.cuda.is_current_stream_capturing():
            return default, "the default: nothing is measured while a graph is captured"
        milliseconds, lacked_memory = _measure(candidates)
        if not milliseconds:
            return default, "the default: no candidate could be measured"
        choices[problem] = min(milliseconds, key=lambda name: milliseconds[name])
        if not lacked_memory:  # with more memory free, another candidate may be the fastest
            choices[problem] = _kept(machine, problem, choices[problem], candidates)
    timings = ", ".join(f"{name} {ms:.3f} ms" for name, ms in milliseconds.items())
    _log.info("%s: %s (measured: %s)", problem, choices[problem], timings)
    return choices[problem], "measured"


def power_class(count: int) -> int:
    """Return the power of two at or above `count`: sizes of one class share a choice."""
    return 1 << max(count - 1, 0).bit_length()


def _measure(candidates: Mapping[str, Callable[[], object]]) -> tuple[dict[str, float], bool]:
    """Return the median milliseconds of each candidate that can run, and True if one lacked memory."""
    timings: dict[str, list[float]] = {}
    lacked_memory = False
    for name, call in candidates.items():
        try:
            for _ in range(2):  # compiles, and fills the allocator's cache
                call()
            torch.cuda.synchronize()
            timings[name] = []
        # a tile too large for an unknown GPU, or too little memory: the others still run
        except Exception as error:
            lacked_memory |= isinstance(error, torch.cuda.OutOfMemoryError)
            _log.warning("%s cannot run and is left out of the measurement: %s", name, str(error).split("\n")[0])
    # in turns, so that a drift of the clock affects all candidates equally
    for _ in range(ROUNDS):
        for name, times in timings.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # the device is kept busy while the host launches: else a short kernel's time is that of its launch
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            candidates[name]()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in timings.items()}, lacked_memory


@functools.lru_cache
def _machine(device: torch.device) -> str:
    triton_version = "none" if MISSING else triton.__version__
    versions = f"torch {torch.__version__} | triton {triton_version} | kernels {_fingerprint()}"
    return f"{torch.cuda.get_device_name(device)} | {versions}"


@functools.lru_cache
def _fingerprint() -> str:
    """Return a short hash of this folder's source files."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / NAMESPACE / "measured.json"


def _read() -> dict[str, dict[str, str]]:
    path = _path()
    try:
        content: dict[str, dict[str, str]] = json.loads(path.read_text())
        if not all(isinstance(v, str) for rows in content.values() for v in rows.values()):
            raise ValueError("not a table of names")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        _log.warning("ignored the measurements in %s: %s", path, error)
        return {}


def _kept(machine: str, problem: str, choice: str, candidates: Collection[str]) -> str:
    """Put one choice into the file and return it, or the one of `candidates` that another process put there first.

    So processes that measure at the same time agree. The file is replaced atomically; rows of other processes stay.
    """
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as lock:
            with contextlib.suppress(OSError, ImportError):  # file systems without locks, Windows
                import fcntl

                folder = os.open(path.parent, os.O_RDONLY)
                lock.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
            content = _read()
            rows = content.setdefault(machine, {})
            if rows.get(problem) in candidates:
                return rows[problem]
            rows[problem] = choice
            with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
                complete = Path(temporary) / path.name
                complete.write_text(json.dumps(content, indent=1, sort_keys=True))
                os.replace(complete, path)
    except OSError as error:
        _log.warning("the measurement is not saved: %s cannot be written (%s)", path, error)
    return choice
