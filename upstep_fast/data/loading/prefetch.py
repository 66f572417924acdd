"""Prefetching of views: on a GPU a thread computes them on a side stream while the previous step runs.

    thread, side stream     images of t + 1 -> pinned buffer -> device -> views, an event
    the step's stream       ... step t ... | waits for the event | step t + 1

The copies come from pinned memory, which torch's host allocator keeps and reuses, so they overlap with the step. On
a CPU there is nothing to overlap with, and the views are computed when they are taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from upstep_fast.data.loading.ordered_map import ahead

T = TypeVar("T")
DEPTH = 1  # batches whose views wait on the device


@dataclass(frozen=True)
class Ready(Generic[T]):
    """Item of a stream with its views, which another CUDA stream may still be computing."""

    item: T
    views: Any  # tensors in lists, tuples, dicts or dataclasses; without an event a function that computes them
    event: torch.cuda.Event | None = None  # recorded after the last kernel that computes them

    def wait(self) -> Any:
        """Return the views, for use on the current stream; without an event they are computed now."""
        if self.event is None:
            return self.views()
        stream = torch.cuda.current_stream()
        stream.wait_event(self.event)
        for x in _tensors(self.views):
            x.record_stream(stream)  # or its memory would be reused while this stream reads it
        return self.views


def prefetch(items: Generator[T], make: Callable[[T], Any], device: torch.device | None) -> Generator[Ready[T]]:
    """Yield each item with what `make` returns for it; an exception is raised in its item's place."""
    if device is None or device.type != "cuda":
        with contextlib.closing(items):
            for item in items:
                yield Ready(item, lambda item=item: make(item))
        return
    stream = torch.cuda.Stream(device)

    def computed() -> Generator[Ready[T]]:
        with torch.cuda.device(device), torch.cuda.stream(stream), contextlib.closing(items):
            for item in items:
                views = make(item)
                event = torch.cuda.Event()
                event.record(stream)
                yield Ready(item, views, event)

    yield from ahead(computed(), DEPTH)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(x):
        for field in dataclasses.fields(x):
            yield from _tensors(getattr(x, field.name))
