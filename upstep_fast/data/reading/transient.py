"""Errors that lie with the machine, not with a file: no memory, an I/O error of a disk or network."""

from __future__ import annotations

import errno

from upstep_fast.data.reading.out_of_memory import is_out_of_memory

_NAMES = (
    "EIO ESTALE ETIMEDOUT EMFILE ENFILE ENOMEM ENOBUFS EAGAIN EINTR EBUSY ENOTCONN ECONNRESET ECONNABORTED "
    "ECONNREFUSED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH EREMOTEIO ENOLINK ENODEV EDEADLK ENOLCK ESHUTDOWN"
)
PASSING = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))


def may_pass(error: BaseException) -> bool:
    """Return whether an error lies with the machine rather than with the file that was read."""
    return (isinstance(error, OSError) and error.errno in PASSING) or is_out_of_memory(error)
