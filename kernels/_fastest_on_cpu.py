"""On a CPU: the form of an op to run, the compiled one or the library's, measured once per machine.

As `autotune` on a GPU, with two differences. Problems below MIN_MS take the default: a choice would be one of noise.
And the default runs unless another form is faster by MARGIN. Bits of the result depend on the choice, so all of them
are kept, those of small problems too: a later process on this machine, with as many threads, makes the same ones. Names
of problems begin with "cpu ".
"""

from __future__ import annotations

import functools
import logging
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from . import _autotune
from ._dispatch import record

MIN_MS = 0.1
MARGIN = 1.03
ROUNDS = 7

_log = logging.getLogger(__name__)


def fastest_on_cpu(problem: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    """Return and record the name of the candidate to run for `problem`, which begins with "cpu ".

    candidates: name -> a call that does the whole work and changes nothing; the first is the default. A choice that
    was fixed by `set_tuned` and cannot run here is replaced by the default: another machine made it.
    """
    name, reason = _choice(problem, candidates)
    return record(problem, torch.device("cpu"), name, reason)


def _choice(problem: str, candidates: Mapping[str, Callable[[], object]]) -> tuple[str, str]:
    default = next(iter(candidates))
    if len(candidates) == 1:
        return default, "the only one that can run"
    for choices, reason in ((_autotune._pinned, "pinned"), (_autotune.known(machine()), "measured")):
        if choices.get(problem) in candidates:
            return choices[problem], reason
    with _autotune._lock:
        best = _fastest(problem, candidates)
        _autotune.known(machine())[problem] = best = _autotune._kept(machine(), problem, best, candidates)
    return best, "measured"


def _fastest(problem: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    default = next(iter(candidates))
    if (_milliseconds(candidates[default]), _milliseconds(candidates[default]))[1] < MIN_MS:
        return default
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):  # in turns, so that other work on the machine affects all candidates equally
        for name, call in candidates.items():
            times[name].append(_milliseconds(call))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name] * (1 if name == default else MARGIN))
    timings = ", ".join(f"{name} {ms:.3f} ms" for name, ms in medians.items())
    _log.debug("%s: %s (measured: %s)", problem, best, timings)
    return best


def machine() -> str:
    """Return the name under which this machine's choices are kept, for the number of threads of this moment."""
    return _machine(torch.get_num_threads())


@functools.cache
def _machine(threads: int) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    processor = names[0] if names else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor} {capability} {threads} threads | torch {torch.__version__} | {_autotune._fingerprint()}"


def _milliseconds(call: Callable[[], object]) -> float:
    # with one thread its own time excludes the work of other processes
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return 1e3 * (clock() - start)
