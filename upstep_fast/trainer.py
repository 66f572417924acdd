"""The loop: batches, views, steps (step.py), checkpoints, and what is written when it ends, however it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import __version__, html_report, lora, methods, output, resume
from . import backbone as backbones
from . import gate as gates
from .adapter_check import check_adapter
from .checkpoint import Writer
from .config import AdaptConfig, known_field, of_method
from .data.loader import Batch, Loader
from .data.sources import Source, open_source
from .device import Compute, resolve
from .errors import ConfigError, Interrupted, RunFailedError
from .kernels import _dispatch as dispatch
from .methods import Method
from .report import Metrics, Progress, train_log
from .resume import RunState
from .signals import signals
from .step import step

log = logging.getLogger("upstep_fast")

MAX_BAD_STEPS = 3  # non-finite steps in a row that end the run
START_IMAGES = 4096  # seen once, for k-means prototypes and the base model's centre


@dataclass(frozen=True)
class AdaptResult:
    """Where a finished run's files are and how it went."""

    adapter: Path
    steps: int
    opened: int
    loss: float
    seconds: float


def adapt(**options: Any) -> AdaptResult:
    """Adapts `model` to the images in `data` and writes the adapter to `out`.

    Keywords are the fields of AdaptConfig, with method="explora" those of Dinov2Config, or MaeConfig (objective="mae").
    """
    config_class = of_method(AdaptConfig, options.get("method"), options.get("objective"))
    for name in options:
        known_field(name, config_class, "adapt")
    if missing := [name for name in ("model", "data", "out") if name not in options]:
        raise ConfigError(f"adapt: {', '.join(missing)} must be given")
    data = options["data"]
    paths = [data] if isinstance(data, (str, Path)) else data
    fields: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    return run(config_class(**fields | {"data": tuple(str(path) for path in paths)}))


def run(config: AdaptConfig) -> AdaptResult:
    """One adaptation, from configuration to adapter. Raises UpstepError with the exit code of what went wrong."""
    compute = resolve(config.device, config.precision)
    source = open_source(config.data, split="train")
    backbone = backbones.load_from(config)
    asked, config = config, fit_to_data(config, len(source))
    implementation = None if config.implementation == "auto" else config.implementation
    with (
        output.opened(config) as out,
        html_report.written_after(out),
        train_log(out / "train.log"),
        dispatch.forced(implementation),
    ):
        versions = f"upstep-fast {__version__}, torch {torch.__version__}"
        log.info("%s, %s in %s", versions, compute.device, compute.precision)
        for name in ("batch_size", "prototypes"):
            if (before := getattr(asked, name)) != (now := getattr(config, name)):
                log.warning("%s: reduced from %d to the %d images there are", name, before, now)
        return _train(config, compute, source, backbone, out)


def fit_to_data(config: AdaptConfig, num_images: int) -> AdaptConfig:
    """The configuration with length resolved and batch and prototypes reduced to what the data can fill."""
    batch = min(config.batch_size, num_images)
    if batch < 2:
        raise ConfigError(f"data: {num_images} image found, adaptation needs at least 2")
    prototypes, steps = min(config.prototypes, num_images), config.steps
    if steps is None:
        per_epoch = num_images // batch
        steps = max(400, 10 * per_epoch) if config.epochs is None else max(1, round(config.epochs * num_images / batch))
    return replace(config, batch_size=batch, prototypes=prototypes, steps=steps, epochs=None)


def _train(
    config: AdaptConfig, compute: Compute, source: Source, backbone: backbones.Backbone, out: Path
) -> AdaptResult:
    assert config.steps is not None
    identity = resume.identify(config, compute, source, backbones.fingerprint(backbone.vit))
    rule, channels, state = gate_rule(config), len(backbone.mean), fresh_state(config, compute, backbone)
    if config.resume:
        resume.go_on(state, out / output.CHECKPOINTS, identity)
    began = time.monotonic()
    with (
        make_loader(config, source, state, channels, compute) as loader,
        Metrics(out / "metrics.jsonl", state.step, config.tensorboard) as metrics,
        Progress(config, state.gate) as progress,
        Writer() as writer,
        signals() as asked,
    ):
        with _kept(state, loader, config, out):
            if state.step == 0 and state.method.needs_start:
                with compute.autocast():
                    state.method.start(_start_views(config, source, state, channels, compute))
            while state.step < config.steps:
                began_step = time.monotonic()
                batch = next(loader)
                row = step(state, batch.views, rule, config, compute)
                row |= {
                    "images_per_s": config.batch_size / max(1e-9, time.monotonic() - began_step),
                    "data_wait": loader.data_wait,
                    "epoch": batch.epoch,
                    "replaced": batch.replaced,
                }
                progress.update(row, state.gate)
                # looked at once: a signal during the save waits for the next step
                stop, is_last = asked.stop, state.step == config.steps
                with output.writing(out):
                    metrics.write(row)
                    stop_if_bad(state, row, source, batch, out)
                    if stop or is_last or asked.take() or state.step % config.checkpoint_every == 0:
                        metrics.sync()
                        resume.save(state, out / output.CHECKPOINTS, identity, writer)
                    if stop or is_last:
                        writer.wait()
                if stop and not is_last:
                    raise Interrupted(
                        f"stopped after {state.step} of {config.steps} steps, all saved; "
                        "go on with the same command and --resume"
                    )
        images = state.method.images(next(loader).views)
        check_adapter(state, images, compute, out)
    return AdaptResult(out / "adapter", config.steps, state.gate.opened, state.loss, time.monotonic() - began)


