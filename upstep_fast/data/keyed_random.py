"""Counter-based random numbers: pure functions of a key such as (seed, epoch, index), equal on any machine.

splitmix64 (Steele, Lea, Flood 2014) chained over the parts of the key.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def uniform(*key: int) -> float:
    """Return a number in [0, 1) that is a pure function of `key`."""
    state = 0
    for part in key:
        state = _mix((state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK)
    return (state >> 11) / (1 << 53)


def bits_array(*key: int | np.ndarray) -> np.ndarray:
    """Return 64 random bits for each entry of the key's parts, broadcast against each other: uint64."""
    state = np.zeros((1,), np.uint64)
    for part in key:
        words = np.asarray(part).astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part & _MASK)
        state = state + words
        state += np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def uniform_array(*key: int | np.ndarray) -> np.ndarray:
    """Return `uniform` for each entry of the key's parts, broadcast against each other: float64, bit for bit."""
    return (bits_array(*key) >> np.uint64(11)) / float(1 << 53)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
