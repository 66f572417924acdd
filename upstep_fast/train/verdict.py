"""The verdict at the end of a run: what is held out for it, the comparison of OUT/adapter, a refusal, OUT/verdict.json.

It costs at most SHARE of the run, counted in images that pass through a model:

    held-out images x PASSES <= SHARE x steps x batch x views of an image

OUT/adapter is read back as it was written, strength included. An adapter that is worse on strong evidence is refused
as by --judge-every: OUT/adapter becomes OUT/adapter-refused, exit code 4.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.adapter_folder import REFUSED
from upstep_fast.config.flat import replace_flat
from upstep_fast.config.resolve import resolve
from upstep_fast.config.training import MIN_VERDICT_IMAGES
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import AdapterRefusedError, ConfigError, UpstepError, first_line
from upstep_fast.evaluation.features import plain_features
from upstep_fast.evaluation.verdict import (
    FILE,
    Verdict,
    decisive,
    label_free_verdict,
    measured_verdict,
    to_json,
    with_base_kept,
)
from upstep_fast.model import lora, peft_format, pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.report.run_record import read_config
from upstep_fast.runtime import distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.progress import Task, track
from upstep_fast.runtime.terminal import counted
from upstep_fast.train import validator
from upstep_fast.train.validator import SMALLEST, NoValidator, Validator, num_held_out

log = logging.getLogger("upstep_fast")

SHARE = 0.05  # of the run
PASSES = 6  # of a held-out image: two views and, with labels, the image itself, through two models
MIN_FILES = 4  # of several pictures each, below which `auto` holds none out

Verdicts = tuple[Verdict | None, Verdict | None]  # label-free, measured


def hold_out(config: AdaptConfig, source: Source) -> tuple[AdaptConfig, Source, Source | None]:
    """Return the configuration of `with_held_out`, and training and held-out images. Raises ConfigError, DataError.

    A resumed run without --steps and --epochs has as many steps as before.
    """
    run, out = config.optimization, Path(config.output.out)
    if config.output.resume and run.steps is None and run.epochs is None and (steps := _recorded(out, "steps", None)):
        config = replace_flat(config, steps=steps)
    groups = source.groups()
    num_files = len(source) if groups is None else len(np.unique(groups))
    config = with_held_out(config, len(source), distributed.size(), num_files)
    return config, *validator.hold_out(source, config)


def with_held_out(config: AdaptConfig, num_images: int, num_ranks: int, num_files: int | None = None) -> AdaptConfig:
    """Return the configuration with `verdict` auto as a number of images, or off if that would be too few.

    num_files: that hold the images, whose pictures stay together; None: as many as images. A resumed run holds out what
    it did before. Raises ConfigError.
    """
    if config.output.resume and (recorded := _recorded(Path(config.output.out), "verdict", "off")):
        return replace_flat(config, verdict=recorded)
    if config.validation.every or config.validation.verdict != "auto":
        return config
    resolved = resolve(config, num_images, num_ranks).config
    run, views = resolved.optimization, 1 + (config.method == "upstep" and config.objective.layout == "symmetric")
    most = int(SHARE * run.num_steps * run.batch_size * views / PASSES)
    reason = None
    if num_images < 4 * SMALLEST:
        reason = f"{num_images} images are too few to hold some out"
    elif num_files is not None and num_files < MIN_FILES:
        reason = f"the images are of {counted(num_files, 'file')} or series, too few to hold one out"
    elif most < MIN_VERDICT_IMAGES:
        reason = f"{run.num_steps} steps of {run.batch_size} images are too short a run to spend 5 % of it on that"
    if reason is not None:
        log.info("verdict: none: %s", reason)
        return replace_flat(config, verdict="off")
    num = min(num_held_out(num_images), most)
    log.info("verdict: %d of %d images held out for it", num, num_images)
    return replace_flat(config, verdict=num)


def _recorded(out: Path, flag: str, default: Any) -> Any:
    """Return a flag of the run in `out`; the default if an earlier version made it, None if there is no run."""
    try:
        return read_config(out).get(flag, default)
    except ConfigError:
        return None


def judge_written(
    config: AdaptConfig,
    compute: Compute,
    held_out: Source | None,
    base: Backbone | None,
    judge: Validator | NoValidator,
    out: Path,
) -> Verdicts:
    """Compare out/adapter with the base model and write out/verdict.json; (None, None) without held-out images.

    Collective. An error of the comparison is only logged, as the run itself is complete. Raises AdapterRefusedError for
    an adapter that is worse on strong evidence, RunFailedError.
    """
    if held_out is None or config.validation.verdict == "off":
        return None, None
    verdicts: Sequence[Verdict | None] = (None, None)
    if distributed.is_first() and base is not None:
        try:
            with track("verdict", len(held_out)) as task:
                verdicts = _compare(config, compute, held_out, base, judge, out, task)
        except (UpstepError, RuntimeError) as error:
            log.warning("verdict: none (%s)", first_line(error))
    rows = distributed.gather([None if v is None else asdict(v) for v in verdicts])[0]
    label_free, measured = (None if row is None else Verdict(**row) for row in rows)
    if label_free is not None and (decided := decisive(label_free, measured)).outcome == "worse":
        _refuse(decided, out)
    return label_free, measured


def _compare(
    config: AdaptConfig,
    compute: Compute,
    held_out: Source,
    base: Backbone,
    judge: Validator | NoValidator,
    out: Path,
    task: Task,
) -> Verdicts:
    if isinstance(judge, NoValidator):
        judge = Validator(config, held_out, base, compute, out)
    adapted = base.copy().vit
    peft_format.attach(adapted, out / "adapter", any_base=True)
    lora.merge(adapted).to(compute.device)
    label_free, measured = label_free_verdict(*judge.features_by(adapted), config.learns_by), None
    if held_out.labels is not None:
        models = (base.copy().vit.to(compute.device), adapted)
        workers = config.data.num_workers
        read, (before, after) = plain_features(held_out, base, models, compute, workers, pooling.features, task)
        groups = held_out.groups()
        files = None if groups is None else groups[read]
        measured = measured_verdict(before, after, [held_out.labels[i] for i in read], files)
    if (decided := decisive(label_free, measured)).outcome == "worse":
        kept = with_base_kept(decided)
        label_free, measured = (kept, measured) if decided is label_free else (label_free, kept)
    with output.writing(out):
        write_atomic(out / FILE, to_json(label_free, measured))
    return label_free, measured


def _refuse(verdict: Verdict, out: Path) -> None:
    with output.writing(out):
        if distributed.is_first() and (out / "adapter").is_dir():
            shutil.rmtree(out / REFUSED, ignore_errors=True)
            (out / "adapter").rename(out / REFUSED)
    raise AdapterRefusedError(
        f"adapter: refused: {verdict.text}; use the base model, as embed and load of {out} do, or try --preset gentle; "
        f"the adapter is in {out / REFUSED}",
        verdict,
    )
