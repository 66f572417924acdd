"""The verdict on an image."""

from __future__ import annotations


class BadImage(Exception):  # noqa: N818  (the interface's name: a verdict on the image)
    """This image cannot be used; `reason` says why, in one line."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason = reason
