"""One step: embeddings, gate, and on open steps loss, backward and update. A closed step keeps nothing.

The host waits for the device once a step: at the gate, for the centre's magnitudes. What else a step tells (its loss,
whether everything was finite) stays on the device and comes along with the next step's magnitudes; whether the update
is applied is decided there too. Sums over several gradients (--accumulate), fp16 and several ranks cost a wait more.

Several ranks take a step together. Reductions: the sums that the gate's statistics are made of, with what signals
asked for and whether a rank is out of memory; on open steps Sinkhorn's, and one of gradients, loss and memory. So every
rank takes the same decisions, and none applies a step that another cannot.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.errors import RunFailedError
from upstep_fast.methods import Embeddings, Method
from upstep_fast.methods import gate as gates
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.signals import NUM_FLAGS, StopRequests
from upstep_fast.train.state import PendingStep, RunState

log = logging.getLogger("upstep_fast")


class OutOfMemoryError(Exception):
    """A rank is out of memory, and all know; nothing has changed."""


def step(
    state: RunState,
    images: Any,
    rule: gates.GateRule,
    config: AdaptConfig,
    compute: Compute,
    requests: StopRequests | None = None,
) -> dict[str, Any]:
    """One step, in place; images: the views that the method made. Returns what metrics.jsonl says of it.

    The row's `loss`, `center`, `bad` and figures are filled in by the next step, or by `flush`; until then
    `state.pending` holds them. requests: the stop and save flags,
    which are all-reduced together with the gate statistics. A step whose centre, loss or gradients
    are not finite on any rank changes no weight, moment or running value on any. Out of memory: with auto_batch the
    step is tried again in more passes, else RunFailedError is raised.
    """
    method = state.method
    method.schedule(state.optimizer, state.step)
    while True:
        try:
            marks = [_mark(compute)]
            is_open, learning, target, gate = forward(state, images, rule, config, compute, requests)
            marks.append(_mark(compute))
            numbers, updated = [learning.magnitudes[0]], False
            if is_open:
                results, updated = update(_loss(method, learning, target, compute), state, config)
                numbers += results
            marks.append(_mark(compute))
            break
        except OutOfMemoryError:
            pass  # the frames that hold the step's tensors go with the exception
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # where the other ranks could not be told
                raise RunFailedError(out_of_memory(state, images, config, compute)) from error
            raise
        state.optimizer.zero_grad(set_to_none=True)
        halve_microbatch(state, images, config, compute)
    state.gate = gate
    method.update_running_stats(learning)
    row = {
        "step": state.step,
        "loss": None,
        "center": None,
        "open": is_open,
        "lr": state.optimizer.param_groups[0]["lr"],
        "bad": None,
    }
    if config.optimization.accumulate > 1:
        row["updated"] = updated
    figures = method.metrics() if is_open else {}
    names = [name for name, value in figures.items() if isinstance(value, Tensor)]
    row |= {name: None if name in names else value for name, value in figures.items()}
    numbers += [figures[name] for name in names]
    state.pending = PendingStep(row, torch.stack([x.detach().float() for x in numbers]), names, marks)
    state.step += 1
    if distributed.size() > 1:  # they agree on every step before the next
        flush(state)
    return row


def flush(state: RunState) -> None:
    """Wait for what the last step tells and fills in its row."""
    if state.pending is not None:
        complete_row(state, state.pending.numbers.tolist())


def complete_row(state: RunState, numbers: list[float]) -> None:
    """Fill in the row of the pending step from the numbers that the device has computed."""
    pending = state.pending
    assert pending is not None
    state.pending, row = None, pending.row
    magnitude, *results = numbers
    row["center"] = magnitude
    if not math.isfinite(magnitude):
        row["bad"] = f"the centre's magnitude is {magnitude}"
    if row["open"]:
        row["loss"], is_finite, *figures = results
        row |= zip(pending.figures, figures, strict=True)
        row["bad"] = _bad(row["loss"], bool(is_finite), state)
        state.loss = row["loss"]
    if collapsed := state.method.collapsed(row):
        row["collapsed"] = collapsed
    state.collapsed = state.collapsed + 1 if collapsed else 0
    if state.collapsed == 1:
        log.warning("step %d: collapse: %s", row["step"], collapsed)
    begin, decided, end = pending.marks
    row |= {"forward_s": _between(begin, decided), "backward_s": _between(decided, end)}


def _bad(loss: float, is_finite: bool, state: RunState) -> str | None:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    # under fp16 an overflow is the ordinary way to find the scale, until there is none left to take
    if is_finite or (state.scaler.is_enabled() and state.scaler.get_scale() >= 1):
        return None
    return "a gradient is not finite"


def _mark(compute: Compute) -> Any:
    if compute.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3


def forward(
    state: RunState,
    images: Any,
    rule: gates.GateRule,
    config: AdaptConfig,
    compute: Compute,
    requests: StopRequests | None = None,
) -> tuple[bool, Embeddings, Embeddings | None, gates.GateState]:
    """Embeds the views, asks the gate; returns the decision, what learns, what makes targets, the gate's new state."""
    method, ahead = state.method, gates.known_ahead(rule, state.gate)

    def embed(views: Any) -> Embeddings:
        return _of_all(lambda: method.embed(views), method.num_stats(len(views)), compute, requests)

    with compute.autocast():
        if config.objective.layout == "asymmetric":
            with torch.no_grad():
                target = embed(images[:1])
            is_open, gate = _decide(rule, state, target, config)
            if not is_open:
                return False, target, None, gate
            if config.experimental.gate_unit == "image":
                target = method.choose(target, gate.step)  # type: ignore[attr-defined]
                return True, embed(images[1:, target.chosen]), target, gate
            return True, embed(images[1:]), target, gate
        with torch.set_grad_enabled(ahead is not False):
            learning = embed(images)
        is_open, gate = _decide(rule, state, learning, config)
    if not is_open:  # nothing kept for a backward pass outlives the decision
        learning = learning.detach()
    return is_open, learning, None, gate


