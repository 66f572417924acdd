"""Boxes of the ISO base media format, which JP2 and JPEG XL put around their codestreams."""

from __future__ import annotations

from collections.abc import Iterator


def boxes(head: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start of the content, end) of the boxes between two offsets; the last may end behind `end`."""
    while at + 8 <= end:
        size, kind = int.from_bytes(head[at : at + 4], "big"), head[at + 4 : at + 8]
        start = at + 8
        if size == 1:  # the size is one of 64 bits
            size, start = int.from_bytes(head[at + 8 : at + 16], "big"), at + 16
        after = end if size == 0 else at + size
        if after < start:
            return
        yield kind, start, after
        at = after
