"""Ordered results of work that threads do ahead of time."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    function: Callable[[T], R],
    items: Iterable[T],
    num_workers: int,
    ahead: int,
    num_bytes: Callable[[R], int] | None = None,
    max_bytes: int = 0,
) -> Generator[R]:
    """Yield function(item) of each item in order, computed by threads; close() ends them.

    num_workers: threads; 0: none. ahead: most items in flight. num_bytes: size of a result; fewer items are in flight,
    but one per thread, where they are above `max_bytes` together. An exception is raised in its result's place.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="upstep-data")
    pending: deque[Future[R]] = deque()
    sizes: deque[int] = deque(maxlen=ahead)  # of results yielded

    def is_full() -> bool:
        if len(pending) >= ahead or num_bytes is None or len(pending) < num_workers:
            return len(pending) >= ahead
        waiting = [num_bytes(f.result()) for f in pending if f.done() and f.exception() is None]
        return not _fits(waiting, len(pending), sizes, max_bytes)

    def next_result() -> R:
        result = pending.popleft().result()
        sizes.append(num_bytes(result) if num_bytes else 0)
        return result

    try:
        for item in items:
            pending.append(pool.submit(function, item))
            while is_full():
                yield next_result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fits(waiting: Sequence[int], num_pending: int, sizes: Iterable[int], max_bytes: int) -> bool:
    """Return whether one more item fits, if it and those in the making are as large as the largest result so far."""
    largest = max((*sizes, *waiting), default=None)
    return largest is not None and sum(waiting) + largest * (num_pending + 1 - len(waiting)) <= max_bytes


def ahead(items: Generator[T], depth: int) -> Generator[T]:
    """Yield `items`, of which a thread keeps `depth` ready; close() ends the thread and `items`.

    An exception is raised in its item's place. The thread has the caller's context variables.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for item in items:
                _put(ready, (item, None), stop)
                if stop.is_set():
                    return
            _put(ready, (None, StopIteration()), stop)
        except BaseException as error:
            _put(ready, (None, error), stop)
        finally:
            items.close()

    # a daemon: a caller that forgets to close must still be able to end its process
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(work,), name="upstep-data-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def _put(ready: queue.Queue[T], item: T, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            pass
