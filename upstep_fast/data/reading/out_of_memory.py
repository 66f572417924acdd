"""Errors of libraries that decode: out of memory, which each reports in its own way, or a bad image."""

from __future__ import annotations

import errno

import torch

from upstep_fast.errors import BadImage

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "insufficient memory", "allocator_failure")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the host or a device had no memory: torch raises RuntimeError, Pillow's decoders OSError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, (OSError, RuntimeError)) and any(word in str(error).lower() for word in _WORDS)


def error_of_library(error: Exception, what: str, name: str = "") -> Exception:
    """Return what to raise for a library's error: MemoryError, which says nothing about the image, or BadImage.

    what: that failed, as "cannot be decoded". name: of the image, or empty.
    """
    if is_out_of_memory(error):
        return MemoryError(f"{name}: out of memory" if name else "out of memory")
    return BadImage(f"{what}: {type(error).__name__}: {str(error)[:120]}".replace("\n", " "), name)
