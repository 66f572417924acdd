"""Whitened features beside the features as they are: nearer neighbours on a new domain, without labels or training.

    x = f / |f|,  p = g / |g|                       unit: the features, D numbers, and the mean of the patch tokens
    m = mean x,  C = mean (x - m)(x - m)^T          of N unlabelled images of the domain; of p likewise
    S = (1 - rho) C + rho tr(C)/D I                 rho by OAS: the fewer images, the nearer to 1
    w(x) = S^(-1/2) (x - m), made a unit vector     every direction of the domain counts alike
    phi = [x / sqrt(2), w(x) / 2, w(p) / 2]         3 D numbers of unit length

A product phi . phi is half the cosine of the features as they are, half the mean of the whitened ones. Where the
features are the mean patch token already, phi = [x, w(x)] / sqrt(2).

A pretrained model's few strong directions tell its own classes apart; on another domain the weak ones do as much.
Whitened features alone lose on the model's own domain, beside the others they hardly do:
bench/results/quality_five_sets.md.
Whitening for retrieval: Jegou and Chum 2012; OAS: Chen et al. 2010, eq. 23 (as scikit-learn has it). Their place side
by side is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upstep_fast.errors import ConfigError
from upstep_fast.runtime.atomic_file import write_atomic

log = logging.getLogger("upstep_fast")

ALIKE = 1e-10  # spread of unit vectors, tr(C), below which only rounding tells them apart


@dataclass(frozen=True)
class Whitening:
    """What `fit` found of one model's features and, P = 2, its mean patch tokens."""

    mean: Tensor  # [P, D] fp32
    matrix: Tensor  # [P, D, D] fp32, S^(-1/2), symmetric


def fit(x: Tensor) -> Whitening:
    """Of unit vectors x [N, P, D]. Where all are alike, a warning says so, and the matrix is 0."""
    found = [_fit(part) for part in x.unbind(1)]
    return Whitening(*(torch.stack(tensors).float() for tensors in zip(*found, strict=True)))


def _fit(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.double().mean(0)
    x = x.double() - mean
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x / len(x))
    eigenvalues = eigenvalues.clamp_min(0)
    if eigenvalues.sum() < ALIKE:
        log.warning("whitening: the features of all %d images are alike; nothing is whitened", len(x))
        return mean, torch.zeros_like(vectors)
    rho = shrinkage(eigenvalues, len(x))
    return mean, (vectors * ((1 - rho) * eigenvalues + rho * eigenvalues.mean()).rsqrt()) @ vectors.T


def shrinkage(eigenvalues: Tensor, num: int) -> float:
    """Rho of the oracle approximating shrinkage, 0 to 1, from the eigenvalues [D] of a covariance of `num` images."""
    squares, square = eigenvalues.square().mean() / len(eigenvalues), eigenvalues.mean().square()
    denominator = (num + 1) * (squares - square / len(eigenvalues))
    return min(1.0, float((squares + square) / denominator)) if denominator > 0 else 1.0


def append_whitened(x: Tensor, by: Whitening) -> Tensor:
    """phi: unit vectors [N, P, D], the features first -> [N, (1 + P) D], of unit length unless nothing is whitened."""
    return torch.cat([x[:, 0], whitened(x, by).flatten(1) / x.shape[1] ** 0.5], -1) / 2**0.5


def whitened(x: Tensor, by: Whitening) -> Tensor:
    """w: unit vectors [N, P, D] -> [N, P, D], each of unit length, or 0 where nothing is whitened."""
    return F.normalize(torch.einsum("npd,pde->npe", x - by.mean, by.matrix), dim=-1)


def write(path: str | Path, fitted: Mapping[str, Whitening], fingerprints: Mapping[str, str]) -> None:
    """Write whitenings and their models' fingerprints, by name ("base", "adapted"), as safetensors; or ConfigError."""
    tensors = {f"{name}.{part}": x.contiguous() for name, by in fitted.items() for part, x in vars(by).items()}
    try:
        write_atomic(Path(path), save(tensors, metadata=dict(fingerprints)))
    except OSError as error:
        raise ConfigError(f"fit_whitening: cannot write {path}: {error.strerror}") from error


def read(path: str | Path, fingerprints: Mapping[str, str]) -> dict[str, Whitening]:
    """What `write` wrote for these models. Raises ConfigError for a file that is none, or is of other models."""
    try:
        with safe_open(path, "pt") as file:
            written = file.metadata() or {}
            for name, fingerprint in fingerprints.items():
                if written.get(name) != fingerprint:
                    raise ConfigError(
                        f"whitening: {path} was not fitted to this {name} model; fit one with --fit-whitening"
                    )
            return {
                name: Whitening(file.get_tensor(f"{name}.mean"), file.get_tensor(f"{name}.matrix"))
                for name in fingerprints
            }
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"whitening: {path} cannot be read ({str(error).splitlines()[0]}); give a file of --fit-whitening"
        ) from error
