"""`upstep-fast plan`: memory of a run, part by part, whether the run fits, and its time, estimated before the run.

train/memory/count.py counts a step without allocating it, measure.py runs one, fit.py chooses level and batch. Time is
measured (--calibrate), or estimated from this device's rate of matrix products:

    seconds of a step = FLOPs / (rate of a large product x EFFICIENCY)
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import replace_flat
from upstep_fast.config.plan import PlanConfig, to_bytes
from upstep_fast.config.resolve import resolve as resolve_length
from upstep_fast.data.loading.loader import CACHE_BYTES
from upstep_fast.data.sources.source import open_configured
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.runtime import duration, machine, terminal
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.machine import format_bytes
from upstep_fast.runtime.progress import track
from upstep_fast.train.memory import count as step_memory
from upstep_fast.train.memory import measure as calibrate
from upstep_fast.train.memory.fit import LEVELS, MARGIN, Choice, Chooser, chooser, fit

CONTEXT_BYTES = 600 << 20  # of a whole GPU, what CUDA and its kernels hold before the first tensor


def run(config: PlanConfig) -> dict[str, Any]:
    """Print the plan and return it.

    Raises RunFailedError, after printing, for a plan that does not fit, with one that does; ConfigError where nothing
    fits, or for what `adapt` would refuse.
    """
    with track("plan"):
        result = make(config)
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    if not result["fits"]:
        cure = "take a smaller model or --img-size"
        if result["proposal"]:
            cure = f"this does: {_flags(result['proposal'])}"
        raise RunFailedError(f"plan: {_flags(result)} does not fit in {format_bytes(result['free_bytes'])}; {cure}")
    return result


def make(config: PlanConfig) -> dict[str, Any]:
    """Return the plan, as JSON can hold it; bytes and seconds are of one device. Raises ConfigError as `run` does."""
    asked, (compute, on) = config.to_adapt(), _where(config)
    is_here = compute.device.type == on
    if config.calibrate and not is_here:
        raise ConfigError(f"calibrate: there is no {on} device here; leave it out, or plan for the CPU")
    if config.calibrate and on == "mps":
        raise ConfigError("calibrate: the memory of an Apple GPU is not measured; leave it out")
    limit = _limit(config, compute, is_here)
    choose = chooser(asked, compute, on)
    batch = asked.optimization.batch_size
    if config.fit is not None or asked.memory.level == "auto":
        choice = _fitting(choose, batch, limit)
    else:
        choice = choose(asked.memory.level, batch)
    planned = replace_flat(asked, memory=choice.memory, batch_size=choice.batch_size)
    step = step_memory.count(planned, compute, on=on, flops=True)
    parts = _on_one_device(step, config)
    result: dict[str, Any] = {
        "model": config.model.name,
        "device": on,
        "precision": compute.precision,
        "world_size": config.world_size,
        **_setting(choice, asked, config.world_size),
        "parts": parts,
        "peak_bytes": sum(parts.values()),
        "needed_bytes": round(MARGIN * sum(parts.values())),
        "free_bytes": limit,
        "kept_bytes": step.kept,
        "levels": {level: choose(level, choice.batch_size).step.peak for level in LEVELS},
        "host_cache_bytes": CACHE_BYTES,
        "flops": {"forward": step.forward_flops, "backward": step.backward_flops},
        "measured": _measured(planned, compute) if config.calibrate else None,
    }
    result["fits"] = limit is None or result["needed_bytes"] <= limit
    result["proposal"] = None if result["fits"] else _proposal(choose, asked, limit, config.world_size)
    result["seconds"] = _seconds(result, choice.batch_size, compute) if is_here else None
    return result | _length(config, result)


def _fitting(choose: Chooser, batch: int, limit: int | None) -> Choice:
    """Return the choice that fits, of the same batch in equal parts. Raises ConfigError where nothing fits."""
    choice = fit(choose, batch, limit)
    return choose(choice.memory, -(-batch // -(-batch // choice.batch_size)))


def _setting(choice: Choice, asked: AdaptConfig, world_size: int) -> dict[str, Any]:
    """Return what `adapt` is to be given for this choice."""
    accumulate = asked.optimization.accumulate * -(-asked.optimization.batch_size // choice.batch_size)
    return {"memory": choice.memory, "batch_size": choice.batch_size * world_size, "accumulate": accumulate}


def _proposal(choose: Chooser, asked: AdaptConfig, limit: int | None, world_size: int) -> dict[str, Any] | None:
    """Return a setting that fits, None if there is none."""
    try:
        return _setting(_fitting(choose, asked.optimization.batch_size, limit), asked, world_size)
    except ConfigError:
        return None


def _flags(setting: dict[str, Any]) -> str:
    flags = f"--memory {setting['memory']} --batch-size {setting['batch_size']}"
    return flags if setting["accumulate"] == 1 else f"{flags} --accumulate {setting['accumulate']}"


def _where(config: PlanConfig) -> tuple[Compute, str]:
    """Return the precision and the type of the planned device, which this machine may lack."""
    if config.runtime.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return Compute(
            torch.device("cpu"), "bf16" if config.runtime.precision == "auto" else config.runtime.precision
        ), "cuda"
    compute = resolve(config.runtime.device, config.runtime.precision)
    return compute, compute.device.type


def _limit(config: PlanConfig, compute: Compute, is_here: bool) -> int | None:
    if config.fit is not None:
        is_host = is_here and compute.device.type == "cpu"
        return to_bytes(config.fit) - (CACHE_BYTES if is_host else CONTEXT_BYTES)
    return machine.free_bytes(compute.device) if is_here else None


def _on_one_device(step: step_memory.StepMemory, config: PlanConfig) -> dict[str, int]:
    """Return the parts on one of several devices: our reading of DDP and FSDP2, not measured."""
    parts = dict(step.parts)
    parts["views"] += step.waiting
    if config.world_size > 1:
        parts["workspace"] += 4 * step.trained  # the gradients in one buffer that is summed over the devices
        if config.runtime.shard_weights:
            parts |= {name: parts[name] // config.world_size for name in ("weights", "folded")}
    return parts


def _measured(config: AdaptConfig, compute: Compute) -> dict[str, Any]:
    real = calibrate.measure(config, compute)
    counted = step_memory.count(replace_flat(config, batch_size=real.batch), compute)
    return asdict(real) | {"planned_bytes": counted.peak}


def _seconds(result: dict[str, Any], batch: int, compute: Compute) -> dict[str, Any]:
    """Return the seconds of an update step and of a skipped step."""
    if measured := result["measured"]:
        skipped, rest = (batch / measured["batch"] * measured[f"{half}_seconds"] for half in ("forward", "backward"))
    else:
        rate = duration.EFFICIENCY * duration.product_rate(compute)
        skipped, rest = (result["flops"][half] / rate for half in ("forward", "backward"))
    return {"open": skipped + rest, "skipped": skipped, "from": "measured" if measured else "estimated"}


def _length(config: PlanConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Return the number of steps, if known, and their time with no step skipped and with half of them skipped."""
    steps, seconds = config.optimization.steps, result["seconds"]
    if steps is None and config.data.paths:
        num_images = len(open_configured(config.data, "train"))
        steps = resolve_length(config, num_images).config.optimization.steps
    if steps is None or seconds is None:
        return {"steps": steps, "total_seconds": None}
    half = steps * (seconds["open"] + seconds["skipped"]) / 2
    return {"steps": steps, "total_seconds": {"no_skips": steps * seconds["open"], "half_skipped": half}}


