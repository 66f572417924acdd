"""Segmentation by nearest neighbors among labeled patch tokens, and its measures.

    votes of class c for query q = sum over the k tokens b most similar to q with label c of exp((q . b - 1) / T)
    label map = argmax over c of the votes, interpolated bilinearly from the grid to the pixels
    IoU(c) = |predicted c and labeled c| / |predicted c or labeled c|,  mIoU = mean over the classes that occur

Nothing is trained. Pixels labeled 255 are ignored, as in PASCAL VOC. The classifier is DINO's k-NN (T = 0.07), by
token, as in Balazevic et al. 2023 (Hummingbird).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.evaluation.classifiers import KNN_TEMPERATURE

IGNORED = 255  # a label that is not counted
QUERIES = 1024  # at a time


def on_grid_area(masks: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Cut masks [N, H, W] to the pixels that the grid covers, or extend them by ignored ones, at the right and bottom.

    Models whose patches do not divide the image leave out its last pixels, or pad it.
    """
    height, width = (count * side for count, side in zip(grid, patch, strict=True))
    missing = max(0, width - masks.shape[2]), max(0, height - masks.shape[1])
    return F.pad(masks, (0, missing[0], 0, missing[1]), value=IGNORED)[:, :height, :width]


def patch_labels(masks: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return the most frequent label of each patch: [N, H, W] int64 -> [N, H / patch, W / patch] int64.

    Of equally frequent ones the lowest; IGNORED where no pixel counts.
    """
    patches = masks.unfold(1, patch[0], patch[0]).unfold(2, patch[1], patch[1]).flatten(3)  # [N, h, w, pixels]
    counted = masks[masks != IGNORED]
    num_classes = int(counted.max()) + 1 if len(counted) else 1
    counts = torch.stack([(patches == c).sum(-1) for c in range(num_classes)], -1)
    return torch.where(counts.sum(-1) > 0, counts.argmax(-1), IGNORED)


def knn_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int = 20, temperature: float = KNN_TEMPERATURE
) -> Tensor:
    """Return the votes of each query's k nearest tokens by class, as shares: fp32 [Q, C].

    bank: unit tokens [M, D]; labels: [M] int64; queries: unit tokens [Q, D]. temperature: infinity for equal votes.
    """
    one_hot, votes = F.one_hot(labels, num_classes).float(), []
    for q in queries.split(QUERIES):
        nearest = (q @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()  # the largest 1: shares are the same
        of_class = (one_hot[nearest.indices] * weights[..., None]).sum(1)
        votes.append(of_class / of_class.sum(1, keepdim=True))
    return torch.cat(votes)


def label_maps(votes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class of every pixel: votes [N, h, w, C] -> [N, *size] int64."""
    pixels = F.interpolate(votes.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    return pixels.argmax(1)


def counts_of(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Return the number of pixels by class: [3, C] int64, rightly predicted, labeled, predicted. truth: 255 is ignored.

    predicted, truth: int64 of one shape, of an image or several.
    """
    p, t = predicted[truth != IGNORED], truth[truth != IGNORED]
    return torch.stack([torch.bincount(x, minlength=num_classes) for x in (t[p == t], t, p)])


def iou_of(counts: Tensor) -> Tensor:
    """Return the IoU of each class: counts [..., 3, C] of `counts_of` -> fp64 [..., C]; NaN where a class is absent."""
    hits, labeled, predicted = counts.double().unbind(-2)
    return hits / (labeled + predicted - hits)


def miou_of(counts: Tensor) -> Tensor:
    """Return the mean IoU over the classes that are labeled or predicted: [..., 3, C] -> fp64 [...]."""
    return iou_of(counts).nanmean(-1)


def pixel_accuracy_of(counts: Tensor) -> Tensor:
    """Return the share of labeled pixels that are right: [..., 3, C] -> fp64 [...]."""
    return counts[..., 0, :].sum(-1).double() / counts[..., 1, :].sum(-1)