def stop_if_bad(state: RunState, row: dict[str, Any], source: Source, batch: Batch, out: Path) -> None:
    """Counts steps that were not applied; at the third in a row writes out/bad_batches.json and ends the run.

    Raises RunFailedError, or OSError if the file cannot be written.
    """
    if row["bad"] is None:
        if row["open"]:
            state.bad.clear()
        return
    log.warning("step %d: %s; not applied", row["step"], row["bad"])
    names = [source.name(index) for index in batch.indices.tolist()]
    state.bad.append({"step": row["step"], "reason": row["bad"], "images": names})
    if len(state.bad) >= MAX_BAD_STEPS:
        path = out / "bad_batches.json"
        path.write_text(json.dumps(state.bad, indent=1) + "\n")
        raise RunFailedError(
            f"step {row['step']}: {row['bad']}, {len(state.bad)} steps in a row; the images are listed in {path}, the "
            f"adapter before them is in {out / 'adapter'}; lower --lr or use --precision fp32"
        )


def fresh_state(config: AdaptConfig, compute: Compute, backbone: backbones.Backbone) -> RunState:
    """The state before the first step."""
    method = methods.build(backbone, config).to(compute.device)
    if config.implementation != "reference":
        method.accelerate(compute.dtype or torch.float32, config.memory)
    return RunState(
        method=method,
        optimizer=make_optimizer(method, config),
        scaler=torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16"),
        received=torch.zeros(len(method.watched()), dtype=torch.bool, device=compute.device),
    )


def make_optimizer(method: Method, config: AdaptConfig) -> torch.optim.Optimizer:
    """AdamW over the method's groups."""
    return torch.optim.AdamW(method.parameter_groups(), lr=config.lr, betas=(0.9, 0.999), fused=True)


def gate_rule(config: AdaptConfig) -> gates.GateRule:
    """The gate that this configuration asks for."""
    return gates.GateRule(
        rule=config.gate,
        update_when=config.update_when,
        rate=config.gate_rate,
        beta=config.gate_beta,
        max_skips=config.max_skips,
        seed=config.seed,
    )


def make_loader(config: AdaptConfig, source: Source, state: RunState, channels: int, compute: Compute) -> Loader:
    """The batches from `state.step` on, with their views; bad images are noted in `state.skipped`."""
    loader = Loader(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        num_workers=default_workers() if config.num_workers is None else config.num_workers,
        max_bad_fraction=config.max_bad_fraction,
        start_step=state.step,
        channels=channels,
        min_side=state.method.min_side,
        make_views=lambda batch: make_views(state.method, batch, compute),
        device=compute.device,
    )
    loader.skipped = state.skipped
    return loader


def make_views(method: Method, batch: Batch, compute: Compute) -> Any:
    """The views of a batch that the method wants, on the device."""
    return method.views(batch, compute.device)


@contextlib.contextmanager
def _kept(state: RunState, loader: Loader, config: AdaptConfig, out: Path) -> Iterator[None]:
    # whatever ends the run, what was learnt is kept

    def keep() -> None:
        if state.gate.opened:
            lora.write(out / "adapter", state.method.result_files())
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


def default_workers() -> int:
    """One thread a core, at most 16."""
    return min(16, os.cpu_count() or 1)


def _start_views(
    config: AdaptConfig, source: Source, state: RunState, channels: int, compute: Compute
) -> Iterator[Any]:
    with make_loader(config, source, state, channels, compute) as loader:
        batches = -(-min(len(source), START_IMAGES) // config.batch_size)
        for _, batch in zip(range(batches), loader, strict=False):
            yield batch.views
