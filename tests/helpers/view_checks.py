"""What the tests of views share: torchvision's view of the same geometry, and the skip without the compiled op."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.data.views.view_params import ViewParams
from upstep_fast.kernels._native import native_unsupported_reason


def torchvision_view(image: torch.Tensor, p: ViewParams, n: int, config: ViewConfig) -> torch.Tensor:
    """What torchvision makes of the same geometry, uint8."""
    box = [int(a[n]) for a in (p.top, p.left, p.height, p.width)]
    mode = v2.InterpolationMode(config.interpolation)
    view = tv.resized_crop(image, *box, [config.height, config.width], interpolation=mode, antialias=True)
    view = tv.vertical_flip(view) if p.flip_y[n] else view
    view = tv.horizontal_flip(view) if p.flip_x[n] else view
    return view.transpose(1, 2) if p.transpose[n] else view


def needs(implementation: str) -> None:
    if implementation == "cpp" and (reason := native_unsupported_reason("cpp", torch.device("cpu"), "views")):
        pytest.skip(reason)
