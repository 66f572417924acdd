"""k-NN and linear-probe accuracy of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.data.labeled.splits import held_out as held_out_of
from upstep_fast.evaluation.features import Features
from upstep_fast.runtime import distributed

KNN_TEMPERATURE = 0.07  # of the votes, as in DINO's k-NN
PROBE_WEIGHTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # L2 weights, chosen on a held-out part of train
PROBE_HELD_OUT = 0.2


def knn(train: Features, test: Features, k: int = 20) -> float:
    """Return the top-1 accuracy in percent of a k-NN classifier; votes are weighted by exp(similarity / 0.07).

    train, test: unit features with the classes in one order. k is limited to the size of `train`.
    """
    local = slice(distributed.rank(), None, distributed.size())
    correct = knn_correct(train, Features(test.x[local], test.y[local], test.classes), k).sum()
    return 100.0 * distributed.reduce(correct).item() / len(test.y)


def knn_correct(train: Features, test: Features, k: int = 20) -> Tensor:
    """Return which images of `test` the classifier of `knn` gets right, [N] bool; without communication."""
    one_hot = F.one_hot(train.y, len(train.classes)).float()
    correct = []
    for x, y in zip(test.x.split(1024), test.y.split(1024), strict=True):
        similarity, nearest = (x @ train.x.T).topk(min(k, len(train.x)), dim=1)
        votes = (one_hot[nearest] * ((similarity - 1) / KNN_TEMPERATURE).exp()[..., None]).sum(1)
        correct.append(votes.argmax(1) == y)
    return torch.cat(correct)


def linear_probe(train: Features, test: Features, *, seed: int = 0) -> float:
    """Return the top-1 accuracy in percent of logistic regression; its L2 weight is chosen on a part of `train`."""
    mean, std = train.x.mean(0), train.x.std(0).clamp_min(1e-6)
    x, x_test = (train.x - mean) / std, (test.x - mean) / std
    held_out = held_out_of(train.y, PROBE_HELD_OUT, seed)
    classes = len(train.classes)
    if held_out.any():

        def held_out_accuracy(l2: float) -> float:
            model = fit_logistic(x[~held_out], train.y[~held_out], classes, l2)
            return _accuracy(model, x[held_out], train.y[held_out])

        best = max(PROBE_WEIGHTS, key=held_out_accuracy)
    else:  # with one image per class nothing can be held out
        best = PROBE_WEIGHTS[len(PROBE_WEIGHTS) // 2]
    return _accuracy(fit_logistic(x, train.y, classes, best), x_test, test.y)


def fit_logistic(x: Tensor, y: Tensor, classes: int, l2: float, iterations: int = 100) -> nn.Linear:
    """Minimize mean cross-entropy + l2/2 |W|^2 by L-BFGS and return the model. x: [N, D]; y: [N] int64."""
    model = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.5 * l2 * model.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return model


@torch.no_grad()
def _accuracy(model: nn.Linear, x: Tensor, y: Tensor) -> float:
    return 100.0 * float((model(x).argmax(1) == y).float().mean())
