"""Random parameters of views: every number is uniform(seed, epoch, index, view, slot), with the slots below.

The numbers depend on their key alone (data/keyed_random.py), so that any batch can be computed again on any machine.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from upstep_fast.data.keyed_random import uniform_array
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.kernels.views.eager import FLIP_X, FLIP_Y, TRANSPOSE

TRIES = 10  # crops tried before the fallback, as torchvision's RandomResizedCrop
# slots of the random numbers; 0 to 9: area of a try, 10 to 19: its aspect
TOP, LEFT, FLIP, VERTICAL_FLIP, ROTATE, TURNS = range(20, 26)
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SIGMA, SOLARIZE, SLOTS = range(26, 35)


@dataclass(frozen=True)
class ViewParams:
    """Parameters of N views, arrays [N]."""

    image: np.ndarray  # index in the batch
    top: np.ndarray  # of the crop, pixels
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip_x: np.ndarray  # bool, before the transposition
    flip_y: np.ndarray
    transpose: np.ndarray
    brightness: np.ndarray  # factors
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray  # fraction of the color circle
    gray: np.ndarray  # bool
    sigma: np.ndarray  # of the blur, pixels; 0: none
    solarize: np.ndarray  # bool

    def subset(self, indices: slice | np.ndarray) -> ViewParams:
        """Return the parameters of some of the views."""
        return ViewParams(*(getattr(self, field.name)[indices] for field in dataclasses.fields(self)))

    def factors(self) -> np.ndarray:
        """Return the color changes and the blur as `kernels.views.make_views` takes them: [N, 7] fp32."""
        columns = (
            *(self.brightness, self.contrast, self.saturation, self.hue, self.gray),
            *(self.sigma, self.solarize),
        )
        return np.stack(columns, 1).astype(np.float32)

    def boxes(self) -> np.ndarray:
        """Return the geometry as `kernels.views.make_views` takes it: [N, 6] int32."""
        turn = FLIP_Y * self.flip_y + FLIP_X * self.flip_x + TRANSPOSE * self.transpose
        return np.stack([self.image, self.top, self.left, self.height, self.width, turn], 1).astype(np.int32)


def draw_params(
    config: ViewConfig,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    seed: int,
    epoch: int,
    indices: np.ndarray,
    views: int,
    first: int = 0,
) -> ViewParams:
    """Draw the parameters of the views `first` to `first + views`: entry v B + b is view first + v of image b.

    heights, widths: [B] pixels. indices: [B], positions of the images in the source.
    """
    view = np.repeat(np.arange(first, first + views, dtype=np.uint64), len(indices))[:, None]
    index = np.tile(np.asarray(indices, np.uint64), views)[:, None]
    u = uniform_array(seed, epoch, index, view, np.arange(SLOTS, dtype=np.uint64))
    top, left, height, width = _crops(config, np.tile(heights, views), np.tile(widths, views), u)
    # a quarter turn counter-clockwise is a left-right flip, then a transposition; three are an up-down flip, then it
    turns = np.where(u[:, ROTATE] < config.rotate90, 1 + np.floor(3 * u[:, TURNS]), 0)
    return ViewParams(
        image=np.tile(np.arange(len(indices)), views),
        top=top,
        left=left,
        height=height,
        width=width,
        flip_x=(u[:, FLIP] < config.flip) ^ np.isin(turns, (1, 2)),
        flip_y=(u[:, VERTICAL_FLIP] < config.vertical_flip) ^ np.isin(turns, (2, 3)),
        transpose=turns % 2 == 1,
        brightness=_between(u[:, BRIGHTNESS], max(0.0, 1 - config.brightness), 1 + config.brightness),
        contrast=_between(u[:, CONTRAST], max(0.0, 1 - config.contrast), 1 + config.contrast),
        saturation=_between(u[:, SATURATION], max(0.0, 1 - config.saturation), 1 + config.saturation),
        hue=((2 * u[:, HUE] - 1) * config.hue).astype(np.float32),
        gray=u[:, GRAY] < config.gray,
        sigma=_between(u[:, SIGMA], *config.blur_sigma) * (u[:, BLUR] < config.blur),
        solarize=u[:, SOLARIZE] < config.solarize,
    )


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return (low + u * (high - low)).astype(np.float32)


def _crops(config: ViewConfig, heights: np.ndarray, widths: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compute torchvision's RandomResizedCrop.get_params for N images: top, left, height, width, each [N] int64."""
    (low, high), ratio = config.crop_scale, config.crop_ratio
    area = (heights * widths)[:, None] * (low + u[:, :TRIES] * (high - low))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_low + u[:, TRIES : 2 * TRIES] * (log_high - log_low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    top, left = np.floor(u[:, TOP] * (heights - h + 1)), np.floor(u[:, LEFT] * (widths - w + 1))
    # where no try fits: the largest central crop whose aspect is allowed
    none = ~fits.any(1)
    aspect_in = widths / heights
    w_all = np.where(aspect_in > ratio[1], np.rint(heights * ratio[1]), widths)
    h_all = np.where(aspect_in < ratio[0], np.rint(widths / ratio[0]), heights)
    # rounding must not leave the image, nor give a crop of a very thin one zero pixels
    w, h = np.where(none, np.clip(w_all, 1, widths), w), np.where(none, np.clip(h_all, 1, heights), h)
    top, left = np.where(none, (heights - h) // 2, top), np.where(none, (widths - w) // 2, left)
    return tuple(a.astype(np.int64) for a in (top, left, h, w))
