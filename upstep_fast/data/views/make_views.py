"""Random views of a batch of images of any sizes.

Each view: crop and resize (antialiased), flips, quarter turns, brightness, contrast, saturation, hue, gray, blur,
solarize, normalize; always in this order (torchvision shuffles its four jitter operations). With x an image's channel,

    view = N(J(W_y x W_x^T)),   W_y [H_out, H], W_x [W_out, W]: crop, filter and flips in one matrix each

The random parameters of a view are a function of (seed, epoch, index, view) alone: view_params.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.views import color
from upstep_fast.data.views.resize import resize
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.data.views.view_params import ViewParams, draw_params
from upstep_fast.kernels.patchify import in_patches
from upstep_fast.kernels.views import make_views
from upstep_fast.kernels.views.eager import resize_weights
from upstep_fast.kernels.views.op import made_by, views_cpp

CHUNK_BYTES = 4 << 20  # of views computed at a time on a CPU: they stay in its cache from the resize to the end
MATMUL_PIXELS = 96 * 96  # on a CPU, larger images are resized one by one by a sparse filter


def pack(images: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy images to the device: `pixels` [bytes] uint8 and `places` [B, 4] int64 of `kernels.views.make_views`."""
    flat, places, offset = [], [], 0
    for image in images:
        if image.is_cuda:  # decoded on another stream: its memory must not be reused before this stream has read it
            image.record_stream(torch.cuda.current_stream(device))
        image = image[:1] if image.stride(0) == 0 else image  # gray, expanded to three channels
        interleaved = image.permute(1, 2, 0)
        is_interleaved = interleaved.is_contiguous()
        x = interleaved if is_interleaved else image.contiguous()
        C, H, W = image.shape
        strides = (1, W * C, C) if is_interleaved else (H * W, W, 1)
        # a stride of 0 repeats a single channel
        places.append((offset, 0 if C == 1 else strides[0], *strides[1:]))
        flat.append(x.reshape(-1))
        offset += x.numel()
    if any(image.is_cuda for image in images):
        return torch.cat([x.to(device) for x in flat]), torch.tensor(places).to(device)
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
    first: int = 0,
    device: torch.device | str = "cpu",
    patch: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute random views of each image, normalized: [views, B, C, H, W] in `dtype` on `device`.

    images: B of uint8 [C, H, W], on the CPU or on `device`, of any sizes. seed, epoch, indices [B]: key of the random
    numbers. first: number of the first view. patch: P; 0: images; else the views are patches as `kernels.patchify`
    lays them out, [views, B, (H / P) (W / P), C P P]. Raises ValueError as `multi_crop`, for views of several sizes.
    """
    layout: dict[str, Any] = {"device": device, "patch": patch, "dtype": dtype}
    return multi_crop(images, [(config, views)], seed=seed, epoch=epoch, indices=indices, first=first, **layout)[0]


def multi_crop(
    images: Sequence[Tensor],
    crops: Sequence[tuple[ViewConfig, int]],
    *,
    seed: int,
    epoch: int,
    indices: Tensor | Sequence[int],
    first: int = 0,
    device: torch.device | str = "cpu",
    patch: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Compute views of several sizes of each image, as SwAV's and DINO's n global and m local ones.

        globals, locals = multi_crop(images, [(config, 2), (local_config(config, 96), 8)], seed=..., ...)

    crops: pairs of a configuration and a number of views. Returns for each pair [views, B, C, H, W], normalized, on
    `device`. Views are numbered through all pairs, so no two have the same random numbers, and the first pair's views
    are those of `random_views`. Other arguments as `random_views`. Raises ValueError for images that do not fit.
    """
    _check_images(images, indices, crops)
    device = torch.device(device)
    # an Apple GPU has no float64, which boxes are in, and its memory is the CPU's
    on = torch.device("cpu") if device.type == "mps" else device
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
    packed = None if on.type == "cpu" else pack(images, on)
    of_crops = []
    for config, views in crops:
        key = {"seed": seed, "epoch": epoch, "indices": np.asarray(indices, np.int64), "views": views, "first": first}
        params = draw_params(config, heights, widths, **key)  # type: ignore[arg-type]
        x = _make(images, packed, params, config, on, patch, dtype)
        of_crops.append(x.unflatten(0, (views, len(images))).to(device))
        first += views
    return of_crops


