"""Per-class figures of a classifier from its confusion matrix.

confusion[t, p]   images of class t that are predicted as p
precision_c = confusion[c, c] / sum_t confusion[t, c]        recall_c = confusion[c, c] / sum_p confusion[c, p]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassFigures:
    """Figures of each of K classes."""

    images: Tensor  # [K] int64, of the class
    predicted: Tensor  # [K] int64, predicted as the class
    precision: Tensor  # [K] fp64, 0..1; NaN if none is predicted as the class
    recall: Tensor  # [K] fp64, 0..1; NaN if none is of the class


def class_figures(predicted: Tensor, truth: Tensor, classes: int) -> ClassFigures:
    """Return the figures of the classes. predicted, truth: [N] int64."""
    right = torch.bincount(truth[predicted == truth], minlength=classes).double()
    images, guessed = (torch.bincount(y, minlength=classes) for y in (truth, predicted))
    return ClassFigures(images, guessed, right / guessed, right / images)


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Return the number of images by true and predicted class, [K, K] int64. predicted, truth: [N] int64."""
    return torch.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)
