"""Console messages and train.log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.logging import RichHandler

from upstep_fast.errors import MAX_LINE, Interrupted, UpstepError, printable
from upstep_fast.runtime import distributed, terminal

log = logging.getLogger("upstep_fast")


# progress lines for train.log only: the console shows them as a bar or as plain lines
steps_log = logging.getLogger("upstep_fast.steps")


class OneLineFormatter(logging.Formatter):
    """Format each record as one printable line; the lines of a traceback follow indented.

    Messages hold names that others chose: a line break in one must not look like a second record, and an escape
    sequence must not reach a terminal.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        return printable(super().formatMessage(record), MAX_LINE)

    def formatException(self, ei: Any) -> str:
        """Return the traceback with every line but the first indented, so that none looks like a record."""
        return "\n    ".join(printable(line, MAX_LINE) for line in super().formatException(ei).split("\n"))


def setup_logging(debug: bool = False) -> None:
    """Send this package's messages to stderr: plain lines to a pipe, colored ones to a terminal."""
    handler: logging.Handler
    if terminal.is_plain(stderr=True):
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(OneLineFormatter("%(levelname)s %(message)s"))
    else:
        console = terminal.console(stderr=True)
        handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
        handler.setFormatter(OneLineFormatter("%(message)s"))
    # a level of the handler, not the logger: train.log gets everything
    handler.setLevel(logging.WARNING if terminal.is_quiet() else logging.NOTSET)
    if not distributed.is_first():  # each message is logged once, not once per rank
        handler.setLevel(logging.CRITICAL)
    logger = logging.getLogger("upstep_fast")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    if logging.lastResort is not None:  # prints the warnings of libraries that have no handler, such as timm
        logging.lastResort.setFormatter(OneLineFormatter("%(levelname)s %(message)s"))


@contextlib.contextmanager
def held_messages() -> Iterator[list[logging.LogRecord]]:
    """Collect the messages within the context in the list it yields, for a `train_log` that is opened later."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign,assignment]
    log.addHandler(handler)
    try:
        yield records
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def train_log(path: Path, earlier: Sequence[logging.LogRecord] = ()) -> Iterator[None]:
    """Append messages within the context to `path` too, after those of `earlier`, and the exception that ends it."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s"))
    # a full disk must not stop the log: the metrics, which are required, raise
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    for record in earlier:
        handler.handle(record)
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
