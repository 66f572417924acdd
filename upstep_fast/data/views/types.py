"""Views of a batch, the input of a training method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True)
class Views:
    """V global views of each of B images, and n local ones of a smaller size if there are any.

    Indexed as the global views, [V, B]: `views[:1]` is the first view of all images, `views[1:, chosen]` the other
    views of some. A pytree whose leaves are its tensors.
    """

    # normalized: [V, B, C, H, W], patches [V, B, N, C P P] (kernels.patchify), or tokens [V, B, N, D] (view_bank.py)
    pixels: Tensor
    height: int  # H, pixels of a global view
    width: int  # W
    local: Tensor | None = None  # [n, B, C, h, w]

    @classmethod
    def of(cls, pixels: Tensor, local: Tensor | None = None, **more: Any) -> Self:
        """Return views of pixels [V, B, C, H, W], which have their size. more: fields of a subclass."""
        height, width = pixels.shape[-2:]
        return cls(pixels=pixels, height=height, width=width, local=local, **more)

    @property
    def num_images(self) -> int:
        """Number of images, B."""
        return self.pixels.shape[1]

    @property
    def is_patches(self) -> bool:
        """Layout of `pixels`: patches or tokens instead of images."""
        return self.pixels.dim() == 4

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, key: Any) -> Views:
        """Return some of the global views, with the local views of their images."""
        images = key[1] if isinstance(key, tuple) else slice(None)
        local = None if self.local is None else self.local[:, images]
        return dataclasses.replace(self, pixels=self.pixels[key], local=local)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the views with `function` applied to each tensor."""
        return _pytree.tree_map(function, self)


def register_views(cls: type[Views]) -> None:
    """Make `Views` or a subclass a pytree node: the tensors are its leaves, the other fields its context."""

    def flatten(views: Views) -> tuple[list[Any], Any]:
        values = {field.name: getattr(views, field.name) for field in dataclasses.fields(views)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in values.items() if name not in tensors}
        return list(tensors.values()), (tuple(tensors), tuple(others.items()))

    def unflatten(tensors: Any, context: Any) -> Views:
        names, others = context
        return cls(**dict(zip(names, tensors, strict=True)), **dict(others))

    _pytree.register_pytree_node(cls, flatten, unflatten)


register_views(Views)
