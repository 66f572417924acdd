"""Views made before they are asked for: on a GPU by a thread, on a stream of their own, while the step before runs.

    thread, side stream     images of t + 1 -> pinned buffer -> device -> views, an event
    the step's own stream   ... step t ... | waits for the event | step t + 1

The copies come from pinned memory, which torch's host allocator keeps and reuses, so they overlap with the step. On
a CPU there is nothing to overlap with: the same code makes the views when they are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .threads import ahead

T = TypeVar("T")
Views = Tensor | Sequence[Tensor]
DEPTH = 1  # batches whose views wait on the device


@dataclass(frozen=True)
class Ready(Generic[T]):
    """An item and its views, which may still be in the making on another stream."""

    item: T
    views: Views | None = None
    event: torch.cuda.Event | None = None  # recorded behind the last kernel that makes them

    def take(self) -> Views | None:
        """The views, for use on the current stream."""
        if self.event is not None and self.views is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.event)
            for x in [self.views] if isinstance(self.views, Tensor) else self.views:
                x.record_stream(stream)  # or its memory would be given away while this stream reads it
        return self.views


def prefetch(items: Iterable[T], make: Callable[[T], Views | None], device: torch.device | None) -> Generator[Ready[T]]:
    """Each item with what `make` returns for it; an exception comes where its item would have come."""
    if device is None or device.type != "cuda":
        with contextlib.closing(_closable(items)) as each:
            for item in each:
                yield Ready(item, make(item))
        return
    stream = torch.cuda.Stream(device)

    def made() -> Generator[Ready[T]]:
        with torch.cuda.device(device), torch.cuda.stream(stream), contextlib.closing(_closable(items)) as each:
            for item in each:
                views = make(item)
                event = torch.cuda.Event()
                event.record(stream)
                yield Ready(item, views, event)

    yield from ahead(made(), DEPTH)


def _closable(items: Iterable[T]) -> Generator[T]:
    yield from items
