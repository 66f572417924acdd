"""Random views of a batch of images of any sizes.

Each view: crop and resize (antialiased), flips, quarter turns, brightness, contrast, saturation, hue, grey, blur,
solarise, normalise; always in this order (torchvision shuffles its four jitter operations). With x an image's channel,

    view = N(J(W_y x W_x^T)),   W_y [H_out, H], W_x [W_out, W]: crop, filter and flips in one matrix each

Every random number is uniform(seed, epoch, index, view, slot), with the slots below: splitmix64 chained over its key
(data/random.py). So a view depends on nothing but its name, and any batch can be made again, on any machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.views import FLIP_X, FLIP_Y, TRANSPOSE, crop_resize, resize_weights
from . import colour
from .random import uniform_array
from .recipe import PRESETS as PRESETS
from .recipe import ViewConfig as ViewConfig
from .recipe import view_config as view_config
from .resize import resize

TRIES = 10  # crops tried before the fallback, as torchvision's RandomResizedCrop
# slots of the random numbers; 0 to 9: area of a try, 10 to 19: its aspect
TOP, LEFT, FLIP, VERTICAL_FLIP, ROTATE, TURNS = range(20, 26)
BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SIGMA, SOLARIZE, SLOTS = range(26, 35)

CHUNK_BYTES = 4 << 20  # views worked on at a time on a CPU: they stay in its cache from the resize to the end
MATMUL_PIXELS = 96 * 96  # on a CPU, larger images are resized one by one by a sparse filter


@dataclass(frozen=True)
class ViewParams:
    """What happens to N views; arrays of N. `image` says which image of the batch each is made of."""

    image: np.ndarray
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
    hue: np.ndarray  # part of the circle
    grey: np.ndarray  # bool
    sigma: np.ndarray  # of the blur, pixels; 0: none
    solarize: np.ndarray  # bool

    def take(self, which: slice | np.ndarray) -> ViewParams:
        """A part of the views."""
        return ViewParams(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))

    def boxes(self) -> np.ndarray:
        """The geometry as `kernels.views.crop_resize` takes it: [N, 6] int32."""
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
) -> ViewParams:
    """Parameters of all views of a batch, view by view: entry v B + b is view v of image b.

    heights, widths: [B] pixels. indices: [B], the images' places in the source.
    """
    view = np.repeat(np.arange(views, dtype=np.uint64), len(indices))[:, None]
    index = np.tile(np.asarray(indices, np.uint64), views)[:, None]
    u = uniform_array(seed, epoch, index, view, np.arange(SLOTS, dtype=np.uint64))
    top, left, height, width = _crops(config, np.tile(heights, views), np.tile(widths, views), u)
    # a quarter turn counter-clockwise is a left-right flip, then a transposition; three are an up-down flip, then it
    turns = np.where(u[:, ROTATE] < config.rotate90, 1 + np.floor(3 * u[:, TURNS]), 0)

    def factor(slot: int, value: float) -> np.ndarray:
        low = max(0.0, 1 - value)
        return (low + u[:, slot] * (1 + value - low)).astype(np.float32)

    low, high = config.blur_sigma
    return ViewParams(
        image=np.tile(np.arange(len(indices)), views),
        top=top,
        left=left,
        height=height,
        width=width,
        flip_x=(u[:, FLIP] < config.flip) ^ np.isin(turns, (1, 2)),
        flip_y=(u[:, VERTICAL_FLIP] < config.vertical_flip) ^ np.isin(turns, (2, 3)),
        transpose=turns % 2 == 1,
        brightness=factor(BRIGHTNESS, config.brightness),
        contrast=factor(CONTRAST, config.contrast),
        saturation=factor(SATURATION, config.saturation),
        hue=((2 * u[:, HUE] - 1) * config.hue).astype(np.float32),
        grey=u[:, GREY] < config.grey,
        sigma=np.where(u[:, BLUR] < config.blur, low + u[:, SIGMA] * (high - low), 0.0).astype(np.float32),
        solarize=u[:, SOLARIZE] < config.solarize,
    )


def pack(images: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images behind one another on the device, and where they lie: pixels and places of `kernels.views.crop_resize`."""
    flat, places, offset = [], [], 0
    for image in images:
        image = image[:1] if image.stride(0) == 0 else image  # grey, shown as three channels
        interleaved = image.permute(1, 2, 0)
        is_interleaved = interleaved.is_contiguous()
        x = interleaved if is_interleaved else image.contiguous()
        C, H, W = image.shape
        strides = (1, W * C, C) if is_interleaved else (H * W, W, 1)
        # one channel serves all that are asked for
        places.append((offset, 0 if C == 1 else strides[0], *strides[1:]))
        flat.append(x.reshape(-1))
        offset += x.numel()
    pixels = torch.empty(offset, dtype=torch.uint8, pin_memory=device.type == "cuda")
    torch.cat(flat, out=pixels)
    return tuple(x.to(device, non_blocking=True) for x in (pixels, torch.tensor(places)))  # type: ignore[return-value]


