"""Failures that pass: no memory, an I/O error of a disk or network. They are retried, never held against an image.

An image that is left out changes the result of a run, and its checkpoint keeps that. So only the file itself may be
the reason; where the machine is, the run stops after a few tries and can be resumed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.data.reading.transient import may_pass
from upstep_fast.errors import DataError, RunFailedError

log = logging.getLogger(__name__)
R = TypeVar("R")
WAITS = (0.1, 0.5, 2.0)  # seconds before each further try


def with_retries(function: Callable[[], R], name: Callable[[], str]) -> R:
    """Return function(), called again after errors that may pass. name: of the image, for the message.

    Raises DataError (input or output) or RunFailedError (memory) if the error stays.
    """
    for wait in WAITS:
        try:
            return function()
        except Exception as error:
            if not may_pass(error):
                raise
            log.warning("data: %s: %s; trying again", name(), _reason(error))
        time.sleep(wait)
    try:
        return function()
    except Exception as error:
        if not may_pass(error):
            raise
        tries = f"{name()}: {_reason(error)}, tried {len(WAITS) + 1} times"
        if isinstance(error, OSError) and not is_out_of_memory(error):
            raise DataError(f"data: cannot read {tries}; mend the disk or network, then continue") from error
        cure = "lower --num-workers or --batch-size, or free memory, then continue"
        raise RunFailedError(f"data: cannot decode {tries}; {cure}") from error


def _reason(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    return getattr(error, "strerror", None) or type(error).__name__
