"""The loop: views, embeddings, gate, and on open steps loss, backward and update."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backbone as backbones
from . import gate as gates
from . import lora
from .config import AdaptConfig, known_field, to_toml
from .data.loader import Batch, Loader
from .data.sources import Source, open_source
from .data.views import ViewConfig, random_views, view_config
from .device import Compute, resolve
from .errors import CheckFailedError, ConfigError, Interrupted, RunFailedError
from .kernels import _dispatch as dispatch
from .methods.upstep import Embedded, UpStep
from .report import Metrics, Progress

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
    """Adapts `model` to the images in `data` and writes the adapter to `out`; keywords are AdaptConfig's fields."""
    for name in options:
        known_field(name, AdaptConfig, "adapt")
    if missing := [name for name in ("model", "data", "out") if name not in options]:
        raise ConfigError(f"adapt: {', '.join(missing)} must be given")
    data = options["data"]
    paths = [data] if isinstance(data, (str, Path)) else data
    fields: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    return run(AdaptConfig(**fields | {"data": tuple(str(path) for path in paths)}))


def run(config: AdaptConfig) -> AdaptResult:
    """One adaptation, from configuration to adapter. Raises UpstepError with the exit code of what went wrong."""
    compute = resolve(config.device, config.precision)
    source = open_source(config.data, split="train")
    backbone = backbones.load(config.model, img_size=config.img_size)
    config = fit_to_data(config, len(source))
    out = prepare_out(config)
    with dispatch.forced(None if config.implementation == "auto" else config.implementation):
        return _train(config, compute, source, backbone, out)


def fit_to_data(config: AdaptConfig, num_images: int) -> AdaptConfig:
    """The configuration with length resolved and batch and prototypes reduced to what the data can fill."""
    batch = min(config.batch_size, num_images)
    if batch < 2:
        raise ConfigError(f"data: {num_images} image found, adaptation needs at least 2")
    if batch < config.batch_size:
        log.warning("batch_size: reduced from %d to the %d images there are", config.batch_size, batch)
    prototypes = min(config.prototypes, num_images)
    if prototypes < config.prototypes:
        log.warning("prototypes: reduced from %d to the %d images there are", config.prototypes, prototypes)
    steps = config.steps
    if steps is None:
        per_epoch = num_images // batch
        steps = max(400, 10 * per_epoch) if config.epochs is None else max(1, round(config.epochs * num_images / batch))
    return replace(config, batch_size=batch, prototypes=prototypes, steps=steps, epochs=None)


def prepare_out(config: AdaptConfig) -> Path:
    """Makes the output folder and writes the resolved configuration. Raises ConfigError if it holds something."""
    out = Path(config.out)
    try:
        if out.is_dir() and any(out.iterdir()):
            if not config.overwrite:
                raise ConfigError(f"out: {out} is not empty; choose another folder or add --overwrite")
            if not (out / "config.toml").is_file():
                raise ConfigError(
                    f"out: {out} holds no run of upstep-fast, so --overwrite leaves it alone; choose another"
                )
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.toml").write_text(to_toml(config))
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error.strerror}; choose another folder") from error
    return out


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine to 0. Skipped steps advance it too.

    warmup: a fraction of `steps` below 1, a number of steps from 1 on.
    """
    rising = warmup * steps if warmup < 1 else warmup
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def _train(
    config: AdaptConfig, compute: Compute, source: Source, backbone: backbones.Backbone, out: Path
) -> AdaptResult:
    assert config.steps is not None
    method = UpStep(backbone, config, config.prototypes).to(compute.device)
    optimizer = make_optimizer(method, config)
    scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
    rule, state = gate_rule(config), gates.GateState()
    views = view_config(config, backbone)
    received = torch.zeros(len(method.adapters), dtype=torch.bool, device=compute.device)
    bad, loss_value, start = 0, math.nan, time.monotonic()
    num_workers = default_workers() if config.num_workers is None else config.num_workers
    loader = Loader(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        num_workers=num_workers,
        max_bad_fraction=config.max_bad_fraction,
    )
    with (
        loader,
        Metrics(out / "metrics.jsonl") as metrics,
        Progress(config, state) as progress,
        stop_signals() as stop,
    ):
        try:
            if method.needs_start:
                with compute.autocast():
                    method.start(_start_views(config, source, views, compute, num_workers))
            for step, batch in zip(range(config.steps), loader, strict=False):
                began = time.monotonic()
                lr = config.lr * schedule(step, config.steps, config.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                images = make_views(batch, views, config, compute)
                is_open, learning, target, state = forward(method, images, rule, state, config, compute)
                loss = None
                if is_open:
                    with compute.autocast():
                        loss = method.loss(learning, target)
                    applied = update(loss, method, optimizer, scaler, received, config.clip)
                    loss_value = loss.item()
                    bad = 0 if applied else bad + 1
                elif not math.isfinite(magnitude := learning.magnitudes[0].item()):
                    bad += 1
                    log.warning("step %d: the centre's magnitude is %s; step skipped", step, magnitude)
                method.remember(learning)
                row = {
                    "step": step,
                    "loss": loss_value if is_open else None,
                    "center": learning.magnitudes[0].item(),
                    "open": is_open,
                    "lr": lr,
                    "images_per_s": config.batch_size / max(1e-9, time.monotonic() - began + loader.data_wait),
                    "data_wait": loader.data_wait,
                    "epoch": batch.epoch,
                    "replaced": batch.replaced,
                }
                metrics.write(row)
                progress.update(row, state)
                if bad >= MAX_BAD_STEPS:
                    raise RunFailedError(
                        f"loss: not finite in {bad} steps in a row (last: step {step}); the adapter before them is in "
                        f"{out / 'adapter'}; lower --lr or use --precision fp32"
                    )
                if stop():
                    raise Interrupted(
                        f"stopped after {step + 1} of {config.steps} steps; adapter saved in {out / 'adapter'}"
                    )
        finally:
            # whatever ends the run, what was learnt is kept
            if state.opened:
                lora.save(out / "adapter", method.adapters, config.model)
            loader.write_skipped(out / "skipped.csv")
        check_adapter(method, received, images[0], compute, out)
    return AdaptResult(out / "adapter", config.steps, state.opened, loss_value, time.monotonic() - start)


def forward(
    method: UpStep,
    images: Tensor,
    rule: gates.GateRule,
    state: gates.GateState,
    config: AdaptConfig,
    compute: Compute,
) -> tuple[bool, Embedded, Embedded | None, gates.GateState]:
    """Embeds the views, asks the gate; returns the decision, what learns, what makes targets, the gate's new state."""
    ahead = gates.known_ahead(rule, state)
    # the only place where the host waits for the device before the decision
    with compute.autocast():
        if config.layout == "asymmetric":
            with torch.no_grad():
                target = method.embed(images[:1])
            is_open, state = gates.decide(rule, state, target.magnitudes.tolist())
            if not is_open:
                return False, target, None, state
            return True, method.embed(images[1:]), target, state
        with torch.set_grad_enabled(ahead is not False):
            learning = method.embed(images)
        is_open, state = gates.decide(rule, state, learning.magnitudes.tolist())
    if not is_open:  # nothing kept for a backward pass outlives the decision
        learning = Embedded(learning.z.detach(), learning.centre.detach(), learning.magnitudes)
    return is_open, learning, None, state


