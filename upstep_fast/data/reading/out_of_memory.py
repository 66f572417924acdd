"""Out of memory in a decoder, which each library reports in its own way."""

from __future__ import annotations

import errno

import torch

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "insufficient memory", "allocator_failure")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the host or a device had no memory: torch raises RuntimeError, Pillow's decoders OSError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, (OSError, RuntimeError)) and any(word in str(error).lower() for word in _WORDS)
