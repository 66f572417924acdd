"""A bank of views: an image has a fixed number of random views in all, and frozen blocks see each of them once.

    epoch e compares views (a, b) of all images: all pairs in turn, in the order of a round-robin tournament,
    so that each view comes once in V / 2 epochs

A view is a function of (seed, image, number), so a resumed run makes the views that it needs again. Their tokens behind
the frozen blocks are kept in main memory, in the compute type: V N D values an image, for N tokens of width D.
The idea and its measurement are ours: docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pair(epoch: int, num_views: int) -> tuple[int, int]:
    """Return the two of `num_views` views, an even number, that an epoch compares."""
    day, match = divmod(epoch, num_views // 2)
    others = num_views - 1  # the last view stays in its place, the others move in a circle
    day %= others
    return (day, others) if match == 0 else ((day + match) % others, (day - match) % others)


class TokenBank:
    """Tokens of views behind the frozen blocks, each computed once while there is room.

    compute: views, as images or patches -> tokens [B, N, D]. frozen: number of blocks that they pass. limit: bytes to
    keep, in main memory; spare: gives those that there are now. The tokens of further views are computed each time,
    with the same bits.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        frozen: int,
        limit: float,
        spare: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.frozen, self.limit, self.size = frozen, limit, 0
        self._compute, self._spare = compute, spare
        self._kept: dict[tuple[int, int], Tensor] = {}

    def tokens(
        self, view: int, images: Sequence[int], make: Callable[[list[int]], Tensor], device: torch.device
    ) -> Tensor:
        """Return the tokens of view number `view` of images of the data set, [B, N, D].

        make: gives the views of the images at some positions in `images`.
        """
        places = [self._kept.get((view, image)) for image in images]
        missing = [at for at, row in enumerate(places) if row is None]
        known = [at for at, row in enumerate(places) if row is not None]
        old = torch.stack([row for row in places if row is not None]).to(device) if known else None
        if not missing:
            assert old is not None
            return old
        new = self._compute(make(missing))
        self._keep(view, [images[at] for at in missing], new)
        if old is None:
            return new
        both = new.new_empty(len(images), *new.shape[1:])
        both[missing], both[known] = new, old
        return both

    def _keep(self, view: int, images: Sequence[int], tokens: Tensor) -> None:
        if self.size + tokens.nbytes <= self.limit and tokens.nbytes <= self._spare():
            self.size += tokens.nbytes
            self._kept |= {(view, image): row for image, row in zip(images, tokens.cpu(), strict=True)}
