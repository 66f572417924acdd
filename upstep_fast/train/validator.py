"""Validation without labels on held-out images: keeps the best adapter, stops early, refuses one that is clearly worse.

Every --judge-every steps the adapted model is scored against the base model on the same two views of each held-out
image (evaluation/label_free.py); `predicted_gain` sums the scores up in one number. The adapter with the largest
predicted gain so far is in OUT/best, the history of all validations in OUT/judgement.jsonl.

    at the end  the best adapter becomes OUT/adapter, at the strength with the largest predicted gain if --strength or
                --strength-first is auto (strength.py)
    a warning   if the best predicted gain is not above 0, weak evidence (bench/results/quality.md)
    a refusal   if every validation is clearly worse: OUT/adapter becomes OUT/adapter-refused, exit code 4
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.adapter_folder import REFUSED
from upstep_fast.data.keyed_random import uniform
from upstep_fast.data.loading.loader import Loader
from upstep_fast.data.sources.source import Source
from upstep_fast.data.sources.subset import split_by_file, subset
from upstep_fast.data.views.make_views import random_views
from upstep_fast.data.views.view_config import view_config
from upstep_fast.errors import AdapterRefusedError, DataError, RunFailedError, first_line
from upstep_fast.evaluation.label_free import CLEARLY_WORSE, judge, predicted_gain
from upstep_fast.evaluation.verdict import FILE, Verdict, label_free_verdict, to_json, with_base_kept
from upstep_fast.input_files import read_text
from upstep_fast.model import lora, peft_format, pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute
from upstep_fast.train.state import RunState
from upstep_fast.train.strength import Gain

log = logging.getLogger("upstep_fast")

HISTORY, BEST = "judgement.jsonl", "best"
LARGEST, SMALLEST, SHARE = 256, 16, 0.1  # number of held-out images: SHARE of all, within these
_VIEWS_SEED = 0x5EED  # of the held-out views; the same in every run


def hold_out(source: Source, config: AdaptConfig) -> tuple[Source, Source | None]:
    """Split the images into training and held-out ones; (source, None) without --judge-every and without a verdict.

    config: after `verdict.with_held_out`. Raises DataError.
    """
    given = config.validation.verdict
    if not config.validation.every and not isinstance(given, int):
        return source, None
    order = sorted(range(len(source)), key=lambda index: uniform(config.runtime.seed, _VIEWS_SEED, index))
    num = given if isinstance(given, int) else num_held_out(len(source))
    if 2 * num > len(source) and not config.validation.every:
        raise DataError(
            f"verdict: {num} images cannot be held out of {len(source)}; give at most half of them, or --verdict off"
        )
    if len(source) < 4 * SMALLEST:
        raise DataError(
            f"data: {len(source)} images are too few to hold some out; give at least {4 * SMALLEST}, "
            "or leave out --judge-every"
        )
    held_out, rest = split_by_file(order, source.groups(), num)
    if not held_out:
        raise DataError(
            "data: no file can be held out, each holds more than half of the images; give more files, or --verdict off"
        )
    return subset(source, sorted(rest)), subset(source, sorted(held_out))


def num_held_out(num_images: int) -> int:
    """Return the number of images to hold out of `num_images`."""
    return min(LARGEST, max(SMALLEST, round(SHARE * num_images)))


class NoValidator:
    """Stand-in for `Validator` without --judge-every: nothing is held out and no step ends the run."""

    gain = None

    def after_step(self, state: RunState) -> None:
        """Do nothing."""

    def should_stop(self, step: int) -> bool:
        """Return False."""
        return False

    def settle(self, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return `files`."""
        return files


