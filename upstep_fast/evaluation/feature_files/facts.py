"""Facts of features: which model made them, how, and of images read how; kept with the features, compared by readers.

model         the name of the base model
fingerprint   "model=<hash> input=<hash> adapter=<hash> whitening=<hash>", the last two `none` without one
form          "base", "adapted" or "ensemble", "plain" or "whitened features appended"
columns       {"features": D}, with "base" the base model's plain features too
reading       how the images were read, by flag
version, precision: of the program and of the model's products
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.data.sources.source import Source
from upstep_fast.model import backbone, peft_format
from upstep_fast.model.backbone import Backbone
from upstep_fast.version import __version__

NONE = "none"
_DIGITS = 16  # of each hash


def fingerprint(identity: Mapping[str, Any], adapter: str | None, whitening: bytes | None) -> str:
    """Return the fingerprint of features.

    identity: `model_identity` of the base model; its settings are left out, which differ between versions of timm.
    adapter: its folder. whitening: the content of its file.
    """
    parts = {
        "model": identity["sha256"][:_DIGITS],
        "input": _hash(json.dumps(identity["preprocessing"], sort_keys=True).encode()),
        "adapter": adapter_hash(adapter),
        "whitening": whitening_hash(whitening),
    }
    return " ".join(f"{name}={value}" for name, value in parts.items())


def adapter_hash(folder: str | None) -> str:
    """Return the hash of an adapter in a fingerprint."""
    return NONE if folder is None else peft_format.fingerprint(folder)[:_DIGITS]


def whitening_hash(content: bytes | None) -> str:
    """Return the hash of a whitening file in a fingerprint."""
    return NONE if content is None else _hash(content)


def parts_of(text: object) -> dict[str, str]:
    """Return the hashes of a fingerprint by name; {} for what is none."""
    words = text.split(" ") if isinstance(text, str) else []
    return dict(word.split("=", 1) for word in words if "=" in word)


def facts_of(
    config: EmbedConfig, source: Source, form: str, columns: Mapping[str, int], print_: str, precision: str
) -> dict[str, Any]:
    """Return the facts of features, as JSON values. print_: their `fingerprint`."""
    return {
        "model": config.model.name,
        "fingerprint": print_,
        "form": form,
        "columns": dict(columns),
        "reading": source.reading.described(),
        "version": __version__,
        "precision": precision,
    }


def facts_in_memory(model: Backbone, adapter: str | None, is_whitened: bool) -> dict[str, Any]:
    """Return the facts that a loaded model has of its features; of merged weights no hash."""
    weights = f"model={backbone.fingerprint(model.vit)[:_DIGITS]} " if adapter is None else ""
    kind, form = "base" if adapter is None else "adapted", "whitened features appended" if is_whitened else "plain"
    return {
        "model": model.name,
        "fingerprint": f"{weights}adapter={adapter_hash(adapter)}",
        "form": f"{kind}, {form}",
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
