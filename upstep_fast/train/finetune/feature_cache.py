"""Cache of frozen activations: with images that do not change, an epoch runs only the trained part."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upstep_fast.data.labeled.batches import Reader
from upstep_fast.data.labeled.splits import Labeled
from upstep_fast.data.loading.loader import permutation
from upstep_fast.errors import ConfigError
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.machine import format_bytes, free_bytes

log = logging.getLogger("upstep_fast")

FILE = "features.bin"


@dataclass(frozen=True)
class Cached:
    """Outputs of the frozen part for n images, and their classes."""

    frozen: Tensor  # [n, T, ...], in memory or in a file
    y: Tensor  # [n] int64

    def training(self, batch_size: int, seed: int, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches (frozen, y) from `step` on, without end, in the order of `Reader.training`."""
        per_epoch = len(self.y) // batch_size
        while True:
            epoch, at = divmod(step, per_epoch)
            chosen = torch.from_numpy(permutation(len(self.y), seed, epoch)[at * batch_size :][:batch_size])
            yield self.frozen[chosen].to(device), self.y[chosen].to(device)
            step += 1

    def in_order(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every (frozen, y) once, in batches."""
        for frozen, y in zip(self.frozen.split(batch_size), self.y.split(batch_size), strict=True):
            yield frozen.to(device), y


def reserve(model: Any, parts: list[Labeled], reader: Reader, compute: Compute, where: str, folder: Path) -> Tensor:
    """Return room for the frozen activations of every image of the parts, [n, T, ...]; logs its size first.

    model: Losa, or Baseline with `linear`. where: "memory", or "disk" for a file in `folder`. Raises ConfigError if it
    does not fit.
    """
    shape = (1,) if reader.options.frames is None else (1, reader.options.frames)
    with compute.autocast():
        one = model.frozen(torch.zeros(*shape, len(reader.options.mean), *reader.options.size, device=compute.device))
    count = sum(len(part.y) for part in parts)
    size = count * one.numel() * one.element_size()
    free = free_bytes(torch.device("cpu")) if where == "memory" else shutil.disk_usage(folder).free
    known = "an unknown amount is" if free is None else f"{format_bytes(free)} are"
    log.info("cache: %s of frozen activations in %s, %s free", format_bytes(size), where, known)
    if free is not None and size > free:
        other = "--cache disk, --losa-every 2 or --cache off" if where == "memory" else "--losa-every 2 or --cache off"
        raise ConfigError(
            f"cache: {format_bytes(size)} do not fit into {where} with {format_bytes(free)} free; use {other}"
        )
    return _allocate(count * one.numel(), one.dtype, where, folder).view(-1, *one.shape[1:])


def fill(store: Tensor, model: Any, parts: list[Labeled], reader: Reader, compute: Compute) -> list[Cached]:
    """Compute the frozen activations of every readable image of each part. store: of `reserve`."""
    cached = []
    for part, room in zip(parts, store.split([len(part.y) for part in parts]), strict=True):
        read: list[Tensor] = []
        count = 0
        for indices, x in reader.in_order(part):
            with compute.autocast():
                room[count : count + len(x)] = model.frozen(x).to(store.device)
            read.append(indices)
            count += len(x)
        cached.append(Cached(room[:count], part.y[torch.cat(read)] if read else part.y[:0]))
    return cached


def _allocate(count: int, dtype: torch.dtype, where: str, folder: Path) -> Tensor:
    if where == "memory":
        return torch.empty(count, dtype=dtype)
    path = folder / f".tmp-{os.getpid()}-{FILE}"  # which the next run removes if this one is killed here
    try:
        with open(path, "wb") as file:  # allocated now: a disk that fills up later would kill the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            else:  # macOS and Windows
                file.truncate(count * dtype.itemsize)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(f"cache: cannot write {path}: {error.strerror}; use --cache memory or off") from error
    store = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    path.unlink()  # the mapping keeps the data; nothing is left behind, however the run ends
    return store
