"""Views that serve in several epochs, and what frozen blocks make of them, kept for as long.

    epoch e compares views (a, a + 1 + e mod d) of every image,  a = floor(e / d),  d = uses / 2

so that a view is compared in 2 d epochs, each time with another one, and every d epochs bring one new view of an image,
where new views in each epoch are two. A view is a function of (seed, image, number), so a resumed run makes the views
that it needs again. Tokens behind the frozen blocks are kept in main memory, in the compute type: (d + 1) N D values an
image, for N tokens of width D. The idea and its measurement are ours: docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pair(epoch: int, uses: int) -> tuple[int, int]:
    """Return the numbers of the two views of an image that an epoch compares; each serves in `uses` epochs, even."""
    first, step = divmod(epoch, uses // 2)
    return first, first + 1 + step


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
        self._oldest = 0

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

    def forget_before(self, view: int) -> None:
        """Drop the tokens of views of smaller numbers, which no later epoch compares."""
        if view > self._oldest:
            for key in [key for key in self._kept if key[0] < view]:
                self.size -= self._kept.pop(key).nbytes
            self._oldest = view

    def _keep(self, view: int, images: Sequence[int], tokens: Tensor) -> None:
        if self.size + tokens.nbytes <= self.limit and tokens.nbytes <= self._spare():
            self.size += tokens.nbytes
            self._kept |= {(view, image): row for image, row in zip(images, tokens.cpu(), strict=True)}
