"""Data-parallel runs of several processes: with sharding.py the only user of torch.distributed.

    torchrun --nproc-per-node N -m upstep_fast adapt ...       one process per GPU (NCCL), or on CPUs (gloo)

Each rank processes its slice of one global batch. Statistics that a decision depends on are summed over the ranks, so
all ranks decide alike; gradients are averaged, so all ranks make one update. With one process every function returns
its input. Only tensors and JSON are sent; nothing is unpickled.

A rank that dies or hangs leaves the others in a collective. After the timeout such a rank looks up the first cause
(heartbeat.py), reports it and exits, and torchrun ends the rest.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from upstep_fast.errors import ConfigError, Interrupted, RunFailedError, UpstepError
from upstep_fast.runtime.heartbeat import Heartbeat

SILENT_SECONDS = 15.0  # without a heartbeat, after which `require_ranks` counts a rank as gone
START_SECONDS = 600.0  # timeout of collectives while models are loaded, images listed and kernels compiled


class RankError(RunFailedError):
    """A collective failed because of another rank."""


class _Traffic:
    """Counters of this rank: collectives entered in total; bytes and seconds since the last call of `traffic`."""

    def __init__(self) -> None:
        self.entered, self.bytes, self.seconds = 0, 0, 0.0
        self.waits = 0  # calls of `wait_for_ranks`
        self.events: list[tuple[Any, Any]] = []


_traffic = _Traffic()
_heartbeat: Heartbeat | None = None


def launched() -> bool:
    """Return True if torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def rank() -> int:
    """Return this process's rank; 0 without torchrun."""
    return dist.get_rank() if _together() else int(os.environ["RANK"]) if launched() else 0


def size() -> int:
    """Return the number of processes in the run; 1 until they have joined."""
    return dist.get_world_size() if _together() else 1


def local_rank() -> int:
    """Return this process's rank on this machine, which is the index of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def local_size() -> int:
    """Return the number of this run's processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def is_first() -> bool:
    """Return True on rank 0, the only rank that writes files and logs."""
    return rank() == 0


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def joined(device: torch.device, cure: str = "continue with --resume") -> Iterator[None]:
    """Join the processes that torchrun started into one run within the context, each on its `device`.

    cure: what the user can do if a rank is gone. An exception leaving the context is published to the other ranks;
    `already_reported` is set if another rank was first.
    """
    global _heartbeat
    if not launched() or _together():
        yield
        return
    timeout = datetime.timedelta(seconds=START_SECONDS)
    base_store, number, count = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps one store over restarts: without a prefix an attempt would read the addresses of dead ranks
    store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", base_store)
    backend = "cpu:gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        # a collective then raises on its timeout; else NCCL only enqueues it, and its watchdog aborts the process later
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    # its own connection: a wait on the shared one would delay the heartbeat
    own_store = PrefixStore("upstep_fast", store.clone() if hasattr(store, "clone") else store)
    with Heartbeat(own_store, number, count, lambda: _traffic.entered, cure) as _heartbeat:
        try:
            yield
        except BaseException as error:
            text = str(error) if isinstance(error, UpstepError) else f"{type(error).__name__}: {error}".splitlines()[0]
            is_new = _heartbeat.record_end(text, "stopped" if isinstance(error, Interrupted) else "cause")
            if isinstance(error, UpstepError):
                error.already_reported = not is_new
            if isinstance(error, Interrupted):
                _heartbeat.wait_for_rank_0()
            raise
        finally:
            _heartbeat = None
    # not after an exception: it would wait for ranks that may be gone
    dist.destroy_process_group()


def limit_wait(seconds: float) -> None:
    """Set the timeout of every later collective, in seconds."""
    if size() > 1:
        timeout = datetime.timedelta(seconds=seconds)
        if hasattr(dist, "set_timeout"):
            dist.set_timeout(timeout)
        else:  # torch before 2.14
            dist.distributed_c10d._set_pg_timeout(timeout)


def require_ranks() -> None:
    """Raise RankError if another rank has failed, or has had no heartbeat for SILENT_SECONDS.

    For long work between collectives; does not wait. A slow rank that is alive is waited for.
    """
    if _heartbeat is not None and (cause := _heartbeat.lost(SILENT_SECONDS)):
        raise RankError(f"{cause} (noticed by rank {rank()})")


def wait_for_ranks() -> None:
    """Wait until every rank is here. Raises RankError as `require_ranks` does, which a collective notices later."""
    if _heartbeat is None:
        return
    _traffic.waits += 1
    point, arrive = str(_traffic.waits), True
    while not _heartbeat.all_at(point, arrive):
        arrive = False
        require_ranks()
        time.sleep(0.05)


