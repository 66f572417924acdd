"""The hub within seconds or not at all: without a network its client would try each file for half a minute."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from upstep_fast.errors import first_line

SECONDS = 3.0  # for an answer; looking up a name may take longer, but is not waited for
VALID = 30.0  # seconds for which an answer holds
ERRORS = (LocalEntryNotFoundError, OfflineModeIsEnabled)

_checked: tuple[float, str | None] | None = None  # time of the last look, and why the hub is out of reach


@contextlib.contextmanager
def limited(*settings: Any, errors: tuple[type[Exception], ...] = ERRORS) -> Iterator[None]:
    """Read nothing but the cache within the context if the hub does not answer.

    settings: modules of other libraries with a setting HF_HUB_OFFLINE of their own. errors: what the libraries raise
    for what the cache does not have then; it becomes a ConnectionError of one line.
    """
    reason = None if constants.HF_HUB_OFFLINE else unreachable()
    if reason is None:
        yield
        return
    offline = [module for module in (constants, *settings) if not module.HF_HUB_OFFLINE]
    for module in offline:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    except errors as error:
        raise ConnectionError(
            f"no connection to {constants.ENDPOINT} ({reason}), and it is not in the cache"
        ) from error
    finally:
        for module in offline:
            module.HF_HUB_OFFLINE = False


def unreachable() -> str | None:
    """Return why the hub does not answer, None if it does. Takes `SECONDS` at most, and is remembered for a while."""
    global _checked
    now = time.monotonic()
    if _checked is None or now - _checked[0] > VALID:
        _checked = now, _look()
    return _checked[1]


def _look() -> str | None:
    result: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code
        except Exception as error:  # of whichever client this version of the hub's library uses
            result.append(first_line(error) or type(error).__name__)
        else:
            result.append(f"it answers {status}" if status >= 500 else None)

    # a thread: looking up a name has no timeout of its own
    thread = threading.Thread(target=ask, name="upstep-network", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return result[0] if result else f"no answer within {SECONDS:.0f} s"
