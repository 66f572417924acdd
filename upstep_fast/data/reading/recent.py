"""Latest results of a costly function, up to a number of bytes, shared by threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any


class Recent:
    """Values of the latest keys that together have at most `limit` bytes; the newest stays whatever its size.

    A value that several threads want is made by one of them, the others wait. They must hold nothing that `make` needs:
    no part of `budget.decoding`.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._values: OrderedDict[Hashable, Future[tuple[Any, int]]] = OrderedDict()  # the latest last
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """Return the value of `key`. make() returns one and its size in bytes. Raises as it; errors are not kept."""
        with self._lock:
            future = self._values.pop(key, None)
            is_new = future is None
            future = Future() if future is None else future
            self._values[key] = future
        if is_new:
            self._make(key, future, make)
        value, _ = future.result()
        return value

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._values.clear()
            self.held = 0

    def _make(self, key: Hashable, future: Future[tuple[Any, int]], make: Callable[[], tuple[Any, int]]) -> None:
        try:
            value, size = make()
        except BaseException as error:
            with self._lock:
                if self._values.get(key) is future:
                    del self._values[key]
            future.set_exception(error)
            return
        with self._lock:
            future.set_result((value, size))
            if self._values.get(key) is future:  # not cleared meanwhile
                self.held += size
                self._values.move_to_end(key)
            self._drop_oldest(key)

    def _drop_oldest(self, newest: Hashable) -> None:
        for key in list(self._values):
            if self.held <= self.limit:
                return
            future = self._values[key]
            if key != newest and future.done():
                del self._values[key]
                self.held -= future.result()[1]