def random_views(
    images: Sequence[Tensor],
    config: ViewConfig,
    *,
    seed: int,
    epoch: int,
    indices: Tensor | Sequence[int],
    views: int = 2,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random views of each image, fp32, normalised: [views, B, C, H, W] on `device`.

    images: B of uint8 [C, H, W] on the CPU, of any sizes. seed, epoch, indices: what the random numbers come from.
    """
    if len(images) != len(indices):
        raise ValueError(f"indices: got {len(indices)} for {len(images)} images")
    if not images:
        raise ValueError("images: got none")
    channels = images[0].shape[0]
    if channels != len(config.mean):
        raise ValueError(f"images: {channels} channels, but mean and std have {len(config.mean)}")
    device = torch.device(device)
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
    params = draw_params(
        config, heights, widths, seed=seed, epoch=epoch, indices=np.asarray(indices, np.int64), views=views
    )
    count = views * len(images)
    out = torch.empty(count, channels, config.height, config.width, device=device)
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (config.mean, config.std))
    per_view = 4 * channels * config.height * config.width
    step = max(1, CHUNK_BYTES // per_view) if device.type == "cpu" else max(1, (256 << 20) // per_view)
    packed = None if device.type == "cpu" else pack(images, device)
    for start in range(0, count, step):
        part = params.take(slice(start, start + step))
        # everything happens in the result's own memory: fresh pages cost a CPU more than the arithmetic
        x = out[start : start + step]
        if packed is None:
            _resize(images, part, config, x)
        else:
            boxes = torch.from_numpy(part.boxes()).to(device)
            x.copy_(crop_resize(*packed, boxes, channels, config.height, config.width, config.interpolation))
        _recolour(x, part, config)
        x.sub_(mean).mul_(1 / std)
    return out.view(views, len(images), channels, config.height, config.width)


def _crops(config: ViewConfig, heights: np.ndarray, widths: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, ...]:
    """torchvision's RandomResizedCrop.get_params for N images: top, left, height, width, each [N] int64."""
    (low, high), ratio = config.crop_scale, config.crop_ratio
    area = (heights * widths)[:, None] * (low + u[:, :TRIES] * (high - low))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(log_low + u[:, TRIES : 2 * TRIES] * (log_high - log_low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    top, left = np.floor(u[:, TOP] * (heights - h + 1)), np.floor(u[:, LEFT] * (widths - w + 1))
    # none of the tries fits: the largest central crop whose aspect is allowed
    none = ~fits.any(1)
    aspect_in = widths / heights
    w_all = np.where(aspect_in > ratio[1], np.rint(heights * ratio[1]), widths)
    h_all = np.where(aspect_in < ratio[0], np.rint(widths / ratio[0]), heights)
    # rounding must not leave the image, nor make a strip of nothing of a very thin one
    w, h = np.where(none, np.clip(w_all, 1, widths), w), np.where(none, np.clip(h_all, 1, heights), h)
    top, left = np.where(none, (heights - h) // 2, top), np.where(none, (widths - w) // 2, left)
    return tuple(a.astype(np.int64) for a in (top, left, h, w))


def _resize(images: Sequence[Tensor], p: ViewParams, config: ViewConfig, out: Tensor) -> None:
    """W_y x W_x^T for a part of the views into out [n, C, H_out, W_out], in 0..1, on a CPU.

    Which way an image takes depends on its own size alone, or a view would change with its neighbours.
    """
    large = np.array([images[i].shape[1] * images[i].shape[2] > MATMUL_PIXELS for i in p.image])
    if not large.any():
        out.copy_(_resize_dense(images, p, config))
    elif large.all():
        torch.mul(_resize_each(images, p, config), 1 / 255, out=out)
    else:
        for chosen in (np.flatnonzero(large), np.flatnonzero(~large)):
            part = out.new_empty(len(chosen), *out.shape[1:])
            _resize(images, p.take(chosen), config, part)
            out[torch.from_numpy(chosen)] = part


def _resize_dense(images: Sequence[Tensor], p: ViewParams, config: ViewConfig) -> Tensor:
    """By two batched products; images are padded to the largest."""
    chosen = [images[i] for i in p.image]
    channels, tall, wide = chosen[0].shape[0], max(i.shape[1] for i in chosen), max(i.shape[2] for i in chosen)
    if all(image.shape[1:] == (tall, wide) for image in chosen):
        stacked = torch.stack(chosen)
    else:
        stacked = torch.zeros(len(chosen), channels, tall, wide, dtype=torch.uint8)
        for place, image in zip(stacked, chosen, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
    x = stacked.permute(0, 2, 1, 3).float().flatten(1, 2)  # [n, H C, W]
    top, left, height, width = (torch.from_numpy(a).float() for a in (p.top, p.left, p.height, p.width))
    flip_y, flip_x = torch.from_numpy(p.flip_y), torch.from_numpy(p.flip_x)
    along = resize_weights(left, width, wide, config.width, config.interpolation, flip_x)
    down = resize_weights(top, height, tall, config.height, config.interpolation, flip_y)
    x = torch.bmm(x, along.transpose(1, 2))  # [n, H C, W_out]
    if config.interpolation == "bicubic":
        x.clamp_(0, 255)  # between the two passes and after them, as Pillow and torch do on uint8
    x = torch.bmm(down.div_(255), x.view(len(chosen), tall, -1)).view(len(chosen), config.height, channels, -1)
    x = x.permute(0, 2, 1, 3)
    if p.transpose.any():
        turned = torch.from_numpy(np.flatnonzero(p.transpose))
        x[turned] = x[turned].transpose(-1, -2)
    return x.clamp_(0, 1) if config.interpolation == "bicubic" else x


def _resize_each(images: Sequence[Tensor], p: ViewParams, config: ViewConfig) -> Tensor:
    """By torch's sparse uint8 filter, one view at a time; values are rounded to 1/255."""
    size = (config.height, config.width)
    views = torch.empty(len(p.image), images[0].shape[0], *size, dtype=torch.uint8)
    for n, place in enumerate(views):
        top, left, height, width = (int(a[n]) for a in (p.top, p.left, p.height, p.width))
        view = resize(images[p.image[n]][:, top : top + height, left : left + width], size, config.interpolation)
        flips = [axis for axis, flip in ((1, p.flip_y[n]), (2, p.flip_x[n])) if flip]
        view = view.flip(flips) if flips else view
        place.copy_(view.transpose(1, 2) if p.transpose[n] else view)
    return views


def _recolour(x: Tensor, p: ViewParams, config: ViewConfig) -> None:
    """All that changes colours, in place, on x in 0..1."""

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x.device)

    if config.brightness:
        colour.brightness(x, on_device(p.brightness))
    if config.contrast:
        colour.contrast(x, on_device(p.contrast))
    if config.saturation:
        colour.saturation(x, on_device(p.saturation))
    if config.hue:
        colour.hue(x, on_device(p.hue))
    if p.grey.any() and x.shape[1] == 3:
        chosen = on_device(np.flatnonzero(p.grey))
        x[chosen] = colour.grey(x[chosen]).expand(-1, 3, -1, -1)
    if p.sigma.any():
        chosen, sigma = on_device(np.flatnonzero(p.sigma)), on_device(p.sigma[p.sigma > 0])
        kernel = colour.blur_kernel_size(config.height), colour.blur_kernel_size(config.width)
        x[chosen] = colour.blur(x[chosen], sigma, kernel)
    if p.solarize.any():
        chosen = on_device(np.flatnonzero(p.solarize))
        x[chosen] = colour.solarize(x[chosen])
