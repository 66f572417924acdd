"""Views made before they are asked for: on a GPU by a thread, on a stream of their own, while the step before runs.

    thread, side stream     images of t + 1 -> pinned buffer -> device -> views, an event
    the step's own stream   ... step t ... | waits for the event | step t + 1

The copies come from pinned memory, which torch's host allocator keeps and reuses, so they overlap with the step. On
a CPU there is nothing to overlap with: the same code makes the views when they are taken.
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
    """An item and what was made of it, which may still be in the making on another stream."""

    item: T
    made: Any  # tensors, in lists, tuples, dicts or dataclasses; without an event a function that makes them
    event: torch.cuda.Event | None = None  # recorded behind the last kernel that makes them

    def take(self) -> Any:
        """What was made, for use on the current stream. Without an event it is made now."""
        if self.event is None:
            return self.made()
        stream = torch.cuda.current_stream()
        stream.wait_event(self.event)
        for x in _tensors(self.made):
            x.record_stream(stream)  # or its memory would be given away while this stream reads it
        return self.made


def prefetch(items: Generator[T], make: Callable[[T], Any], device: torch.device | None) -> Generator[Ready[T]]:
    """Each item with what `make` returns for it; an exception comes where its item would have come."""
    if device is None or device.type != "cuda":
        with contextlib.closing(items):
            for item in items:
                yield Ready(item, lambda item=item: make(item))
        return
    stream = torch.cuda.Stream(device)

    def made() -> Generator[Ready[T]]:
        with torch.cuda.device(device), torch.cuda.stream(stream), contextlib.closing(items):
            for item in items:
                views = make(item)
                event = torch.cuda.Event()
                event.record(stream)
                yield Ready(item, views, event)

    yield from ahead(made(), DEPTH)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(x):
        for field in dataclasses.fields(x):
            yield from _tensors(getattr(x, field.name))