def _of_all(
    embed: Callable[[], Embeddings], num_stats: int, compute: Compute, requests: StopRequests | None
) -> Embeddings:
    """What `embed` returns, with the statistics of all ranks; the flags and the memory state are reduced with them."""
    own: Embeddings | None = None
    try:
        own = embed()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if distributed.size() == 1:
        if own is None:
            raise OutOfMemoryError
        return own.with_global_stats(own.local_stats)
    sums = torch.zeros(num_stats, device=compute.device) if own is None else own.local_stats
    extra = [*(requests.local_flags() if requests else [0.0] * NUM_FLAGS), float(own is None)]
    whole = distributed.reduce(torch.cat([sums, sums.new_tensor(extra)]))
    *flags, short = whole[num_stats:].tolist()
    if requests:
        requests.set_reduced(flags)
    if short or own is None:
        raise OutOfMemoryError
    return own.with_global_stats(whole[:num_stats])


def _decide(
    rule: gates.GateRule, state: RunState, embedded: Embeddings, config: AdaptConfig
) -> tuple[bool, gates.GateState]:
    # the one place of a step where the host waits for the device; what the step before tells comes along
    of_views, pending = embedded.magnitudes, state.pending
    values = (of_views if pending is None else torch.cat([of_views, pending.numbers])).tolist()
    magnitudes = values[: len(of_views)]
    if pending is not None:
        complete_row(state, values[len(of_views) :])
    is_open, after = gates.decide(rule, state.gate, magnitudes)
    if config.runtime.debug:
        distributed.check_same(f"step {state.step}: the gate's decision and the magnitudes", [is_open, *magnitudes])
    return is_open, after


def _loss(method: Method, learning: Embeddings, target: Embeddings | None, compute: Compute) -> Tensor:
    try:
        with compute.autocast():
            return method.loss(learning, target)
    except (RuntimeError, MemoryError) as error:
        # other ranks may wait in one of Sinkhorn's reductions, where they cannot be told
        if not is_out_of_memory(error) or distributed.size() > 1:
            raise
    raise OutOfMemoryError


