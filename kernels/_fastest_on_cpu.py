"""On a CPU: the form of an op to run, the compiled one or the library's, measured once per machine.

As `autotune` on a GPU, with two differences. Problems below MIN_MS are not measured: their choice would be one of
noise. And the default runs unless another form is faster by MARGIN, so that two near equals do not take turns: bits of
the result depend on the choice. Names of problems begin with "cpu ".
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
_SMALL = "the default: too small to measure"

_log = logging.getLogger(__name__)
_small: set[str] = set()  # problems that this process found too small


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
    if problem in _small and problem not in _autotune._pinned:
        return default, _SMALL
    for choices, reason in ((_autotune._pinned, "pinned"), (_autotune.known(machine()), "measured")):
        if choices.get(problem) in candidates:
            return choices[problem], reason
    with _autotune._lock:
        if (_milliseconds(candidates[default]), _milliseconds(candidates[default]))[1] < MIN_MS:
            _small.add(problem)
            return default, _SMALL
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(ROUNDS):  # in turns, so that other work on the machine affects all candidates equally
            for name, call in candidates.items():
                times[name].append(_milliseconds(call))
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        best = min(medians, key=lambda name: medians[name] * (1 if name == default else MARGIN))
        _autotune.known(machine())[problem] = best
        _autotune._write(machine(), problem, best)
    timings = ", ".join(f"{name} {ms:.3f} ms" for name, ms in medians.items())
    _log.debug("%s: %s (measured: %s)", problem, best, timings)
    return best, "measured"


@functools.cache
def machine() -> str:
    """Return the name under which this machine's choices are kept."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    processor = names[0] if names else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{processor} {capability} {threads} threads | torch {torch.__version__} | {_autotune._fingerprint()}"


def _milliseconds(call: Callable[[], object]) -> float:
    # with one thread its own time excludes the work of other processes
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return 1e3 * (clock() - start)
