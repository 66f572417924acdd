"""Ordered results of work that threads do ahead of time."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], num_workers: int, ahead: int) -> Generator[R]:
    """Yield function(item) of each item in order, computed by threads; close() ends them.

    num_workers: threads; 0: none. ahead: most items in flight. An exception of `function` is raised in its result's
    place.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="upstep-data")
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
