"""Errors of readers' libraries as BadImage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.errors import BadImage


@contextlib.contextmanager
def bad_image(kind: str) -> Iterator[None]:
    """Turn whatever a library raises for a bad file within this context into BadImage: one line.

    Errors of the machine, which may pass, stay: out of memory, and those of the operating system.
    """
    try:
        yield
    except BadImage:
        raise
    except BaseException as error:  # libraries raise whatever their parsers meet
        is_panic = type(error).__name__ == "PanicException"  # of libraries in Rust: no Exception
        if not (isinstance(error, Exception) or is_panic) or is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()).rpartition("available plugins: pylibjpeg: ")[2]
        raise BadImage(f"{kind} that cannot be read: {reason[:160] or type(error).__name__}") from error
