"""Errors that users see, with their exit codes. Every message is one line: the problem, where, and the cure."""

from __future__ import annotations

import unicodedata
from typing import Any


class UpstepError(Exception):
    """Base of the errors this package raises on purpose."""

    exit_code = 1
    already_reported = False  # by another rank: an error is reported once, not once per rank


class RunFailedError(UpstepError):
    """The run itself failed: three non-finite steps in a row, a full disk."""

    exit_code = 1


class ConfigError(UpstepError, ValueError):
    """A field, flag or file of the configuration is wrong."""

    exit_code = 2


class DataError(UpstepError):
    """The data cannot be used: no images, none readable, or too many unreadable ones."""

    exit_code = 3


class NoTestPartError(DataError):
    """None of the data's paths has splits, so nothing of it is for testing."""


class CheckFailedError(UpstepError):
    """The adapter check or a quality check failed; the files are kept for inspection."""

    exit_code = 4


class AdapterRefusedError(CheckFailedError):
    """The adapter of a run made the features worse, so the base model is kept.

    verdict: the `Verdict`, as `AdaptResult` has it; None if there is none.
    """

    def __init__(self, message: str, verdict: Any = None):
        super().__init__(message)
        self.verdict = verdict


class Interrupted(UpstepError):  # noqa: N818  (not an error: the run was stopped on request and can be resumed)
    """The run was stopped by a signal; its state is saved."""

    exit_code = 75


class BadImage(Exception):  # noqa: N818  (public name)
    """An image that cannot be used. reason: one line."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = reason


MAX_LINE = 2000  # characters of an error line or log record


def printable(text: str, limit: int = 1000) -> str:
    """Return `text` on one line without characters that steer a terminal, for messages, logs and tables.

    Control characters (C0, C1, DEL), line and paragraph separators, marks that reorder text and lone surrogates become
    Python escapes; a text of more than `limit` characters loses its middle.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-(limit // 2) :]}"
    return "".join(_escape(char) if unicodedata.category(char) in _UNSAFE else char for char in text)


# Cc control, Cf format (bidirectional overrides, zero width), Cs surrogates, Zl and Zp separators
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _escape(char: str) -> str:
    return ascii(char)[1:-1]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