def show(result: dict[str, Any]) -> None:
    """Print the plan as a table and a few lines."""
    where = f"{result['device']} in {result['precision']}, memory {result['memory']}"
    # a title would wrap with the table
    terminal.print_line(f"{result['model']}, {result['batch_size']} images per step on {where}")
    print()
    table = terminal.Table()
    for column in ("part", "memory", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, size in result["parts"].items():
        table.add_row(part, format_bytes(size), f"{100 * size / result['peak_bytes']:.0f} %")
    table.add_row("peak", format_bytes(result["peak_bytes"]), "100 %")
    terminal.show(table)
    print("\n".join(_lines(result)))


def _lines(result: dict[str, Any]) -> list[str]:
    levels = ", ".join(f"{level} {format_bytes(size)}" for level, size in result["levels"].items())
    lines = [f"peak by memory level: {levels}"]
    needed, free = result["needed_bytes"], result["free_bytes"]
    if free is not None:
        verdict = "fits" if result["fits"] else "does not fit"
        margin = f"{100 * (MARGIN - 1):.0f} % margin included"
        lines.append(f"{verdict}: needs {format_bytes(needed)} ({margin}), {format_bytes(free)} free")
    lines.append(f"also in host memory: up to {format_bytes(result['host_cache_bytes'])} of decoded images")
    if measured := result["measured"]:
        real, planned = measured["peak_bytes"], measured["planned_bytes"]
        change = f"the plan says {format_bytes(planned)} ({100 * (planned / real - 1):+.1f} %)"
        lines.append(f"measured with {measured['batch']} images: {format_bytes(real)}; {change}")
    if seconds := result["seconds"]:
        rate = f"{result['batch_size'] / seconds['open']:,.3g} images/s"
        lines.append(
            f"time per step ({seconds['from']}): {_step_time(seconds['open'])} with an update, "
            f"{_step_time(seconds['skipped'])} if skipped; {rate} if no step is skipped"
        )
    else:
        lines.append(f"time: unknown, this machine has no {result['device']} device")
    if total := result["total_seconds"]:
        half, whole = (terminal.format_duration(total[name]) for name in ("half_skipped", "no_skips"))
        lines.append(f"{result['steps']:,} steps: {half} if half of them are skipped, {whole} if none are")
    setting = result if result["fits"] else result["proposal"]
    return [*lines, f"for adapt: {_flags(setting)}"] if setting else lines


def _step_time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else terminal.format_duration(seconds)
