"""Inputs of the embed command, opened: images, models and whitening; and the features computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import RunFailedError
from upstep_fast.evaluation.feature_files.facts import facts_of
from upstep_fast.evaluation.feature_files.parquet import BASE, FEATURES
from upstep_fast.evaluation.features import append_whitened, unwhitened
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model import pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime.device import Compute


@dataclass(frozen=True)
class FeatureJob:
    """Images, models and whitening of one embed command."""

    config: EmbedConfig
    source: Source
    models: dict[str, Backbone]
    compute: Compute
    fitted: Mapping[str, Whitening]  # by model; {}: none
    identity: Mapping[str, Any]  # of the base model, `whitening.identity_of`
    fingerprint: str

    @property
    def kind(self) -> str:
        """Model whose features are written: "base", "adapted" or "ensemble"."""
        return "ensemble" if self.config.ensemble else "adapted" if self.config.adapter else "base"

    @property
    def kinds(self) -> list[str]:
        """Names of the models that are run: both only if both give features or are to be whitened."""
        both = self.config.ensemble or self.config.with_base or self.config.fit_whitening
        return list(self.models) if both else [self.kind]

    @property
    def form(self) -> str:
        """Form of the features, in words."""
        return f"{self.kind}, {'whitened features appended' if self.fitted else 'plain'}"

    @property
    def columns(self) -> dict[str, int]:
        """Width of the features by column."""
        base = self.models["base"]
        parts = 1 + pooling.num_parts(base.vit) if self.fitted else 1
        width = base.width * parts * (2 if self.config.ensemble else 1)
        return {FEATURES: width} | ({BASE: base.width} if self.config.with_base else {})

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the features."""
        return facts_of(self.config, self.source, self.form, self.columns, self.fingerprint, self.compute.precision)

    def features(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the features by column, [N, D] fp32. x: unit features [N, P, D] by model. Raises RunFailedError."""
        fitted = {kind: self.fitted[kind] for kind in self.kinds} if self.fitted else {}
        by_model = append_whitened(x, fitted) if fitted else unwhitened(x)
        columns = {FEATURES: by_model[self.kind]}
        if self.config.with_base:
            columns[BASE] = x["base"][:, 0].clone()  # safetensors takes no two names for one memory
        for name, rows in columns.items():
            norms = torch.linalg.vector_norm(rows, dim=1)
            if bad := int((~norms.isfinite() | (norms == 0)).sum()):
                raise RunFailedError(
                    f"model: {bad} of {len(rows)} rows of {name} are not finite or are 0; check its weights"
                )
        return columns
