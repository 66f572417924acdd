"""The training loop: batches, steps (step.py), validation, and the files of the run (run_writer.py)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.adapter_folder import REFUSED
from upstep_fast.config.training import parse_interval
from upstep_fast.data.loading.loader import Loader
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import AdapterRefusedError, Interrupted
from upstep_fast.evaluation.verdict import Verdict
from upstep_fast.methods import gate as gates
from upstep_fast.model import model_card, peft_format
from upstep_fast.model.adapter_start import start_from
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed, exit_signals
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.signals import StopRequests, signals
from upstep_fast.train import resume, verdict
from upstep_fast.train.adapter_check import check_adapter
from upstep_fast.train.batches import initial_views, make_loader
from upstep_fast.train.budget import Budget
from upstep_fast.train.cost import views_made, views_seen
from upstep_fast.train.identity import Identity, agree, identify
from upstep_fast.train.replay_check import ReplayCheck
from upstep_fast.train.run_whitening import write_whitening
from upstep_fast.train.run_writer import RunWriter
from upstep_fast.train.state import AdaptResult, Plan, RunState, fresh_state
from upstep_fast.train.step import computes_nothing, step
from upstep_fast.train.strength import at_strength, choose_strength
from upstep_fast.train.validator import NoValidator, Validator

log = logging.getLogger("upstep_fast")


def train(
    config: AdaptConfig,
    compute: Compute,
    source: Source,
    held_out: Source | None,
    identity: Identity,
    state: RunState,
    base: Backbone | None,
    out: Path,
    limit: Budget | None = None,
) -> AdaptResult:
    """Train from `state` on the images of `source` and write the run's files to `out`. Collective.

    held_out: images to validate on and for the verdict, None without. identity, state: of `start`. base: the base
    model, where it is needed (`needs_base`). limit: time left for a run with --budget. Raises UpstepError.
    """
    # lizard forgives: one screen, from the batch to the checkpoint in the order in which they happen
    began, first_step, num_steps, rule = time.monotonic(), state.step, config.optimization.num_steps, gate_rule(config)
    if limit is not None and state.plan is None:
        state.plan = Plan.of(num_steps, state.step)
    every_steps, every_seconds = parse_interval(config.checkpoints.every)
    validator: Validator | NoValidator = NoValidator()
    if config.validation.every and held_out and base:
        validator = Validator(config, held_out, base, compute, out, state.step)
    with (
        make_loader(config, source, state, compute) as loader,
        RunWriter(config, state, source, loader, out, identity) as writer,
        contextlib.ExitStack() as handlers,
    ):
        requests = handlers.enter_context(signals(every_seconds))
        replay = ReplayCheck(config, compute, source, base, rule, identity, writer)
        with writer.saves_on_exit():
            if state.step == 0 and state.method.needs_init:
                _initialize(config, compute, source, state)
            while state.step < state.end(num_steps) and not validator.should_stop(state.step):
                began_step = time.monotonic()
                batch = loader.take(with_views=not computes_nothing(state, rule))
                row = step(state, batch.views, rule, config, compute, requests)
                validator.after_step(state)
                if limit is not None and state.plan is not None:
                    state.plan = limit.replan(state.plan, state.step, row)
                    writer.set_end(state.plan.end)
                is_last = state.step >= state.end(num_steps) or validator.should_stop(state.step)
                stop, save = requests.poll()  # once a step: a signal during the save waits for the next one
                save = save or stop or is_last or bool(every_steps and state.step % every_steps == 0)
                replay.after_step(row, state, is_last=is_last)
                writer.after_step(row, batch, began_step, save=save, wait=stop or is_last)
                if state.step == first_step + 1:
                    # all is loaded and compiled: from now on a long wait means that a rank is gone
                    distributed.limit_wait(config.runtime.rank_timeout)
                    resume.broadcast_tuned()
                if stop and not is_last:
                    raise Interrupted(
                        f"stopped after {state.step} of {state.end(num_steps)} steps, all saved; "
                        "continue with the same command and --resume"
                    )
        try:
            _finish(config, compute, state, loader, validator, writer, out)
            with _ends_on_signal(handlers, requests, state.step):
                write_whitening(config, compute, source, base, identity.backbone, out)
                verdicts = verdict.judge_written(config, compute, held_out, base, validator, out)
        except AdapterRefusedError as refusal:
            writer.conclude([refusal.verdict])
            _write_card(config, state, source, [refusal.verdict], out, REFUSED)
            raise
        writer.conclude(verdicts)
        _write_card(config, state, source, verdicts, out)
    seconds = time.monotonic() - began
    return AdaptResult(out / "adapter", state.step, state.gate.num_updates, state.loss, seconds, *verdicts)


@contextlib.contextmanager
def _ends_on_signal(handlers: contextlib.ExitStack, requests: StopRequests, num_steps: int) -> Iterator[None]:
    """Let a signal end this context at once, or before it if one has come: all steps and the adapter are written.

    Raises Interrupted.
    """
    try:
        handlers.close()
        if requests.stop:
            if distributed.launched():
                exit_signals.ignore()  # torchrun sends it again
            raise KeyboardInterrupt
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after all {num_steps} steps, before the verdict; the adapter is written, and the same command "
            "with --resume completes the run"
        ) from None


def start(
    config: AdaptConfig, compute: Compute, source: Source, backbone: Backbone, out: Path
) -> tuple[Identity, RunState]:
    """Return the identity of the run, equal on all ranks, and its state: fresh, or restored with --resume. Collective.

    `backbone` becomes the state's, in place. Raises ConfigError, RunFailedError.
    """
    identity = identify(config, compute, source, backbone)
    agree(identity)
    state = fresh_state(config, compute, backbone)
    with make_loader(config, source, state, compute):  # raises what the loop's would, before anything is written
        pass
    if config.output.resume:
        resume.resume_from(state, out / output.CHECKPOINTS, identity)
    if state.method.bank is not None and views_made(config, len(source)) == views_seen(config):
        state.method.bank.limit = 0  # no view comes twice
    if config.lora.start is not None and state.step == 0:
        _start_from(config, state, Path(config.lora.start))
    return identity, state


def _start_from(config: AdaptConfig, state: RunState, folder: Path) -> None:
    """Put the adapter in `folder` into the fresh state, in place. Collective. Raises ConfigError."""
    method = state.method
    assert method.base_record is not None
    start_from(method.adapters, folder, base_record=method.base_record, model=config.model.name)
    distributed.agree_on({"from": peft_format.fingerprint(folder)})
    log.info("from: starting from the adapter in %s; head and prototypes start anew", folder)


def _initialize(config: AdaptConfig, compute: Compute, source: Source, state: RunState) -> None:
    with compute.autocast():
        state.method.initialize_from_data(initial_views(config, source, state, compute))


def _finish(
    config: AdaptConfig,
    compute: Compute,
    state: RunState,
    loader: Loader,
    validator: Validator | NoValidator,
    writer: RunWriter,
    out: Path,
) -> None:
    """Check the adapter, and write it or the best one at its strength. Raises CheckFailedError, RunFailedError."""
    distributed.limit_wait(distributed.START_SECONDS)
    with writer.adapter_on_failure(), state.method.weights_to_save():
        pictures = state.method.pictures(loader.take(with_views=False), compute.device)
        check_adapter(state, pictures, compute, out)
    with output.writing(out):
        files = validator.settle(state.method.result_files())
        files = at_strength(files, *choose_strength(config, validator.gain), len(state.method.vit.blocks))
        if distributed.is_first():
            peft_format.write_files(out / "adapter", files)


def _write_card(
    config: AdaptConfig,
    state: RunState,
    source: Source,
    verdicts: Iterable[Verdict | None],
    out: Path,
    folder: str = "adapter",
) -> None:
    if distributed.is_first():
        texts = [f"{v.kind}: {v.text}" for v in verdicts if v is not None]
        card = model_card.adapter_card(config.model.name, images=len(source), steps=state.step, verdicts=texts)
        with output.writing(out):
            write_atomic(out / folder / model_card.NAME, card)


def needs_base(config: AdaptConfig) -> bool:
    """Return whether this rank needs the base model: validation, verdict, --verify-resume, report, whitening."""
    output_of_first = config.output.report_images or config.output.whitening != "off"
    makes_files = output_of_first and distributed.is_first()
    gives_verdict = isinstance(config.validation.verdict, int) and distributed.is_first()
    return bool(config.validation.every or config.checkpoints.verify or makes_files or gives_verdict)


def gate_rule(config: AdaptConfig) -> gates.GateRule:
    """Return the gate of this configuration."""
    more = config.experimental
    return gates.GateRule(
        **vars(config.gate), unit=more.gate_unit, statistic=more.gate_statistic, seed=config.runtime.seed
    )