def update(loss: Tensor, state: RunState, config: AdaptConfig) -> tuple[list[Tensor], bool]:
    """Backward and one optimizer step, which the device leaves out where the loss or a gradient is not finite.

    Returns the loss and whether all was finite, on the device, and whether a step of the optimizer was asked for:
    with config.optimization.accumulate above 1 the gradients wait in `state.gradients` until there are as many as that.
    """
    method, optimizer, scaler = state.method, state.optimizer, state.scaler
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    short = False
    try:
        scaler.scale(loss).backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        short = True
    value, shorts = distributed.average_gradients(trained, torch.stack([loss.detach(), loss.new_tensor(float(short))]))
    if short or (distributed.size() > 1 and shorts.item()):
        raise OutOfMemoryError
    scaler.unscale_(optimizer)
    parts = method.gradient_parts()
    norms = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part, _ in parts]
    finite = torch.stack([value, *norms]).isfinite().all()
    none = state.got_grad.new_zeros(())
    received = [none if p.grad is None else p.grad.ne(0).any() for p in method.must_receive_grad().values()]
    state.got_grad |= torch.stack(received) & finite
    # only what waits for more gradients must know now whether these count
    is_due = config.optimization.accumulate == 1 or (bool(finite) and _all_there(state, config.optimization.accumulate))
    if is_due:
        for (part, clip), norm in zip(parts, norms, strict=True):
            if config.optimization.accumulate > 1:
                norm = torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
            if clip:
                torch.nn.utils.clip_grads_with_norm_(part, clip, norm)
        optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]  # as GradScaler tells AdamW
        optimizer.step()
        method.after_update(finite)
    if scaler.is_enabled():
        scaler.update()
    return [value, finite], is_due


def _all_there(state: RunState, accumulate: int) -> bool:
    """Add the gradients to those that wait; once there are `accumulate`, their mean takes the gradients' place."""
    for name, p in state.method.named_parameters():
        if p.grad is not None:
            part = p.grad / accumulate
            state.gradients[name] = state.gradients[name].add_(part) if name in state.gradients else part
    state.accumulated += 1
    if state.accumulated < accumulate:
        return False
    for name, p in state.method.named_parameters():
        p.grad = state.gradients.get(name)
    state.gradients, state.accumulated = {}, 0
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; torch has no class for the host's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def halve_microbatch(state: RunState, images: Any, config: AdaptConfig, compute: Compute) -> None:
    """Halves what the model sees at once, on every rank. Raises RunFailedError where that may not or cannot help."""
    method = state.method
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
    if not config.memory.auto_batch or 2 * method.num_microbatches > 2 * len(method.images(images)):
        raise RunFailedError(out_of_memory(state, images, config, compute))
    method.num_microbatches *= 2
    log.warning(
        "step %d: out of memory; from now on each step makes %d passes over its views",
        state.step,
        method.num_microbatches,
    )


def out_of_memory(state: RunState, images: Any, config: AdaptConfig, compute: Compute) -> str:
    """What was too much, and the cure."""
    height, width = state.method.images(images).shape[-2:]
    held = ""
    if compute.device.type == "cuda":
        total = torch.cuda.get_device_properties(compute.device).total_memory
        held = f" ({torch.cuda.max_memory_allocated(compute.device) / 2**30:.1f} of {total / 2**30:.1f} GiB were taken)"
    over = f" over {distributed.size()} ranks" if distributed.size() > 1 else ""
    passes = f" in {state.method.num_microbatches} passes" if state.method.num_microbatches > 1 else ""
    cures = [
        "add --auto-batch (smaller passes, the same result)" if not config.memory.auto_batch else "",
        "take --memory lean" if config.memory.level != "lean" else "",
        "lower --batch-size",
    ]
    return (
        f"step {state.step}: out of memory on {compute.device}{held} with {config.optimization.batch_size} images of "
        f"{height} x {width}{over}{passes} and --memory {config.memory.level}; {' or '.join(c for c in cures if c)}; "
        "no step was applied in part"
    )
