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


# progress lines for train.log only: the console shows them as a bar or as plain lines
steps_log = logging.getLogger("upstep_fast.steps")


def setup_logging(debug: bool = False) -> None:
    """Send this package's messages to stderr: plain lines to a pipe, colored ones to a terminal."""
    handler: logging.Handler
    if terminal.is_plain(stderr=True):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    else:
        console = terminal.console(stderr=True)
        handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    # a level of the handler, not the logger: train.log gets everything
    handler.setLevel(logging.WARNING if terminal.is_quiet() else logging.NOTSET)
    if not distributed.is_first():  # each message is logged once, not once per rank
        handler.setLevel(logging.CRITICAL)
    logger = logging.getLogger("upstep_fast")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def train_log(path: Path) -> Iterator[None]:
    """Append messages within the context to `path` too, and the exception that ends it."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # a full disk must not stop the log: the metrics, which are required, raise
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    log.addHandler(handler)
    steps_log.addHandler(handler)
    steps_log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        level = logging.WARNING if isinstance(error, (Interrupted, KeyboardInterrupt)) else logging.ERROR
        trace = None if isinstance(error, UpstepError) else (type(error), error, error.__traceback__)
        message = f"{type(error).__name__}: {error}"
        handler.handle(log.makeRecord(log.name, level, __file__, 0, "%s", (message,), trace))
        raise
    finally:
        log.removeHandler(handler)
        steps_log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
