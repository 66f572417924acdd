"""Memory of images: at which fraction large ones are decoded, and how many at one time over all threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

LIMIT = 2 << 30  # bytes
BYTES_PER_PIXEL = 12  # Pillow's image (4), an array (3), a turned copy (3), a plane
BYTES_PER_COEFFICIENT = 6  # a progressive JPEG keeps its coefficients at full size: 3 channels of 16 bits
BYTES_PER_VALUE = 12  # stored values of at most 8 bytes, their mask, and the pixels made of them


class Budget:
    """Bytes that threads may hold together; one that needs more than all of them waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.peak = limit, 0, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold `size` bytes within this context, entered as soon as they are free. Not to be nested."""
        with self._changed:
            self._changed.wait_for(lambda: self.held == 0 or self.held + size <= self.limit)
            self.held += size
            self.peak = max(self.peak, self.held)
        try:
            yield
        finally:
            with self._changed:
                self.held -= size
                self._changed.notify_all()


decoding = Budget(LIMIT)


def reduction(height: int, width: int, min_side: int | None) -> int:
    """Return the fraction of its size at which `decode` gives an image: 1, 2, 4 ... for 1/1, 1/2, 1/4."""
    factor = 1
    while min_side and min(height, width) >= 2 * factor * min_side:
        factor *= 2
    return factor
