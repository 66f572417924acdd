"""Adaptation of a pretrained ViT to unlabeled images: from configuration to adapter."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.diet import DietConfig
from upstep_fast.config.explora import Dinov2Config, MaeConfig
from upstep_fast.config.files import from_options, of_method
from upstep_fast.config.flat import replace_flat
from upstep_fast.config.options import AdaptOptions
from upstep_fast.config.resolve import MAX_PASSES, resolve
from upstep_fast.config.signatures import with_keywords
from upstep_fast.data.curation.survey import survey
from upstep_fast.data.sources.source import Source, open_configured
from upstep_fast.kernels import _dispatch as dispatch
from upstep_fast.methods.crops import view_configs
from upstep_fast.model import backbone as backbones
from upstep_fast.model.backbone import Backbone
from upstep_fast.report import image_panels as pictures
from upstep_fast.report import page as html_report
from upstep_fast.report.logs import held_messages, train_log
from upstep_fast.runtime import device, distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.machine import num_workers
from upstep_fast.runtime.progress import track
from upstep_fast.train import budget
from upstep_fast.train.cost import log_cost
from upstep_fast.train.intensity import as_recorded, with_intensity
from upstep_fast.train.loop import needs_base, start, train
from upstep_fast.train.memory.fit import settle
from upstep_fast.train.memory.images import ImageMemory, estimate
from upstep_fast.train.state import AdaptResult
from upstep_fast.train.verdict import hold_out
from upstep_fast.version import __version__

log = logging.getLogger("upstep_fast")


@with_keywords(AdaptConfig, Dinov2Config, MaeConfig, DietConfig)
def adapt(
    model: str | Path | None,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    **keywords: Unpack[AdaptOptions],
) -> AdaptResult:
    """Adapt `model` to the images in `data` and write the adapter to the folder `out`.

    Keywords are the flags of `upstep-fast adapt --help-all`. The defaults shown are those of method="upstep"; "explora"
    and "diet" have their own. model may be the folder of a run or adapter, which is then trained further
    (`from_`, with None as the model). Raises UpstepError.
    """
    options = {"model": model, "data": data, "out": out, **keywords}
    config_class = of_method(AdaptConfig, options.get("method"), options.get("objective"))
    return run(from_options(config_class, options, "adapt"))


def run(config: AdaptConfig) -> AdaptResult:
    """Run one adaptation. Raises UpstepError, with the exit code of the command line."""
    compute = device.resolve(config.runtime.device, config.runtime.precision, config.runtime.implementation)
    with distributed.joined(compute.device), track("adapt"):
        return _run(as_recorded(config), compute)


def _run(config: AdaptConfig, compute: Compute) -> AdaptResult:
    images = open_configured(config.data, "train")
    if distributed.is_first():  # before steps are measured and weights are fetched
        output.check(config)
    with held_messages() as planned:
        config, limit = budget.plan(config, compute, len(images))
    config, source, held_out = hold_out(config, images)
    backbone = backbones.load_from(config.model)
    config, source = with_intensity(config, source, len(backbone.mean))
    held_out = None if held_out is None else replace(held_out, reading=source.reading)
    config, source, backbone, files = _survey(config, source, backbone)
    resolved = resolve(config, len(source), distributed.size())
    num_weights = sum(p.numel() for p in backbone.vit.parameters())
    # training changes `backbone` in place; copied before free memory is looked at
    base = backbone.copy() if needs_base(resolved.config) else None
    config = settle(resolved.config, compute, _decoded(resolved.config, source, backbone, compute))
    implementation = None if config.runtime.implementation == "auto" else config.runtime.implementation
    with dispatch.forced(implementation), contextlib.ExitStack() as stack:
        out = Path(config.output.out)
        if distributed.is_first():
            stack.enter_context(output.lock_run_folder(config))
        with held_messages() as messages:
            _log_start(resolved.reduced, compute, source)
            if resolved.has_few_images:
                log.info("steps: %d epochs by default for so few images; --steps or --epochs sets another", MAX_PASSES)
            # all that can refuse the configuration comes before anything in the folder is changed
            identity, state = start(config, compute, source, backbone, out)
            log_cost(config, compute, len(source), backbone, num_weights, state)
        if distributed.is_first():
            output.begin(config, anew=state.step == 0, goes_on=state.step < state.end(config.optimization.num_steps))
            stack.enter_context(html_report.written_after(out))
            stack.enter_context(train_log(out / "train.log", [*planned, *messages]))
            with output.writing(out):
                for name, text in files.items():
                    write_atomic(out / name, text)
        result = train(config, compute, source, held_out, identity, state, base, out, limit)
        if config.output.report_images and distributed.is_first():
            with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
                pictures.collect(config, compute, source, out, backbone=base)
        return result


def _decoded(config: AdaptConfig, source: Source, backbone: Backbone, compute: Compute) -> ImageMemory | None:
    """Return the estimate of this rank's decoded images; None without a memory check."""
    if not config.memory.check or config.memory.auto_batch:
        return None
    return estimate(
        source,
        channels=len(backbone.mean),
        min_side=max(views.min_side for views, _ in view_configs(config, backbone)),
        batch=config.optimization.batch_size // distributed.size(),
        num_workers=num_workers(config.data.num_workers),
        device=compute.device,
    )


def _survey(
    config: AdaptConfig, source: Source, backbone: Backbone
) -> tuple[AdaptConfig, Source, Backbone, dict[str, bytes]]:
    """Apply --triage and --mean-std auto. Returns config, source and backbone after them, and files for `out`."""
    surveyed = survey(
        source,
        Path(config.output.out),
        run_triage=config.data.triage,
        measure_statistics=config.data.mean_std == "auto",
        channels=len(backbone.mean),
        num_workers=num_workers(config.data.num_workers),
        max_bad_fraction=config.data.max_bad_fraction,
    )
    if surveyed.statistics is not None:  # in the saved configuration: a resumed run, and the next command, repeat them
        mean, std = surveyed.statistics
        config = replace_flat(config, mean_std="given", mean=mean, std=std)
        backbone = replace(backbone, mean=mean, std=std)
    return config, surveyed.source, backbone, surveyed.files


def _log_start(reduced: Mapping[str, tuple[int, int]], compute: Compute, source: Source) -> None:
    """Log versions, device, ranks, the images, and what their number has reduced: name -> (requested, possible)."""
    versions = f"upstep-fast {__version__}, torch {torch.__version__}"
    ranks = f", {distributed.size()} ranks" if distributed.size() > 1 else ""
    log.info("%s, %s in %s%s", versions, compute.device, compute.precision, ranks)
    log.info("data: %s", source.summary)
    for name, (requested, possible) in reduced.items():
        there = f"the {possible} images there are"
        if possible < len(source):
            there = f"{possible}: the {len(source)} images there are, in equal parts for {distributed.size()} ranks"
        log.warning("%s: reduced from %d to %s", name, requested, there)
