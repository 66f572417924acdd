"""Random numbers that depend on nothing but their names: the same (seed, step, ...) gives the same number, anywhere."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def uniform(*key: int) -> float:
    """A number in [0, 1) that is a pure function of `key` (splitmix64 over the parts)."""
    state = 0
    for part in key:
        state = _mix((state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK)
    return (state >> 11) / (1 << 53)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
