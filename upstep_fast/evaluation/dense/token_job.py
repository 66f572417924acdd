"""Inputs of `embed --tokens`, opened: images, model and whitening; and the tokens computed from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.data.sources.source import Source, open_configured
from upstep_fast.errors import DataError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.dense import token_files
from upstep_fast.evaluation.dense.tokens import append_whitened, grid_of, token_batches
from upstep_fast.evaluation.feature_files import facts as feature_facts
from upstep_fast.evaluation.feature_files.facts import facts_of
from upstep_fast.evaluation.features import agree, load_models, log_time
from upstep_fast.evaluation.whitening import TOKENS_APPENDED, Whitening
from upstep_fast.input_files import read_bytes
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute

log = logging.getLogger("upstep_fast")

FIT_TOKENS = 1 << 16  # that a whitening is fitted to


@dataclass(frozen=True)
class TokenJob:
    """Images, model and whitening of one `embed --tokens` command."""

    source: Source
    model: Backbone
    config: EmbedConfig
    compute: Compute
    fitted: Whitening | None
    identity: Mapping[str, Any]  # of the base model, `whitening.identity_of`
    content: bytes | None  # of the whitening's file

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, D] with all images, readable or not."""
        return len(self.source), *grid_of(self.model), self.model.width * (1 if self.fitted is None else 2)

    @property
    def dtype(self) -> np.dtype:
        """Type of the numbers in the file."""
        return token_files.DTYPES[self.config.dtype]

    @property
    def form(self) -> str:
        """Form of the tokens, in words."""
        kind = "base" if self.config.adapter is None else "adapted"
        return f"{kind} patch tokens, {'plain' if self.fitted is None else 'whitened tokens appended'}, unit length"

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the tokens, as JSON values."""
        fingerprint = feature_facts.fingerprint(self.identity, self.config.adapter, self.content)
        columns = {token_files.TOKENS: self.shape[-1]}
        of_file = facts_of(self.config, self.source, self.form, columns, fingerprint, self.compute.precision)
        patch = list(self.model.vit.patch_embed.patch_size)
        return of_file | {
            "grid": list(self.shape[1:3]),
            "patch": patch,
            "preprocessing": self.identity["preprocessing"],
        }

    @property
    def num_bytes(self) -> int:
        """Size of the file in bytes, without names."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def batches(self, part: Sequence[int], skipped: SkippedImages) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the indices and tokens [B, H, W, D] of the readable images of `part`, as they are written."""
        for indices, tokens in token_batches(self.source, part, self.model, self.config, self.compute, skipped):
            x = tokens if self.fitted is None else append_whitened(tokens, self.fitted)
            yield indices.tolist(), x.numpy().astype(self.dtype)


def prepare(config: EmbedConfig, compute: Compute) -> TokenJob:
    """Open the images, load the model and read or fit the whitening. Raises UpstepError."""
    source = open_configured(config.data)
    log.info("data: %s", source.summary)
    models = load_models(config)
    base, kind = models["base"], "base" if config.adapter is None else "adapted"
    model = models[kind]
    source = measure_intensity(source, channels=len(base.mean), workers=config.data.num_workers)
    agree(source, base, config)
    identity = whitening.identity_of(base, source.reading)
    fingerprints = whitening.fingerprints_of(identity["sha256"], config.adapter)
    log_time(len(source), {kind: model}, compute)
    job = TokenJob(source, model, config, compute, None, identity, None)
    if config.whitening:
        shape = 1, model.width
        of_kind = {kind: fingerprints[kind]}
        fitted = whitening.read(config.whitening, of_kind, identity, shape, TOKENS_APPENDED)[kind]
        content = read_bytes(Path(config.whitening), "whitening", whitening.MAX_BYTES)
    elif config.fit_whitening:
        fitted = _fit(job)
        content = whitening.content({kind: fitted}, {kind: fingerprints[kind]}, identity, TOKENS_APPENDED)
    else:
        if config.adapter is not None and config.form == "auto":
            log.info("form: plain; whitening of a run is for whole images, --fit-whitening fits one to single tokens")
        return job
    return replace(job, fitted=fitted, content=content)


def _fit(job: TokenJob) -> Whitening:
    """Fit a whitening to the single tokens of images spread evenly over the data. Raises UpstepError."""
    per_image, total = job.shape[1] * job.shape[2], len(job.source)
    num = min(total, -(-FIT_TOKENS // per_image))
    sample = [i * total // num for i in range(num)]
    own = distributed.own_part(num)
    skipped = SkippedImages()
    batches = token_batches(
        job.source, sample[own.start : own.stop], job.model, job.config, job.compute, skipped, "embed: whitening"
    )
    rows = [tokens.flatten(0, 2) for _, tokens in batches]
    x = torch.cat(distributed.gather_parts(torch.cat(rows) if rows else torch.empty(0, job.model.width)))
    if not len(x):
        raise DataError(f"data: none of {num} images could be read; the first: {next(iter(skipped.items()))}")
    return whitening.fit(x[:, None])