def update(
    loss: Tensor,
    method: UpStep,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    received: Tensor,
    clip: float,
) -> bool:
    """Backward and one optimizer step, unless the loss or a gradient is not finite. Returns whether it was applied.

    received: [adapters] bool, set where an adapter's B got a gradient other than 0.
    """
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(loss.item()):
        log.warning("the loss is %s; step not applied", loss.item())
        return False
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    adapters = method.adapter_parameters()
    norm = torch.nn.utils.get_total_norm([p.grad for p in adapters if p.grad is not None])
    others = torch.nn.utils.get_total_norm([p.grad for p in method.other_parameters() if p.grad is not None])
    finite = math.isfinite((norm + others).item())
    if finite:
        received |= torch.stack([a.lora_b.grad.ne(0).any() for a in method.adapters.values()])  # type: ignore[union-attr]
        if clip:
            torch.nn.utils.clip_grads_with_norm_(adapters, clip, norm)
    elif not scaler.is_enabled():
        log.warning("a gradient is not finite; step not applied")
    if finite or scaler.is_enabled():
        scaler.step(optimizer)  # under fp16 the scaler itself leaves out a step with non-finite gradients
        scaler.update()
    return finite or scaler.is_enabled()


def make_optimizer(method: UpStep, config: AdaptConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on the head alone."""
    groups: list[dict[str, Any]] = [{"params": method.adapter_parameters(), "weight_decay": 0.0}]
    if others := method.other_parameters():
        groups.append({"params": others, "weight_decay": config.weight_decay})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)


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


def make_views(batch: Batch, views: ViewConfig, config: AdaptConfig, compute: Compute) -> Tensor:
    """Two random views of a batch on the device, [2, B, C, H, W]."""
    return random_views(
        batch.images,
        views,
        seed=config.seed,
        epoch=batch.epoch,
        indices=batch.indices,
        views=2,
        device=compute.device,
    )


@torch.no_grad()
def check_adapter(method: UpStep, received: Tensor, images: Tensor, compute: Compute, out: Path) -> None:
    """Raises CheckFailedError unless every adapter got a gradient, moved, and changes the features."""
    for (name, adapter), got in zip(method.adapters.items(), received.tolist(), strict=True):
        if not got:
            raise CheckFailedError(
                f"adapter: {name} never received a gradient; the adapter in {out} is kept for a look"
            )
        for part, b in zip(adapter.parts, adapter.lora_b, strict=True):
            if not b.any():
                raise CheckFailedError(f"adapter: lora_B of {name}, part {part}, is all zero after training; see {out}")
            if not b.isfinite().all():
                raise CheckFailedError(f"adapter: lora_B of {name}, part {part}, is not finite; see {out}")
    with compute.autocast():
        adapted = backbones.features(method.vit, images[:32])
        with without_adapters(method):
            base = backbones.features(method.vit, images[:32])
    if torch.equal(adapted, base):
        raise CheckFailedError(f"adapter: features with and without it are the same; the adapter in {out} does nothing")


@contextlib.contextmanager
def without_adapters(method: UpStep) -> Iterator[None]:
    """Within this context the adapters add nothing."""
    scales = {adapter: adapter.scale for adapter in method.adapters.values()}
    try:
        for adapter in scales:
            adapter.scale = 0.0
        yield
    finally:
        for adapter, scale in scales.items():
            adapter.scale = scale


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """Turns SIGINT and SIGTERM into a question, `stop()`; a second one acts as usual. Handlers are put back after."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers; elsewhere signals are the caller's
        before[signal.SIGINT] = signal.signal(signal.SIGINT, note)
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_workers() -> int:
    """One thread a core, at most 16."""
    return min(16, os.cpu_count() or 1)


def _start_views(
    config: AdaptConfig, source: Source, views: ViewConfig, compute: Compute, num_workers: int
) -> Iterator[Tensor]:
    with Loader(source, batch_size=config.batch_size, seed=config.seed, num_workers=num_workers) as loader:
        batches = -(-min(len(source), START_IMAGES) // config.batch_size)
        for _, batch in zip(range(batches), loader, strict=False):
            yield make_views(batch, views, config, compute)
