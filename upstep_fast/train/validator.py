"""Judges a run on unlabelled images that it does not train on: keeps the best adapter, stops early, refuses the worse.

Every --judge-every steps the scores of judgement.py are taken of the adapted model and of the base model, on the same
two views of the same held-out images, and `predicted_gain` makes one number of them. The adapter with the largest one
so far lies in OUT/best, every look in OUT/judgement.jsonl.

    the end    the best adapter becomes OUT/adapter; with --strength auto at the strength whose prediction is largest,
               with --strength-first auto in a line over the blocks
    a warning  if it is predicted to be no better than the base model, weak evidence (bench/results/quality.md)
    refusal    if every look is clearly worse, OUT/adapter becomes OUT/adapter-refused and the run ends with exit code 4
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.keyed_random import uniform
from upstep_fast.data.loading.loader import Loader
from upstep_fast.data.sources.source import Source
from upstep_fast.data.sources.subset import subset
from upstep_fast.data.views.view_config import view_config
from upstep_fast.data.views.views import random_views
from upstep_fast.errors import CheckFailedError, DataError
from upstep_fast.evaluation.label_free import CLEARLY_WORSE, judge, predicted_gain
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora, peft_format, pooling
from upstep_fast.runtime import distributed
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.device import Compute
from upstep_fast.train.state import RunState

log = logging.getLogger("upstep_fast")

LOOKS, BEST, REFUSED = "judgement.jsonl", "best", "adapter-refused"
LARGEST, SMALLEST, SHARE = 256, 16, 0.1  # held-out images: a tenth of the data, within these
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_VIEWS_SEED = 0x5EED  # of the held-out views, which are the same in every run


def hold_out(source: Source, config: AdaptConfig) -> tuple[Source, Source | None]:
    """What is trained on, and what is judged on; the second is None without --judge-every. Raises DataError."""
    if not config.validation.every:
        return source, None
    order = sorted(range(len(source)), key=lambda index: uniform(config.runtime.seed, _VIEWS_SEED, index))
    num = min(LARGEST, max(SMALLEST, round(SHARE * len(source))))
    if len(source) < 4 * SMALLEST:
        raise DataError(
            f"data: {len(source)} images are too few to hold some out; give at least {4 * SMALLEST}, "
            "or leave out --judge-every"
        )
    held_out, rest = sorted(order[:num]), sorted(order[num:])
    return subset(source, rest), subset(source, held_out)


class Validator:
    """Looks at a run now and then. Every rank looks, the first one writes."""

    def __init__(self, config: AdaptConfig, held_out: Source, compute: Compute, out: Path):
        self._config, self._compute, self._out = config, compute, out
        base = backbones.load_from(config.model)
        self._views = _views(held_out, base, config, compute)
        self._base = self._features(base.vit.to(compute.device))
        self._depth = len(base.vit.blocks)
        self.history: dict[int, dict[str, Any]] = _read(out / LOOKS) if config.output.resume else {}

    def is_due(self, step: int) -> bool:
        """Whether to look after so many steps."""
        assert self._config.optimization.steps is not None
        return step % self._config.validation.every == 0 or step == self._config.optimization.steps

    def validate(self, state: RunState) -> None:
        """Judges the model as it is after `state.step` steps. Raises OSError."""
        # rank 0's: the others may be off by a rounding, and all must stop together
        with state.method.weights_to_save() as vit:
            scores = distributed.gather(judge(self._base, self._features(vit)))[0]
        row = {"step": state.step, "predicted_gain": predicted_gain(scores), **scores}
        before = self.best()
        self.history[state.step] = row
        log.info("judge: step %d: predicted gain %+.2f on held-out images", state.step, row["predicted_gain"])
        if not distributed.is_first():
            return
        if before is None or row["predicted_gain"] > before["predicted_gain"] or row["step"] == before["step"]:
            peft_format.write_files(self._out / BEST, state.method.result_files())
        rows = [self.history[step] for step in sorted(self.history)]
        write_atomic(self._out / LOOKS, "".join(json.dumps(r) + "\n" for r in rows).encode())

    def best(self) -> dict[str, Any] | None:
        """The look with the largest prediction, the earliest of equals."""
        return max(self.history.values(), key=lambda row: (row["predicted_gain"], -row["step"]), default=None)

    def should_stop(self, step: int) -> bool:
        """Whether the last --judge-patience looks up to `step` brought nothing better."""
        best, seen = self.best(), [s for s in self.history if s <= step]
        if best is None or not self._config.validation.patience:
            return False
        return sum(s > best["step"] for s in seen) >= self._config.validation.patience

    def settle(self) -> None:
        """Put the best adapter in its place. Raises CheckFailedError if all are clearly worse than the base model."""
        best, adapter = self.best(), self._out / "adapter"
        if best is None:
            return
        if best["predicted_gain"] < CLEARLY_WORSE:
            refused = self._out / REFUSED
            if distributed.is_first():
                shutil.rmtree(refused, ignore_errors=True)
                adapter.rename(refused)  # written just before, by rank 0 itself
                shutil.rmtree(self._out / BEST, ignore_errors=True)
            raise CheckFailedError(
                "adapter: refused: on held-out images, without labels, every look is clearly worse than the base model "
                f"(the best, at step {best['step']}: {best['predicted_gain']:+.2f}); use the base model, or try "
                f"--preset gentle; the last adapter is in {refused}, the looks in {self._out / LOOKS}"
            )
        if best["predicted_gain"] <= 0:
            log.warning(
                "judge: predicted gain %+.2f: perhaps no better than the base model; compare with `upstep-fast eval`",
                best["predicted_gain"],
            )
        if distributed.is_first():
            peft_format.write_files(adapter, {path.name: path.read_bytes() for path in (self._out / BEST).iterdir()})
        if "auto" in (self._config.validation.strength, self._config.experimental.strength_first):
            first, last = self._strongest(self._out / BEST)
            log.info(
                "judge: strength %g in the first block, %g in the last has the largest predicted gain", first, last
            )
            if distributed.is_first():
                peft_format.scale_saved(adapter, peft_format.strength_by_depth(first, last, self._depth))
        log.info("judge: the adapter is that of step %d", best["step"])

    def _strongest(self, folder: Path) -> tuple[float, float]:
        """The best strengths of the first and the last block: one for all blocks, then another for the first."""
        strength, first = self._config.validation.strength, self._config.experimental.strength_first

        def gain(first: float, last: float) -> float:
            vit = backbones.load_from(self._config.model).vit
            of = peft_format.strength_by_depth(first, last, self._depth)
            for name, adapter in peft_format.attach(vit, folder).items():
                adapter.scale *= of(name)
            return predicted_gain(judge(self._base, self._features(lora.merge(vit).to(self._compute.device))))

        distributed.gather(None)  # the others read what rank 0 has written
        lasts = STRENGTHS if strength == "auto" else [float(strength)]
        if isinstance(first, (float, int)):
            return first, max(lasts, key=lambda last: gain(first, last))
        last = max(lasts, key=lambda last: gain(last, last))
        if first is None:
            return last, last
        return max(sorted({0.0, *STRENGTHS, last}), key=lambda first: gain(first, last)), last

    @torch.no_grad()
    def _features(self, vit: nn.Module) -> Tensor:
        with self._compute.autocast():
            parts = [pooling.features(vit, x).float() for x in self._views.flatten(0, 1).split(128)]
        return torch.cat(parts).cpu().view(*self._views.shape[:2], -1)


def _views(held_out: Source, base: backbones.Backbone, config: AdaptConfig, compute: Compute) -> Tensor:
    with Loader(
        held_out,
        batch_size=len(held_out),
        seed=_VIEWS_SEED,
        channels=len(base.mean),
        max_bad_fraction=max(config.data.max_bad_fraction, 0.5),  # training says how much may be bad
    ) as loader:
        batch = next(loader)
    # the default views whatever the run trains on, so that runs can be compared
    plain = view_config(config.views.preset, size=base.img_size, mean=base.mean, std=base.std)
    return random_views(
        batch.images, plain, seed=_VIEWS_SEED, epoch=0, indices=batch.indices, views=2, device=compute.device
    )


def _read(path: Path) -> dict[int, dict[str, Any]]:
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["step"]: row for row in rows}