def _check_images(
    images: Sequence[Tensor], indices: Tensor | Sequence[int], crops: Sequence[tuple[ViewConfig, int]]
) -> None:
    if len(images) != len(indices):
        raise ValueError(f"indices: got {len(indices)} for {len(images)} images")
    if not images:
        raise ValueError("images: got none")
    channels = images[0].shape[0]
    odd = next((x for x in images if x.dtype != torch.uint8 or x.dim() != 3 or x.shape[0] != channels), None)
    if odd is not None:  # the compiled op would read outside its memory
        raise ValueError(f"images: must all be uint8 [{channels}, H, W], got {odd.dtype} {list(odd.shape)}")
    for config, _ in crops:
        if channels != len(config.mean):
            raise ValueError(f"images: {channels} channels, but mean and std have {len(config.mean)}")


def _make(
    images: Sequence[Tensor],
    packed: tuple[Tensor, Tensor] | None,
    params: ViewParams,
    config: ViewConfig,
    device: torch.device,
    patch: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the views of `params`, [N, C, H, W] or [N, (H / P) (W / P), C P P]; packed: the images on a GPU."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (config.mean, config.std))
    if packed is not None:
        return _make_fused(packed, params, config, mean, std, patch, dtype)
    count, shape = len(params.image), (len(mean), config.height, config.width)
    if made_by(device) == "cpp":
        return _make_compiled(images, params, config, mean, std, patch, dtype)
    step = min(count, max(1, CHUNK_BYTES // (4 * math.prod(shape))))
    out = torch.empty(count, *shape, dtype=dtype)  # as images; `cells`: this memory in the order of patches
    cells = out.view(in_patches(out, patch).shape) if patch else out
    room = None if cells is out and dtype == torch.float32 else torch.empty(step, *shape)
    for start in range(0, count, step):
        part = params.subset(slice(start, start + step))
        # in place, in the result if possible: fresh pages cost a CPU more than the arithmetic
        x = out[start : start + step] if room is None else room[: len(part.image)]
        _resize(images, part, config, x)
        _change_colors(x, part, config)
        x.sub_(mean.view(-1, 1, 1)).mul_(1 / std.view(-1, 1, 1))
        if room is not None:
            cells[start : start + step] = in_patches(x, patch) if patch else x
    return cells.flatten(3).flatten(1, 2) if patch else out


def _make_compiled(
    images: Sequence[Tensor],
    p: ViewParams,
    config: ViewConfig,
    mean: Tensor,
    std: Tensor,
    patch: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute views by the CPU's compiled op, which reads the images without a copy."""
    first = images[0].data_ptr()
    places = torch.tensor([(image.data_ptr() - first, *image.stride()) for image in images])
    boxes, factors = torch.from_numpy(p.boxes()), torch.from_numpy(p.factors())
    out = torch.empty(len(boxes), len(mean), config.height, config.width, dtype=dtype)
    taps = _blur_size(config) if p.sigma.any() else (1, 1)
    height, width = config.height, config.width
    inputs = (images[0], places, boxes, factors, mean, std)
    views_cpp(*inputs, out, height, width, config.interpolation, taps, patch)
    return out.view(len(boxes), height * width // patch**2, -1) if patch else out


def _make_fused(
    packed: tuple[Tensor, Tensor],
    p: ViewParams,
    config: ViewConfig,
    mean: Tensor,
    std: Tensor,
    patch: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute views by the GPU's kernel."""
    boxes, factors = (torch.from_numpy(values).to(mean.device) for values in (p.boxes(), p.factors()))
    return make_views(
        *packed,
        boxes,
        factors,
        mean,
        std,
        config.height,
        config.width,
        interpolation=config.interpolation,
        taps=_blur_size(config) if p.sigma.any() else (1, 1),
        patch=patch,
        dtype=dtype,
    )


def _resize(images: Sequence[Tensor], p: ViewParams, config: ViewConfig, out: Tensor) -> None:
    """Write W_y x W_x^T of some views to out [n, C, H_out, W_out], in 0..1, on a CPU.

    The method depends on an image's own size alone, or a view would change with its batch.
    """
    large = np.array([images[i].shape[1] * images[i].shape[2] > MATMUL_PIXELS for i in p.image])
    if not large.any():
        out.copy_(_resize_dense(images, p, config))
    elif large.all():
        torch.mul(_resize_each(images, p, config), 1 / 255, out=out)
    else:
        for indices in (np.flatnonzero(large), np.flatnonzero(~large)):
            part = out.new_empty(len(indices), *out.shape[1:])
            _resize(images, p.subset(indices), config, part)
            out[torch.from_numpy(indices)] = part


def _resize_dense(images: Sequence[Tensor], p: ViewParams, config: ViewConfig) -> Tensor:
    """Resize by two batched products; images are padded to the largest."""
    inputs = [images[i] for i in p.image]
    channels, tall, wide = inputs[0].shape[0], max(i.shape[1] for i in inputs), max(i.shape[2] for i in inputs)
    if all(image.shape[1:] == (tall, wide) for image in inputs):
        stacked = torch.stack(inputs)
    else:
        stacked = torch.zeros(len(inputs), channels, tall, wide, dtype=torch.uint8)
        for padded, image in zip(stacked, inputs, strict=True):
            padded[:, : image.shape[1], : image.shape[2]] = image
    x = stacked.permute(0, 2, 1, 3).float().flatten(1, 2)  # [n, H C, W]
    top, left, height, width = (torch.from_numpy(a).float() for a in (p.top, p.left, p.height, p.width))
    flip_y, flip_x = torch.from_numpy(p.flip_y), torch.from_numpy(p.flip_x)
    along = resize_weights(left, width, wide, config.width, config.interpolation, flip_x)
    down = resize_weights(top, height, tall, config.height, config.interpolation, flip_y)
    x = torch.bmm(x, along.transpose(1, 2))  # [n, H C, W_out]
    if config.interpolation == "bicubic":
        x.clamp_(0, 255)  # between the two passes and after them, as Pillow and torch do on uint8
    x = torch.bmm(down.div_(255), x.view(len(inputs), tall, -1)).view(len(inputs), config.height, channels, -1)
    x = x.permute(0, 2, 1, 3)
    if p.transpose.any():
        indices = torch.from_numpy(np.flatnonzero(p.transpose))
        x[indices] = x[indices].transpose(-1, -2)
    return x.clamp_(0, 1) if config.interpolation == "bicubic" else x


def _resize_each(images: Sequence[Tensor], p: ViewParams, config: ViewConfig) -> Tensor:
    """Resize by torch's sparse uint8 filter, one view at a time; values are rounded to 1/255."""
    size = (config.height, config.width)
    views = torch.empty(len(p.image), images[0].shape[0], *size, dtype=torch.uint8)
    for n, out in enumerate(views):
        top, left, height, width = (int(a[n]) for a in (p.top, p.left, p.height, p.width))
        view = resize(images[p.image[n]][:, top : top + height, left : left + width], size, config.interpolation)
        flips = [axis for axis, flip in ((1, p.flip_y[n]), (2, p.flip_x[n])) if flip]
        view = view.flip(flips) if flips else view
        out.copy_(view.transpose(1, 2) if p.transpose[n] else view)
    return views


def _change_colors(x: Tensor, p: ViewParams, config: ViewConfig) -> None:
    """Apply color changes and blur in place; x: [n, C, H, W] in 0..1."""

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x.device)

    if config.brightness:
        color.brightness(x, on_device(p.brightness))
    if config.contrast:
        color.contrast(x, on_device(p.contrast))
    if config.saturation:
        color.saturation(x, on_device(p.saturation))
    if config.hue:
        color.hue(x, on_device(p.hue))
    if p.gray.any() and x.shape[1] == 3:
        indices = on_device(np.flatnonzero(p.gray))
        x[indices] = color.gray(x[indices]).expand(-1, 3, -1, -1)
    if p.sigma.any():
        indices, sigma = on_device(np.flatnonzero(p.sigma)), on_device(p.sigma[p.sigma > 0])
        x[indices] = color.blur(x[indices], sigma, _blur_size(config))
    if p.solarize.any():
        indices = on_device(np.flatnonzero(p.solarize))
        x[indices] = color.solarize(x[indices])


def _blur_size(config: ViewConfig) -> tuple[int, int]:
    return color.blur_kernel_size(config.height), color.blur_kernel_size(config.width)
