"""One step: embeddings and gate; on update steps also loss, backward and the optimizer. A skipped step keeps nothing.

A step that a rule without statistics skips (random, alternate) computes nothing, if nothing follows its embeddings.

The host waits for the device once a step: at the gate, for the center's magnitudes. The step's other results (loss,
whether all was finite) stay on the device and come with the next step's magnitudes; whether the update is applied is
decided on the device too. Accumulation (--accumulate), fp16 and several ranks cost one more wait.

Ranks take a step together. Reductions: the gate's statistics together with stop requests and out-of-memory flags; on
update steps Sinkhorn's, and one of gradients, loss and an out-of-memory flag. So every rank takes the same decisions,
and none applies a step that another cannot.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.views.types import Views
from upstep_fast.errors import RunFailedError
from upstep_fast.methods import Embeddings, Method
from upstep_fast.methods import gate as gates
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.signals import NUM_FLAGS, StopRequests
from upstep_fast.train.out_of_memory import OutOfMemoryError, explanation, halve_microbatch, is_out_of_memory
from upstep_fast.train.state import PendingStep, RunState
from upstep_fast.train.step_row import complete_row, flush, row_of
from upstep_fast.train.update import update


def step(
    state: RunState,
    views: Views,
    rule: gates.GateRule,
    config: AdaptConfig,
    compute: Compute,
    requests: StopRequests | None = None,
) -> dict[str, Any]:
    """Take one step, in place. Returns the row of metrics.jsonl.

    views: of this rank's images, from `Method.views`. requests: stop and save flags, all-reduced together with the
    gate's statistics. The row's `loss`, `center`, `bad` and the method's metrics are completed by the next step or by
    `flush`; until then `state.pending` holds them. A step whose center, loss or gradients are not finite on any rank
    changes no weight, moment or running statistic on any rank. If memory runs out, the step is repeated in smaller
    micro-batches with --auto-batch; otherwise RunFailedError is raised.
    """
    state.method.schedule(state.optimizer, state.position)
    if computes_nothing(state, rule):
        return _empty_step(state, rule, config, compute, requests)
    while (attempt := _attempt(state, views, rule, config, compute, requests)) is None:
        state.optimizer.zero_grad(set_to_none=True)
        halve_microbatch(state, views, config, compute)
    state.gate = attempt.gate
    state.method.update_running_stats(attempt.student)
    state.pending = _pending_step(state, attempt, config)
    state.step += 1
    row = state.pending.row
    if distributed.size() > 1:  # all ranks must agree on a step before the next
        flush(state)
    return row


def computes_nothing(state: RunState, rule: gates.GateRule) -> bool:
    """Return whether the next step, skipped whatever its embeddings are, needs neither them nor views."""
    return gates.known_ahead(rule, state.gate) is False and not state.method.follows_skipped_steps


def _empty_step(
    state: RunState, rule: gates.GateRule, config: AdaptConfig, compute: Compute, requests: StopRequests | None
) -> dict[str, Any]:
    """Take a step that computes nothing, in place. Returns its row, whose center is None; completes the row before."""
    flush(state)
    if distributed.size() > 1 and requests:  # in other steps they come along with the gate's statistics
        flags = torch.tensor(requests.local_flags(), device=compute.device)
        requests.set_reduced(distributed.reduce(flags).tolist())
    row = row_of(state, config, is_open=False, updated=False) | {"forward_s": 0.0, "backward_s": 0.0}
    _, state.gate = gates.decide(rule, state.gate, (0.0,))
    state.step += 1
    return row


def _pending_step(state: RunState, attempt: _Attempt, config: AdaptConfig) -> PendingStep:
    """Return the row of the step, with None for what is still on the device, and the numbers to complete it with."""
    row = row_of(state, config, is_open=attempt.is_open, updated=attempt.updated)
    metrics = state.method.metrics() if attempt.is_open else {}
    names = [name for name, value in metrics.items() if isinstance(value, Tensor)]
    row |= {name: None if name in names else value for name, value in metrics.items()}
    numbers = torch.stack([x.detach().float() for x in [*attempt.results, *(metrics[name] for name in names)]])
    return PendingStep(row, numbers, names, attempt.marks)


@dataclass(frozen=True)
class _Attempt:
    """A step that had enough memory."""

    is_open: bool
    student: Embeddings
    gate: gates.GateState
    results: list[Tensor]  # scalars: the center's magnitude; on update steps also loss and whether all was finite
    updated: bool
    marks: list[Any]  # of the device's clock: begin, gate, end


def _attempt(
    state: RunState,
    views: Views,
    rule: gates.GateRule,
    config: AdaptConfig,
    compute: Compute,
    requests: StopRequests | None,
) -> _Attempt | None:
    """Run forward, gate and update. Returns None if a rank is out of memory and all ranks know of it."""
    try:
        marks = [_mark(compute)]
        is_open, student, teacher, gate = forward(state, views, rule, config, compute, requests)
        marks.append(_mark(compute))
        results, updated = [student.magnitudes[0]], False
        if is_open:
            more, updated = update(_loss(state.method, student, teacher, compute), state, config)
            results += more
        marks.append(_mark(compute))
        return _Attempt(is_open, student, gate, results, updated, marks)
    except OutOfMemoryError:
        return None  # the frames that hold the step's tensors are freed with the exception
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):  # raised where the other ranks could not be informed
            raise RunFailedError(explanation(state, views, config, compute)) from error
        raise


def _mark(compute: Compute) -> Any:
    if compute.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def forward(
    state: RunState,
    views: Views,
    rule: gates.GateRule,
    config: AdaptConfig,
    compute: Compute,
    requests: StopRequests | None = None,
) -> tuple[bool, Embeddings, Embeddings | None, gates.GateState]:
    """Embed the views and ask the gate.

    Returns (is_open, student, teacher, gate): whether this is an update step, the embeddings of the student and, in
    layout asymmetric, of the teacher (of a skipped step only the teacher's, as the student), and the gate's next state.
    """
    method, gate = state.method, state.gate

    def embed(views: Views) -> Embeddings:
        return _with_global_stats(method, views, compute, requests)

    def decide(embeddings: Embeddings) -> bool:
        nonlocal gate
        is_open, gate = _decide(rule, state, embeddings, config)
        return is_open

    with_grad = gates.known_ahead(rule, gate) is not False
    with compute.autocast():
        is_open, student, teacher = _embed(method, views, config, embed, decide, gate.step + 1, with_grad=with_grad)
    return is_open, student, teacher, gate


def forward_loss(method: Method, views: Views, config: AdaptConfig) -> Tensor:
    """Return the loss of an update step over the images of one process, a scalar in fp32."""

    def embed(views: Views) -> Embeddings:
        embeddings = method.embed(views)
        return method.with_global_stats(embeddings, embeddings.local_stats)

    _, student, teacher = _embed(method, views, config, embed, lambda embeddings: True, 0)
    return method.loss(student, teacher)


def _embed(
    method: Method,
    views: Views,
    config: AdaptConfig,
    embed: Callable[[Views], Embeddings],
    decide: Callable[[Embeddings], bool],
    step: int,
    *,
    with_grad: bool = True,
) -> tuple[bool, Embeddings, Embeddings | None]:
    """Embed what the layout asks for. Returns (is_open, student, teacher).

    symmetric: the student embeds all views, which give the targets too. asymmetric: the teacher embeds the first view
    without gradients; on update steps the student embeds the others, with --gate-unit image of some images only.
    """
    if config.objective.layout == "asymmetric":
        with torch.no_grad():
            teacher = embed(views[:1])
        if not decide(teacher):
            return False, teacher, None
        if config.experimental.gate_unit == "image":
            teacher, selected = method.select_images(teacher, step)
            return True, embed(views[1:, selected]), teacher
        return True, embed(views[1:]), teacher
    with torch.set_grad_enabled(with_grad):
        student = embed(views)
    if decide(student):
        return True, student, None
    return False, student.detach(), None  # nothing kept for a backward pass outlives the decision


def _with_global_stats(method: Method, views: Views, compute: Compute, requests: StopRequests | None) -> Embeddings:
    """Return the embeddings with the statistics of all ranks; reduces stop requests and memory flags on the way."""
    local: Embeddings | None = None
    num_stats = method.num_stats(len(views))
    try:
        local = method.embed(views)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if distributed.size() == 1:
        if local is None:
            raise OutOfMemoryError
        return method.with_global_stats(local, local.local_stats)
    stats = torch.zeros(num_stats, device=compute.device) if local is None else local.local_stats
    flags = [*(requests.local_flags() if requests else [0.0] * NUM_FLAGS), float(local is None)]
    reduced = distributed.reduce(torch.cat([stats, stats.new_tensor(flags)]))
    *flags, num_short = reduced[num_stats:].tolist()
    if requests:
        requests.set_reduced(flags)
    if num_short or local is None:
        raise OutOfMemoryError
    return method.with_global_stats(local, reduced[:num_stats])


def _decide(
    rule: gates.GateRule, state: RunState, embeddings: Embeddings, config: AdaptConfig
) -> tuple[bool, gates.GateState]:
    """Ask the gate. The one place of a step where the host waits; the previous step's results come along."""
    magnitudes, pending = embeddings.magnitudes, state.pending
    values = (magnitudes if pending is None else torch.cat([magnitudes, pending.numbers])).tolist()
    if pending is not None:
        complete_row(state, values[len(magnitudes) :])
    statistics = values[: len(magnitudes)]
    is_open, gate = gates.decide(rule, state.gate, statistics)
    if config.runtime.debug:
        distributed.check_same(f"step {state.step}: the gate's decision and the magnitudes", [is_open, *statistics])
    return is_open, gate


def _loss(method: Method, student: Embeddings, teacher: Embeddings | None, compute: Compute) -> Tensor:
    try:
        with compute.autocast():
            return method.loss(student, teacher)
    except (RuntimeError, MemoryError) as error:
        # other ranks may wait in one of Sinkhorn's reductions, where they cannot be informed
        if not is_out_of_memory(error) or distributed.size() > 1:
            raise
    raise OutOfMemoryError
