"""Limit on how long OpenMP threads spin while they wait for each other.

GCC's OpenMP, which torch's wheels bring, lets a thread that waits for others spin 300,000 times, for milliseconds, and
1,000 times if it knows of more threads than cores. It knows neither of the decoding threads nor of other programs,
which need the cores meanwhile: `embed` of 32 images took 2.9 s instead of 26 s on two cores that eight programs shared.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = "1000"  # libgomp's own number with more threads than cores (GOMP_SPINCOUNT in its manual)


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Set GOMP_SPINCOUNT in the environment of this process, unless it or OMP_WAIT_POLICY is set.

    libgomp reads it once, when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
