"""A dense check: are patches of a hand told from patches of what is behind it, before and after adaptation?

Hands are cut out of the hand-sign photographs (skin is redder than the wall behind: Otsu's threshold on red - blue) and
pasted on photographs of the model's own domain; a patch is "hand" where most of its pixels are. Patch tokens of the
bank vote on patch tokens of the queries (k-NN by cosine); the figure is the mean intersection over union of hand and
background, in percent. The masks are ours, made without a human eye on each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.sources.source import open_source
from upstep_fast.evaluation.dense.segmentation import counts_of, knn_votes, miou_of, patch_labels
from upstep_fast.model import pooling
from upstep_fast.model.backbone import Backbone

NUM_BANK, NUM_QUERIES, NEIGHBORS = 128, 64, 20


@dataclass(frozen=True)
class Composites:
    """Hands on other backgrounds, and where they are."""

    images: Tensor  # [N, 3, H, W] fp32 in 0..1
    masks: Tensor  # [N, H, W] bool, True on the hand


def otsu(values: np.ndarray) -> float:
    """Return the threshold that splits `values` into two groups of the largest between-group variance (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=64)
    centers = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * centers)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below - total * sums) ** 2 / (below * (total - below))
    return float(edges[1 + int(np.nanargmax(np.where(np.isfinite(between), between, np.nan)))])


def composites(hands: Tensor, backgrounds: Tensor) -> Composites:
    """Pastes each hand on a background. hands, backgrounds: [N, 3, H, W] fp32 in 0..1."""
    redness = hands[:, 0] - hands[:, 2]
    thresholds = torch.tensor([otsu(image.numpy()) for image in redness])
    masks = redness > thresholds[:, None, None]
    return Composites(torch.where(masks[:, None], hands, backgrounds), masks)


@torch.no_grad()
def patch_tokens(model: Backbone, images: Tensor) -> Tensor:
    """[N, 3, H, W] in 0..1 -> [N, P, D] on the CPU, unit length."""
    device = next(model.vit.parameters()).device
    tokens = [model.vit.forward_features(model.normalized(x, device)).cpu() for x in images.split(64)]
    return F.normalize(pooling.patch_tokens(model.vit, torch.cat(tokens)).float(), dim=-1)


def segment(bank: Tensor, labels: Tensor, queries: Tensor, k: int = NEIGHBORS) -> Tensor:
    """Majority of the k most similar bank tokens. bank [M, D]; labels [M], int64 or bool; queries [N, D] -> [N]."""
    return knn_votes(bank, labels.long(), queries, 2, k, temperature=math.inf).argmax(1)


def mean_iou(found: Tensor, truth: Tensor) -> float:
    """Mean intersection over union of both classes, in percent; int64 or bool tensors of one shape."""
    return 100 * float(miou_of(counts_of(found.flatten().long(), truth.flatten().long(), 2)))


def images_of(hands: str, backgrounds: str, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Hands and backgrounds of the bank (train parts) and of the queries (test parts); evenly spaced images of each."""

    def images(path: str, split: str, num: int) -> Tensor:
        source = open_source(path, split=split)
        every = np.linspace(0, len(source) - 1, num).round().astype(int)
        return torch.cat([x for _, x in load_images(source, every.tolist(), size=size, num_workers=1)]).float() / 255

    pairs = (("train", NUM_BANK), ("test", NUM_QUERIES))
    return [(images(hands, s, n), images(backgrounds, s, n)) for s, n in pairs]


def load(hands: str, backgrounds: str, size: tuple[int, int]) -> tuple[Composites, Composites]:
    """Bank and queries, hands on backgrounds in reverse order."""
    bank, queries = (composites(a, b.flip(0)) for a, b in images_of(hands, backgrounds, size))
    return bank, queries


def dense_score(model: Backbone, bank: Composites, queries: Composites) -> float:
    """Mean IoU in percent of k-NN segmentation by the model's patch tokens."""
    patch = model.vit.patch_embed.patch_size
    tokens, labels = patch_tokens(model, bank.images).flatten(0, 1), patch_labels(bank.masks.long(), patch).flatten()
    found = segment(tokens, labels, patch_tokens(model, queries.images).flatten(0, 1))
    return mean_iou(found, patch_labels(queries.masks.long(), patch).flatten())