def reduce(x: Tensor, op: str = "sum") -> Tensor:
    """Reduce `x` over the ranks in place by "sum", "max" or "min", bitwise equal on all. Raises RankError."""
    if size() > 1:
        kind = getattr(dist.ReduceOp, op.upper())
        _enter(x, x.numel() * x.element_size(), lambda: dist.all_reduce(x, kind))
    return x


def reducer() -> Callable[[Tensor, str], Tensor] | None:
    """Return `reduce`; None with one process, so that an op can use its shorter form."""
    return reduce if size() > 1 else None


def gather_rows(x: Tensor, dim: int = 0) -> Tensor:
    """Concatenate the ranks' tensors, all of one shape, along `dim` in the order of the ranks. Raises RankError."""
    if size() == 1:
        return x
    local, parts = x.contiguous(), [torch.empty_like(x) for _ in range(size())]
    _enter(x, x.numel() * x.element_size() * size(), lambda: dist.all_gather(parts, local))
    return torch.cat(parts, dim)


def gather_parts(x: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks; their first dimensions may differ. Raises RankError."""
    if size() == 1:
        return [x]
    lengths = gather_rows(torch.tensor([len(x)])).tolist()
    padded = x.new_zeros(max(lengths), *x.shape[1:])
    padded[: len(x)] = x
    return [part[:length] for part, length in zip(gather_rows(padded[None]), lengths, strict=True)]


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks (JSON types) in the order of the ranks. Raises RankError."""
    if size() == 1:
        return [value]
    raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in gather_parts(raw)]


def own_part(count: int) -> range:
    """Return this rank's contiguous part of `count` indices."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def average_gradients(parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
    """Average the gradients over the ranks in place, and return the averages of `numbers` [n]. Raises RankError.

    One reduction holds all, so a value that is not finite on one rank is not finite on any. A parameter without a
    gradient is sent as zeros and keeps no gradient.

    Not DistributedDataParallel: adapters and head are a few MB, too little to overlap with the backward pass; a rank
    whose backward pass failed can still take part and report it; and a step without a backward pass is no special case.
    """
    if size() == 1:
        return numbers
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters]
    flat = torch.cat([*grads, numbers.float()])
    reduce(flat).div_(size())
    parts = flat.split([*(p.numel() for p in parameters), len(numbers)])
    for p, average in zip(parameters, parts[:-1], strict=True):
        if p.grad is not None:
            p.grad.copy_(average.view_as(p))
    return parts[-1]


def agree_on(facts: dict[str, Any]) -> None:
    """Raise ConfigError naming the first of `facts` (nested dicts of JSON types) that differs from rank 0's value."""
    first, *others = gather(facts)
    for number, other in enumerate(others, 1):
        if difference := _difference(first, other):
            name, here, there = difference
            raise ConfigError(
                f"ranks: rank {number} differs from rank 0: {name} is {_short(there)}, rank 0 has {_short(here)}; "
                "start all ranks with the same command, files and versions"
            )


def check_same(what: str, values: Sequence[float]) -> None:
    """Raise RunFailedError with the smallest and largest values if `values` differ between ranks."""
    if size() == 1:
        return
    local = torch.tensor(list(values), dtype=torch.float64)
    low, high = reduce(local.clone(), "min").tolist(), reduce(local.clone(), "max").tolist()
    if repr(low) != repr(high):  # repr: NaN is equal to NaN
        raise RunFailedError(f"ranks: {what} differ: {low} on one rank, {high} on another")


def traffic(seconds: float) -> dict[str, float]:
    """Return {"comm_bytes", "comm_share"}: bytes sent since the last call and the share of `seconds` that they took.

    The share includes the wait for slower ranks. FSDP2's gathers are not counted. {} with one process.
    """
    if size() == 1:
        return {}
    for start, end in _traffic.events:
        end.synchronize()
        _traffic.seconds += start.elapsed_time(end) / 1e3
    metrics = {"comm_bytes": _traffic.bytes, "comm_share": _traffic.seconds / seconds}
    _traffic.bytes, _traffic.seconds = 0, 0.0
    _traffic.events.clear()
    return metrics


def _enter(x: Tensor, num_bytes: int, call: Callable[[], object]) -> None:
    _traffic.entered += 1
    _traffic.bytes += num_bytes
    events = None
    if x.device.type == "cuda":
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
    start_s = time.perf_counter()
    try:
        call()
    except RuntimeError as error:
        waited = time.perf_counter() - start_s
        cause = _heartbeat.find_cause() if _heartbeat else "another rank failed"
        raise RankError(f"{cause} (noticed by rank {rank()} after {waited:.0f} s)") from error
    if events:
        events[1].record()
        _traffic.events.append(events)
    else:
        _traffic.seconds += time.perf_counter() - start_s


def _difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            if difference := _difference(a.get(key), b.get(key), f"{name}.{key}".lstrip(".")):
                return difference
        return None
    return None if a == b else (name, a, b)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
