"""make_views: two views of packed images in one launch, against its parts in eager torch and a copy of as many bytes.

    pytest bench/kernels/bench_views.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given where the result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from upstep_fast.data.views.make_views import pack
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.data.views.view_params import draw_params
from upstep_fast.kernels.views import make_views
from upstep_fast.kernels.views.eager import views_reference

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
IMAGES, SIDE, PATCH = (256, 224, 16) if DEVICE == "cuda" else (4, 64, 8)
HEIGHT, WIDTH = 375, 500  # of an image, pixels
RECIPES = {
    "plain": ViewConfig(size=SIDE),
    "dino": ViewConfig(size=SIDE, hue=0.1, blur=0.5, solarize=0.1, interpolation="bicubic"),
}


@pytest.mark.parametrize("name", ["copy", "ours", "eager"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_views(measure, copy_of, recipe, name):
    config = RECIPES[recipe]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    sides = (np.full(IMAGES, side) for side in (HEIGHT, WIDTH))
    params = draw_params(config, *sides, seed=0, epoch=0, indices=np.arange(IMAGES), views=2)
    arrays = [torch.from_numpy(a).to(DEVICE) for a in (params.boxes(), params.factors())]
    given = [*pack(images.unbind(), torch.device(DEVICE)), *arrays]
    given += [torch.tensor(v, device=DEVICE) for v in (config.mean, config.std)]
    taps = (23, 23) if config.blur else (1, 1)

    def ours() -> torch.Tensor:
        options = {"interpolation": config.interpolation, "taps": taps, "patch": PATCH, "dtype": DTYPE}
        return make_views(*given, SIDE, SIDE, **options)

    def eager() -> torch.Tensor:
        return views_reference(*given, SIDE, SIDE, config.interpolation, taps, PATCH, DTYPE)

    # what has to move: every pixel of the crops once, the views once
    crops = 3 * int((params.height * params.width).sum())
    num_bytes = crops + 2 * IMAGES * 3 * SIDE * SIDE * torch.finfo(DTYPE).bits // 8
    call: Callable[[], object] = {"copy": copy_of(num_bytes), "ours": ours, "eager": eager}[name]
    if name == "ours":
        error = (ours().float() - eager().float()).abs()
        assert error.quantile(0.999) < 0.05 if error.numel() < 2**24 else error.mean() < 1e-2, "views are wrong"
    measure(call, f"views {recipe}", "views", bytes=num_bytes, dtype=str(DTYPE), images=IMAGES, side=SIDE)
