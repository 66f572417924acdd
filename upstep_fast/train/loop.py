"""The loop: batches, views, steps (step.py), checkpoints, and what is written when it ends, however it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.training import parse_interval
from upstep_fast.data.loading.loader import Batch, Loader
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import Interrupted, RunFailedError
from upstep_fast.methods import Method
from upstep_fast.methods import gate as gates
from upstep_fast.model import backbone as backbones
from upstep_fast.model import peft_format
from upstep_fast.runtime import distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.checkpoint import Checkpoint
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.machine import default_workers
from upstep_fast.runtime.signals import signals
from upstep_fast.train import resume
from upstep_fast.train.adapter_check import check_adapter
from upstep_fast.train.replay_check import ResumeCheck
from upstep_fast.train.run_writer import RunWriter
from upstep_fast.train.state import AdaptResult, RunState, fresh_state
from upstep_fast.train.step import flush, step
from upstep_fast.train.validator import Validator

log = logging.getLogger("upstep_fast")

MAX_BAD_STEPS = 3  # non-finite steps in a row that end the run
MAX_COLLAPSED_STEPS = 50  # steps in a row whose features tell images no longer apart
START_IMAGES = 4096  # seen once, for k-means prototypes, the base model's centre and the queue, if that is no longer


def _train(
    config: AdaptConfig,
    compute: Compute,
    source: Source,
    held_out: Source | None,
    backbone: backbones.Backbone,
    out: Path,
) -> AdaptResult:
    assert config.optimization.steps is not None
    identity = resume.identify(config, compute, source, backbones.fingerprint(backbone.vit))
    resume.agree(identity)
    rule, channels, state = gate_rule(config), len(backbone.mean), fresh_state(config, compute, backbone)
    if config.output.resume:
        resume.resume_from(state, out / output.CHECKPOINTS, identity)
    began, first_step = time.monotonic(), state.step
    every_steps, every_seconds = parse_interval(config.checkpoints.every)

    def repeat(found: Checkpoint, steps: int) -> tuple[list[dict[str, Any]], RunState]:
        again = fresh_state(config, compute, backbones.load_from(config.model))
        resume.restore(again, found, identity)
        with make_loader(config, source, again, channels, compute) as batches:
            rows = [step(again, next(batches).views, rule, config, compute) for _ in range(steps)]
        flush(again)
        return rows, again

    validator = Validator(config, held_out, compute, out) if held_out else None
    check = ResumeCheck(config.checkpoints.verify, repeat)
    taken: deque[tuple[dict[str, Any], Tensor]] = deque()  # rows that are not written yet, whose images they had
    with (
        make_loader(config, source, state, channels, compute) as loader,
        RunWriter(config, state, out, identity) as writer,
        signals(every_seconds) as requests,
    ):
        with _kept(state, loader, writer, taken, out):
            if state.step == 0 and state.method.needs_init:
                with compute.autocast():
                    state.method.initialize_from_data(_start_views(config, source, state, channels, compute))
            while state.step < config.optimization.steps and not (validator and validator.should_stop(state.step)):
                began_step = time.monotonic()
                batch = next(loader)
                row = step(state, batch.views, rule, config, compute, requests)
                # looked at once: a signal during the save waits for the next step
                if validator and validator.is_due(state.step):
                    with output.writing(out):
                        validator.validate(state)
                gives_up = validator is not None and validator.should_stop(state.step)
                (stop, save), is_last = requests.poll(), state.step == config.optimization.steps or gives_up
                save = save or stop or is_last or bool(every_steps and state.step % every_steps == 0)
                if save or check.is_on:
                    flush(state)
                check.after(row, state, is_last)
                seconds = max(1e-9, time.monotonic() - began_step)
                row |= {
                    "images_per_s": config.optimization.batch_size / seconds,
                    "data_wait": loader.data_wait,
                    "other_s": seconds - loader.data_wait,  # the halves of the step are taken off once they are known
                    "epoch": batch.epoch,
                    "replaced": batch.replaced,
                    **distributed.traffic(seconds),
                }
                taken.append((row, batch.indices))
                with output.writing(out):
                    # what the last one tells may still be on the device
                    while len(taken) > (state.pending is not None):
                        row, indices = taken.popleft()
                        writer.write(row, state.gate)
                        stop_if_bad(state, row, source, indices, out)
                        stop_if_collapsed(state, row, out)
                    if save:
                        writer.save(state)
                        if check.wants_checkpoint and not is_last:
                            check.begin(writer.read_back(state.step))
                    if stop or is_last:
                        writer.wait()
                if state.step == first_step + 1:
                    # all is loaded and compiled: from now on a long wait means that a rank is gone
                    distributed.limit_wait(config.runtime.rank_timeout)
                    resume.broadcast_tuned()
                if stop and not is_last:
                    raise Interrupted(
                        f"stopped after {state.step} of {config.optimization.steps} steps, all saved; "
                        "go on with the same command and --resume"
                    )
        distributed.limit_wait(distributed.START_SECONDS)
        with state.method.weights_to_save():
            check_adapter(state, state.method.images(next(loader).views), compute, out)
        with output.writing(out):
            if validator:
                validator.settle()
            first, last = config.experimental.strength_first, config.validation.strength
            ends = last if first is None else first, last
            if "auto" not in ends and ends != (1.0, 1.0) and distributed.is_first():
                strengths = peft_format.strength_by_depth(*ends, len(state.method.vit.blocks))  # type: ignore[arg-type]
                peft_format.scale_saved(out / "adapter", strengths)
    return AdaptResult(out / "adapter", state.step, state.gate.num_updates, state.loss, time.monotonic() - began)


def stop_if_bad(state: RunState, row: dict[str, Any], source: Source, own: Tensor, out: Path) -> None:
    """Count steps that were not applied; at the third in a row writes out/bad_batches.json and ends the run.

    own: indices of this rank's images. Raises RunFailedError, or OSError if the file cannot be written.
    """
    if row["bad"] is None:
        if row["open"]:
            state.bad.clear()
        return
    log.warning("step %d: %s; not applied", row["step"], row["bad"])
    names = [source.name(index) for indices in distributed.gather(own.tolist()) for index in indices]
    state.bad.append({"step": row["step"], "reason": row["bad"], "images": names})
    if len(state.bad) >= MAX_BAD_STEPS:
        path = out / "bad_batches.json"
        if distributed.is_first():
            path.write_text(json.dumps(state.bad, indent=1) + "\n")
        raise RunFailedError(
            f"step {row['step']}: {row['bad']}, {len(state.bad)} steps in a row; the images are listed in {path}, the "
            f"adapter before them is in {out / 'adapter'}; lower --lr or use --precision fp32"
        )


def stop_if_collapsed(state: RunState, row: dict[str, Any], out: Path) -> None:
    """Raise RunFailedError at the last of many steps whose features tell images no longer apart.

    Only steps in a row count: training can pass through such a state and leave it. row: maybe the one before the last
    that was counted.
    """
    if "collapsed" in row and state.collapsed >= MAX_COLLAPSED_STEPS:
        raise RunFailedError(
            f"step {row['step']}: collapse: {row['collapsed']}, {state.collapsed} steps in a row; "
            f"lower --lr, or go back to an earlier checkpoint in {out / output.CHECKPOINTS}"
        )


def gate_rule(config: AdaptConfig) -> gates.GateRule:
    """The gate that this configuration asks for."""
    more = config.experimental
    return gates.GateRule(
        **vars(config.gate), unit=more.gate_unit, statistic=more.gate_statistic, seed=config.runtime.seed
    )


def make_loader(config: AdaptConfig, source: Source, state: RunState, channels: int, compute: Compute) -> Loader:
    """The batches from `state.step` on, with their views; bad images are noted in `state.skipped`."""
    return Loader(
        source,
        batch_size=config.optimization.batch_size,
        rank=distributed.rank(),
        world_size=distributed.size(),
        seed=config.runtime.seed,
        num_workers=num_workers(config),
        max_bad_fraction=config.data.max_bad_fraction,
        skipped=state.skipped,
        start_step=state.step,
        channels=channels,
        min_side=state.method.min_side,
        make_views=lambda batch: make_views(state.method, batch, compute),
        device=compute.device,
        decode=config.data.decode,
    )


def make_views(method: Method, batch: Batch, compute: Compute) -> Any:
    """The views of a batch that the method wants, on the device."""
    return method.views(batch, compute.device)


@contextlib.contextmanager
def _kept(state: RunState, loader: Loader, writer: RunWriter, taken: Iterable[Any], out: Path) -> Iterator[None]:
    # whatever ends the run, what was learnt is kept

    def keep() -> None:
        if not distributed.is_first():
            return
        with contextlib.suppress(RuntimeError):  # of a device that has failed
            flush(state)
            for row, _ in taken:
                writer.write(row, state.gate)
        if state.gate.num_updates:
            peft_format.write_files(out / "adapter", state.method.result_files())
        loader.write_skipped(out / "skipped.csv")

    try:
        yield
    except BaseException:
        # the first cause is what the user must see, not a full disk met afterwards
        with contextlib.suppress(OSError):
            keep()
        raise
    with output.writing(out):
        keep()


def num_workers(config: AdaptConfig) -> int:
    """Threads that decode."""
    return default_workers() if config.data.num_workers is None else config.data.num_workers


def _start_views(
    config: AdaptConfig, source: Source, state: RunState, channels: int, compute: Compute
) -> Iterator[Any]:
    with make_loader(config, source, state, channels, compute) as loader:
        batches = -(-min(len(source), max(START_IMAGES, config.experimental.queue)) // config.optimization.batch_size)
        for _, batch in zip(range(batches), loader, strict=False):
            yield batch.views
