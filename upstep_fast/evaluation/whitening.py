"""Whitened features, appended to the unwhitened ones: better neighbors on a new domain, without labels or training.

    x = f / |f|,  p = g / |g|                       unit vectors: the features, [D], and the mean patch token, [D]
    m = mean x,  C = mean (x - m)(x - m)^T          over N unlabeled images of the domain; for p as for x
    S = (1 - rho) C + rho tr(C)/D I                 rho by OAS: the fewer images, the nearer to 1
    w(x) = S^(-1/2) (x - m), made a unit vector     every direction of the domain has equal weight
    phi = [x / sqrt(2), w(x) / 2, w(p) / 2]         [3 D], unit length

A product phi . phi is half the cosine of the unwhitened features plus half the mean cosine of the whitened ones. If
the features are the mean patch token already, phi = [x, w(x)] / sqrt(2).

The top principal directions separate the pretraining classes; on a new domain the small ones are as informative.
Whitened features alone lose accuracy on the model's own domain, appended they hardly do:
bench/results/quality_five_sets.md.
Whitening for retrieval: Jegou and Chum 2012; OAS: Chen et al. 2010, eq. 23 (as in scikit-learn). Appending the
whitened features is ours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upstep_fast.config.reading import Reading
from upstep_fast.errors import ConfigError, first_line
from upstep_fast.input_files import require_regular
from upstep_fast.model import peft_format
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.identity import differences, model_identity

log = logging.getLogger("upstep_fast")

FILE = "whitening.safetensors"  # in the folder of a run
IDENTITY, FORM = "model_identity", "form"  # in the metadata of the file; the first is JSON
READING = "reading"  # in the identity: how the images were read, by flag
APPENDED = "[x / sqrt(2), w(x) / 2, w(p) / 2]"  # phi, or its equal without p
TOKENS_APPENDED = "[t / sqrt(2), w(t) / sqrt(2)]"  # of single patch tokens (dense/tokens.py)
MAX_BYTES = 1 << 32  # of a file
MIN_SPREAD = 1e-10  # of unit vectors, tr(C): below it they differ only by rounding


class OtherModelError(ConfigError):
    """A whitening was fitted to another model than it is to be used with."""


@dataclass(frozen=True)
class Whitening:
    """The whitening of one model's features and, P = 2, its mean patch tokens."""

    mean: Tensor  # [P, D] fp32
    matrix: Tensor  # [P, D, D] fp32, S^(-1/2), symmetric


def fit(x: Tensor) -> Whitening:
    """Fit a whitening to unit vectors x [N, P, D]. If all are equal, the matrix is 0 and a warning is logged."""
    parts = [_fit(part) for part in x.unbind(1)]
    return Whitening(*(torch.stack(tensors).float() for tensors in zip(*parts, strict=True)))


def _fit(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.double().mean(0)
    x = x.double() - mean
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x / len(x))
    eigenvalues = eigenvalues.clamp_min(0)
    if eigenvalues.sum() < MIN_SPREAD:
        log.warning("whitening: the features of all %d images are equal; nothing is whitened", len(x))
        return mean, torch.zeros_like(vectors)
    rho = shrinkage(eigenvalues, len(x))
    return mean, (vectors * ((1 - rho) * eigenvalues + rho * eigenvalues.mean()).rsqrt()) @ vectors.T


def shrinkage(eigenvalues: Tensor, num: int) -> float:
    """Return rho of oracle approximating shrinkage, 0 to 1. eigenvalues: [D], of the covariance of `num` images."""
    squares, square = eigenvalues.square().mean() / len(eigenvalues), eigenvalues.mean().square()
    denominator = (num + 1) * (squares - square / len(eigenvalues))
    return min(1.0, float((squares + square) / denominator)) if denominator > 0 else 1.0


def append_whitened(x: Tensor, fitted: Whitening) -> Tensor:
    """Return phi: unit vectors [N, P, D], features first -> [N, (1 + P) D], of unit length unless the matrix is 0."""
    return torch.cat([x[:, 0], whitened(x, fitted).flatten(1) / x.shape[1] ** 0.5], -1) / 2**0.5


def whitened(x: Tensor, fitted: Whitening) -> Tensor:
    """Return w: unit vectors [N, P, D] -> unit vectors [N, P, D], or 0 if the matrix is 0."""
    return F.normalize(torch.einsum("npd,pde->npe", x - fitted.mean, fitted.matrix), dim=-1)


def identity_of(base: Backbone, reading: Reading) -> dict[str, Any]:
    """Return what a whitening belongs to: the base model without adapters, and how its images are read, as JSON."""
    return model_identity(base) | {READING: reading.described()}


def fingerprints_of(base: str, adapter: str | Path | None) -> dict[str, str]:
    """Return {"base": ..., "adapted": ...}; the second is of base model and adapter files, not of merged weights."""
    return {"base": base} | ({} if adapter is None else {"adapted": f"{base} {peft_format.fingerprint(adapter)}"})


