"""Console messages and train.log."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.logging import RichHandler

from upstep_fast.errors import Interrupted, UpstepError
from upstep_fast.runtime import distributed, terminal

log = logging.getLogger("upstep_fast")


# the progress lines in train.log; on the console they have a form of their own
steps_log = logging.getLogger("upstep_fast.steps")


def setup_logging(debug: bool = False) -> None:
    """Messages of this package go to stderr: plain lines to a pipe, coloured ones to a terminal."""
    handler: logging.Handler
    if terminal.is_plain(stderr=True):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    else:
        console = terminal.console(stderr=True)
        handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    # on the handler: train.log gets everything
    handler.setLevel(logging.WARNING if terminal.is_quiet() else logging.NOTSET)
    if not distributed.is_first():  # what all ranks say is said once
        handler.setLevel(logging.CRITICAL)
    logger = logging.getLogger("upstep_fast")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def train_log(path: Path) -> Iterator[None]:
    """Within this context messages go to the end of `path` too, and so does the error that ends it."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # on a full disk the log falls behind; what must be there, the metrics, says so
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    log.addHandler(handler)
    steps_log.addHandler(handler)
    steps_log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        level = logging.WARNING if isinstance(error, (Interrupted, KeyboardInterrupt)) else logging.ERROR
        trace = None if isinstance(error, UpstepError) else (type(error), error, error.__traceback__)
        text = f"{type(error).__name__}: {error}"
        handler.handle(log.makeRecord(log.name, level, __file__, 0, "%s", (text,), trace))
        raise
    finally:
        log.removeHandler(handler)
        steps_log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