class Validator:
    """Validation of a running adaptation on held-out images. Every rank computes, rank 0 writes.

    base: the base model without adapters; it is copied and stays as it is. step: of the checkpoint that the run
    continues; 0: a history in `out` is of another attempt. Raises RunFailedError if it is damaged.
    """

    def __init__(
        self, config: AdaptConfig, held_out: Source, base: Backbone, compute: Compute, out: Path, step: int = 0
    ):
        self._config, self._compute, self._out, self._base = config, compute, out, base
        self._views = _held_out_views(held_out, base, config, compute)
        self._base_features = self._features(base.copy().vit.to(compute.device))
        self._verdict: Verdict | None = None
        self.history: dict[int, dict[str, Any]] = _read(out / HISTORY) if step else {}

    def after_step(self, state: RunState) -> None:
        """Validate if it is due. Raises RunFailedError if the disk refuses."""
        if self.is_due(state.step):
            with output.writing(self._out):
                self.validate(state)

    def is_due(self, step: int) -> bool:
        """Return whether to validate after `step` steps."""
        return step % self._config.validation.every == 0 or step == self._config.optimization.num_steps

    def validate(self, state: RunState) -> None:
        """Score the model after `state.step` steps; write the history and, if it is the best, OUT/best.

        Raises OSError.
        """
        # rank 0's scores: those of other ranks may differ by a rounding, and all ranks must stop together
        with state.method.weights_to_save() as vit:
            features = self._features(vit)
        if not features.isfinite().all():
            before = f"; the best adapter before is in {self._out / BEST}" if self.history else ""
            raise RunFailedError(
                f"judge: step {state.step}: features of the adapted model are not finite, the run has diverged; lower "
                f"--lr{before}"
            )
        self._verdict = label_free_verdict(self._base_features, features, self._config.learns_by)  # newest
        scores = distributed.gather(judge(self._base_features, features))[0]
        row = {"step": state.step, "predicted_gain": predicted_gain(scores), **scores}
        best = self.best()
        self.history[state.step] = row
        log.info("judge: step %d: predicted gain %s on held-out images", state.step, _points(row["predicted_gain"]))
        if not distributed.is_first():
            return
        if best is None or row["predicted_gain"] > best["predicted_gain"] or row["step"] == best["step"]:
            peft_format.write_files(self._out / BEST, state.method.result_files())
        rows = [self.history[step] for step in sorted(self.history)]
        write_atomic(self._out / HISTORY, "".join(json.dumps(r) + "\n" for r in rows).encode())

    def best(self) -> dict[str, Any] | None:
        """Return the validation with the largest predicted gain, the earliest of equals; None before the first."""
        return max(self.history.values(), key=lambda row: (row["predicted_gain"], -row["step"]), default=None)

    def should_stop(self, step: int) -> bool:
        """Return whether the last --judge-patience validations up to `step` were no better than the best."""
        best, seen = self.best(), [s for s in self.history if s <= step]
        if best is None or not self._config.validation.patience:
            return False
        return sum(s > best["step"] for s in seen) >= self._config.validation.patience

    def settle(self, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return the files of the best adapter, at full strength; `files`, the last one's, without a validation.

        Raises AdapterRefusedError if every validation is clearly worse than the base model.
        """
        best = self.best()
        if best is None:
            return files
        if best["predicted_gain"] < CLEARLY_WORSE:
            self._refuse(best, files)
        if best["predicted_gain"] <= 0:
            log.warning(
                "judge: predicted gain %s: perhaps no better than the base model; compare with `upstep-fast eval`, "
                "or keep the base model",
                _points(best["predicted_gain"]),
            )
        log.info("judge: the adapter is that of step %d", best["step"])
        return (
            {path.name: path.read_bytes() for path in (self._out / BEST).iterdir()} if distributed.is_first() else files
        )

    def _refuse(self, best: dict[str, Any], files: Mapping[str, bytes]) -> NoReturn:
        refused = self._out / REFUSED
        if distributed.is_first():
            for folder in (refused, self._out / "adapter", self._out / BEST):
                shutil.rmtree(folder, ignore_errors=True)
            peft_format.write_files(refused, files)
            if self._verdict is not None:
                write_atomic(self._out / FILE, to_json(with_base_kept(self._verdict), None))
        raise AdapterRefusedError(
            "adapter: refused: on held-out images, without labels, every validation is clearly worse than the base "
            f"model (the best, at step {best['step']}: {_points(best['predicted_gain'])}); base kept: use the base "
            f"model, or try --preset gentle; the last adapter is in {refused}, validations in {self._out / HISTORY}",
            self._verdict,
        )

    @property
    def gain(self) -> Gain | None:
        """Predicted gain of the best adapter at strengths (first block, last block); None without a best one."""
        return None if self.best() is None else self._gain

    def _gain(self, first: float, last: float) -> float:
        vit = self._base.copy().vit
        strength = peft_format.strength_by_depth(first, last, len(vit.blocks))
        for name, adapter in peft_format.attach(vit, self._out / BEST, any_base=True).items():
            adapter.scale *= strength(name)
        return predicted_gain(judge(self._base_features, self._features(lora.merge(vit).to(self._compute.device))))

    def features_by(self, vit: nn.Module) -> tuple[Tensor, Tensor]:
        """Return features of the held-out images' views by the base model and by `vit`, [2, N, D] each."""
        return self._base_features, self._features(vit)

    @torch.no_grad()
    def _features(self, vit: nn.Module) -> Tensor:
        with self._compute.autocast():
            parts = [pooling.features(vit, x).float() for x in self._views.flatten(0, 1).split(128)]
        return torch.cat(parts).cpu().view(*self._views.shape[:2], -1)


def _held_out_views(held_out: Source, base: Backbone, config: AdaptConfig, compute: Compute) -> Tensor:
    # the default views whatever the run trains on, so that runs can be compared
    plain = view_config(config.views.preset, size=base.img_size, mean=base.mean, std=base.std)
    with Loader(
        held_out,
        batch_size=len(held_out),
        min_side=plain.min_side,
        seed=_VIEWS_SEED,
        channels=len(base.mean),
        max_bad_fraction=max(config.data.max_bad_fraction, 0.5),  # the limit holds for the training images
    ) as loader:
        batch = next(loader)
    return random_views(
        batch.images, plain, seed=_VIEWS_SEED, epoch=0, indices=batch.indices, views=2, device=compute.device
    )


def _points(gain: float) -> str:
    return f"{round(gain, 2) + 0.0:+.2f} points"  # + 0.0: never -0.00


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Return the validations by step. Raises ConfigError for a file that cannot be, RunFailedError for a line."""
    if not path.is_file():
        return {}
    history = {}
    for number, line in enumerate(read_text(path, "resume").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not math.isfinite(row["predicted_gain"]):
                raise ValueError(f"predicted_gain is {row['predicted_gain']}")
            history[int(row["step"])] = row
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise RunFailedError(
                f"resume: {path}, line {number}, is no validation ({first_line(error)}); delete the file to continue "
                "with the validations to come"
            ) from error
    return history