def content(
    fitted: Mapping[str, Whitening],
    fingerprints: Mapping[str, str],
    identity: Mapping[str, Any] | None = None,
    form: str = APPENDED,
) -> bytes:
    """Return the file of whitenings and model fingerprints, by name ("base", "adapted"), as safetensors.

    identity: of the base model (`identity_of`), whose settings and preprocessing the fingerprints do not cover. form:
    of the features that the whitening makes, `APPENDED` or `TOKENS_APPENDED`.
    """
    tensors = {f"{name}.{part}": x.contiguous() for name, one in fitted.items() for part, x in vars(one).items()}
    metadata = {**fingerprints, IDENTITY: json.dumps(identity or {}), FORM: form}
    return save(tensors, metadata=metadata)


def read(
    path: str | Path,
    fingerprints: Mapping[str, str],
    identity: Mapping[str, Any] | None = None,
    shape: tuple[int, int] | None = None,
    form: str = APPENDED,
) -> dict[str, Whitening]:
    """Read the whitenings of these models.

    identity: of the base model; files of earlier versions have none. shape: (P, D) of the features; None: as in the
    file. form: as for `content`. Raises OtherModelError if the file was fitted to other models, ConfigError if it is
    damaged, of another form, or holds no whitening of that shape.
    """
    require_regular(Path(path), "whitening")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check_form(metadata.get(FORM, APPENDED), form, str(path))  # earlier versions wrote none
            _check_origin(metadata, fingerprints, identity or {}, str(path))
            for name in fingerprints:
                _check_shape(file, name, shape, str(path))
            fitted = {
                name: Whitening(file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.matrix"))
                for name in fingerprints
            }
    except (OSError, SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(
            f"whitening: {path} cannot be read ({first_line(error)}); give a file of --fit-whitening"
        ) from error
    for name, one in fitted.items():
        if reason := _unusable(one):
            raise ConfigError(f"whitening: {path}: {name} {reason}; fit one with --fit-whitening")
    return fitted


def _check_form(found: str, expected: str, path: str) -> None:
    if found == expected:
        return
    kinds = {APPENDED: "features of images", TOKENS_APPENDED: "single patch tokens (embed --tokens)"}
    if found not in kinds:
        raise ConfigError(f"whitening: {path} is for features of the form {found[:100]}; update upstep-fast")
    raise ConfigError(
        f"whitening: {path} is for {kinds[found]}, not for {kinds[expected]}; fit one with --fit-whitening"
    )


def _check_origin(
    metadata: Mapping[str, str], fingerprints: Mapping[str, str], identity: Mapping[str, Any], path: str
) -> None:
    for name, fingerprint in fingerprints.items():
        if metadata.get(name) != fingerprint:
            raise OtherModelError(
                f"whitening: {path} was not fitted to this {name} model; fit one with --fit-whitening"
            )
    recorded = json.loads(metadata.get(IDENTITY, "{}"))  # earlier versions wrote none
    then = recorded if isinstance(recorded, dict) else {}
    if different := differences(then, identity):
        raise OtherModelError(
            f"whitening: {path} was fitted to another model, of the same weights: {'; '.join(different[:5])}; "
            "fit one with --fit-whitening"
        )
    _check_reading(then.get(READING), identity.get(READING), path)


def _check_reading(then: object, now: object, path: str) -> None:
    """Raise OtherModelError if a flag is in both readings with two values; files of earlier versions tell none."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return
    names = [name for name in now if then.get(name, now[name]) != now[name]]
    if names:
        different = "; ".join(f"--{name} was {str(then[name])[:100]}, is {now[name]}" for name in names)
        raise OtherModelError(
            f"whitening: {path} was fitted to images that were read otherwise: {different}; read them alike, or fit "
            "one with --fit-whitening"
        )


def _check_shape(file: Any, name: str, shape: tuple[int, int] | None, path: str) -> None:
    mean, matrix = (file.get_slice(f"{name}.{part}") for part in ("mean", "matrix"))
    found = [list(part.get_shape()) for part in (mean, matrix)]
    parts, width = shape or (*found[0], 0, 0)[:2]
    expected = [[parts, width], [parts, width, width]]
    if found != expected or {mean.get_dtype(), matrix.get_dtype()} != {"F32"}:
        raise ConfigError(
            f"whitening: {path}: {name} has mean {found[0]} and matrix {found[1]}, this model needs {expected[0]} and "
            f"{expected[1]} in fp32; fit one with --fit-whitening"
        )


def _unusable(fitted: Whitening) -> str | None:
    """Return why a file's whitening cannot be one that `fit` made, or None."""
    if not (fitted.mean.isfinite().all() and fitted.matrix.isfinite().all()):
        return "has values that are not finite"
    if fitted.mean.norm(dim=-1).max() > 1.001:  # of unit vectors
        return "has a mean that is longer than a unit vector"
    if (fitted.matrix - fitted.matrix.mT).abs().max() > 1e-4 * fitted.matrix.abs().max():
        return "has a matrix that is not symmetric"
    return None
