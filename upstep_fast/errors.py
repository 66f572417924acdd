"""What can go wrong for a user, and the exit code each has. Every message is one line: what, where, the cure."""

from __future__ import annotations


class UpstepError(Exception):
    """Base of the errors this package raises on purpose."""

    exit_code = 1
    already_reported = False  # by another rank: one line tells of it, not one a rank


class RunFailedError(UpstepError):
    """The run itself failed: three non-finite steps in a row, a full disk."""

    exit_code = 1


class ConfigError(UpstepError, ValueError):
    """A field, flag or file of the configuration is wrong."""

    exit_code = 2


class DataError(UpstepError):
    """The data cannot be used: nothing there, nothing readable, too much of it bad."""

    exit_code = 3


class CheckFailedError(UpstepError):
    """The adapter check or a quality check failed; the files are kept for inspection."""

    exit_code = 4


class Interrupted(UpstepError):  # noqa: N818  (not an error: the run was asked to stop and can be resumed)
    """Stopped by a signal; what was learnt so far is saved."""

    exit_code = 75


class BadImage(Exception):  # noqa: N818  (the interface's name: a verdict on the image)
    """This image cannot be used; `reason` says why, in one line."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = reason
