"""Several runs in one launch of torchrun, each with its faults; what became of them is written down by every rank.

    torchrun --nproc-per-node 2 rank_runner.py JOB.json

JOB: [{"name": ..., "call": "adapt" | "embed" | "extract" | "collectives", "options": {...}, "fault": {...}}, ...].
A fault is {"rank": R, "kind": ..., "at": step}; what it does is in `planted`. NAME.rankR.json beside JOB gets the
outcome. Instead of a list: {"command": [...], "fault": {...}}, a command line that may end the process.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import torch

import upstep_fast
from upstep_fast.cli import commands as cli
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import UpstepError
from upstep_fast.evaluation import features
from upstep_fast.methods import gate
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.runtime import distributed, exit_signals, started
from upstep_fast.runtime.device import resolve
from upstep_fast.train import budget, verdict


def counted(real, at, act):
    """`real`, with act(result) in place of the result of its `at`-th call, from 0."""
    count = iter(range(10**6))

    def call(*args, **kwargs):
        if next(count) == at:
            return act(lambda: real(*args, **kwargs))
        return real(*args, **kwargs)

    return call


def no_memory(_):
    raise torch.OutOfMemoryError("planted")


def broken():
    raise RuntimeError("planted")


ENDINGS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exits": lambda: os._exit(3),
    "sleeps": lambda: time.sleep(10_000),
    "raises": broken,
}


def begin(fault):
    """The end of this process, once: a restarted one goes on."""
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) == 0:
        Path(fault["note"]).write_text(str(time.time()))
        ENDINGS[fault["kind"]]()


def repeated(number):
    """The signal now, and once more while it is answered; then a long stage."""
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    signal.raise_signal(number)
    time.sleep(100)


@contextlib.contextmanager
def clocks(seconds):
    """Let --budget's clock go on by seconds[rank] each time it is looked at; None: leave it as it is."""
    if seconds is None:
        yield
        return
    ticks = itertools.count(0.0, seconds[distributed.rank()])
    with mock.patch.object(budget, "clock", lambda: next(ticks)), mock.patch.object(started, "began", lambda: 0.0):
        yield


def planted(fault):
    """The patch that does what `fault` says, on its rank; nothing on the others."""
    if not fault or fault["rank"] not in (distributed.rank(), "all"):
        return contextlib.nullcontext()
    at = fault.get("at", 0)
    if fault["kind"] == "signal":
        number = getattr(signal, fault["signal"])
        if fault.get("in") == "verdict":  # on all ranks, and again by torchrun, as a terminal's Ctrl-C
            act = lambda call: (repeated(number), call())[1]  # noqa: E731
            return mock.patch.object(verdict, "judge_written", counted(verdict.judge_written, at, act))
        act = lambda call: (signal.raise_signal(number), call())[1]  # noqa: E731
        return mock.patch.object(UpStep, "update_running_stats", counted(UpStep.update_running_stats, at, act))
    if fault["kind"] in ENDINGS:
        act = lambda call: (begin(fault), call())[1]  # noqa: E731
        if fault.get("in") == "features":  # of embed and eval, on each batch
            return mock.patch.object(features, "check_finite", counted(features.check_finite, at, act))
        return mock.patch.object(UpStep, "embed", counted(UpStep.embed, at, act))
    if fault["kind"] == "nan":
        return mock.patch.object(UpStep, "loss", counted(UpStep.loss, at, lambda call: call() * float("nan")))
    if fault["kind"] == "forward memory":
        return mock.patch.object(UpStep, "embed", counted(UpStep.embed, at, no_memory))
    if fault["kind"] == "backward memory":
        return mock.patch.object(torch.Tensor, "backward", counted(torch.Tensor.backward, at, no_memory))
    if fault["kind"] == "loss memory":
        return mock.patch.object(UpStep, "loss", counted(UpStep.loss, at, no_memory))
    if fault["kind"] == "gate":
        flip = lambda call: (lambda found: (not found[0], found[1]))(call())  # noqa: E731
        return mock.patch.object(gate, "decide", counted(gate.decide, at, flip))
    raise ValueError(fault)


def collectives():
    """What each collective returns."""
    rank, size = distributed.rank(), distributed.size()
    p = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    p[0].grad = torch.full((2, 3), float(rank))
    numbers = torch.tensor([rank, 1.0, math.nan if rank == 0 else 0.0])
    return {
        "size": size,
        "sum": distributed.reduce(torch.arange(4.0) + rank).tolist(),
        "max": distributed.reduce(torch.tensor([rank, -rank]), "max").tolist(),
        "rows": distributed.gather_rows(torch.full((2, 1, 2), rank), 1).tolist(),
        "json": distributed.gather({"rank": rank, "name": "ä" * (rank + 1)}),
        "numbers": distributed.average_gradients(p, numbers)[:2].tolist(),
        "grad": [p[0].grad.tolist(), p[1].grad],
        "traffic": distributed.traffic(1.0)["comm_bytes"],
    }


def extract(options, out):
    """Features of a source, in order, saved by each rank."""
    config = from_flat(EmbedConfig, **options)
    x, read = features.extract(
        open_source(config.data.paths), features.load_models(config), config, resolve("cpu", "fp32")
    )
    torch.save({"x": x["base"], "read": read}, out)
    return read


def one(run, folder):
    name, options = run["name"], dict(run.get("options", {}))
    for key, per_rank in run.get("per_rank", {}).items():
        options[key] = per_rank[distributed.rank()]
    with planted(run.get("fault")), planted(run["also"]) if "also" in run else contextlib.nullcontext():
        if run["call"] == "collectives":
            return collectives()
        if run["call"] == "extract":
            return extract(options, folder / f"{name}.rank{distributed.rank()}.pt")
        if run["call"] == "embed":
            return str(upstep_fast.embed(**options))
        result = upstep_fast.adapt(**options)
        return {"loss": result.loss, "opened": result.opened}


def main(path):
    torch.set_num_threads(1)
    job = json.loads(path.read_text())
    if isinstance(job, dict):
        changes = job.get("per_rank", [[]] * 99)[distributed.rank()]
        with planted(job.get("fault")), clocks(job.get("clocks")):
            exit_signals.install()  # as the program does
            cli.main([*job["command"], *changes])
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("upstep_fast").addHandler(handler)
    logging.getLogger("upstep_fast").setLevel(logging.INFO)
    with distributed.joined(torch.device("cpu")):
        for run in job:
            lines.clear()
            try:
                found = {"result": one(run, path.parent)}
            except UpstepError as error:
                found = {"error": type(error).__name__, "text": str(error), "code": error.exit_code}
            found["lines"] = list(lines)
            name = f"{run['name']}.rank{distributed.rank()}.json"
            (path.parent / name).write_text(json.dumps(found))
            distributed.gather(None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
