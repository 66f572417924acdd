"""Triton kernels of random views; triton.py launches them, op.py has the formulas.

    resize   a tile of a channel, and its part of the contrast's mean   pixels  -> room
    color    colors up to gray; solarized, normalized, cast             room    -> out; of blurred views -> room
    blur     along columns, transposed                                  room    -> scratch
    blur     along rows, back; solarized, normalized, cast              scratch -> out

`room` is the result's own memory: a view waits there, in 16 bits as fixed point (1/65535), until its mean is known.
"""

from __future__ import annotations

from .._triton import tl, triton


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _store(at, x, mask, FIXED: tl.constexpr):
    """Store x in 0..1 for later."""
    x = (x * 65535 + 0.5).to(tl.int32) - 32768 if FIXED else x
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _load(at, mask, FIXED: tl.constexpr):
    x = tl.load(at, mask=mask, other=0).to(tl.float32)
    return (x + 32768) * (1 / 65535) if FIXED else x


@triton.jit
def _cell(y, x, C, W, PATCH: tl.constexpr):
    """Compute the index of pixel (y, x) of the first channel in a view of the result; channels are a plane apart."""
    if PATCH:
        row = (y // PATCH) * (W // PATCH) + x // PATCH
        return (row * C * PATCH + y % PATCH) * PATCH + x % PATCH
    else:
        return y * W + x


@triton.jit
def _pixel(p, W, PATCH: tl.constexpr):
    """Compute row and column of the p-th pixel in the order of the result."""
    if PATCH:
        patch, inside = p // (PATCH * PATCH), p % (PATCH * PATCH)
        across = W // PATCH
        return (patch // across) * PATCH + inside // PATCH, (patch % across) * PATCH + inside % PATCH
    else:
        return p // W, p % W


@triton.jit
def _filter(t, CUBIC: tl.constexpr):
    t = tl.abs(t)
    if CUBIC:
        near = (1.5 * t - 2.5) * t * t + 1
        far = (((t - 5) * t + 8) * t - 4) * -0.5
        return tl.where(t < 1, near, tl.where(t < 2, far, 0.0))
    else:
        return tl.maximum(1 - t, 0.0)


@triton.jit
def _axis(j, length, size, RADIUS: tl.constexpr):
    """Return where results j lie in a source of `length` pixels, 1 / the widening of the filter, and its reach."""
    scale = length.to(tl.float32) / size
    wide = tl.maximum(scale, 1.0)  # the filter widens only when shrinking
    return scale * (j + 0.5), 1 / wide, RADIUS * wide


@triton.jit
def _weight(k, center, narrow, length, CUBIC: tl.constexpr):
    """Compute the weight, up to their sum, of source pixel k for a result at `center`."""
    return tl.where(k < length, _filter((k + 0.5 - center) * narrow, CUBIC), 0.0)


@triton.jit
def _first(center, reach):
    return tl.maximum(tl.floor(center - reach), 0.0).to(tl.int32)


@triton.jit
def _norm(center, narrow, reach, length, CUBIC: tl.constexpr):
    """Compute 1 / the sum of the weights of a result at `center`."""
    first, total = _first(center, reach), 0.0 * center
    for tap in tl.range(0, (2 * reach).to(tl.int32) + 2):
        total += _weight(first + tap, center, narrow, length, CUBIC)
    return 1 / total


@triton.jit
def _split(x):
    """Split x into two fp16 numbers that add up to it within 2^-22."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _resized(
    source, stride_y, stride_x, rows, columns, i, j, begin, end, H, W,
    CUBIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Resize a plane of bytes: results (i, j) of the upright view, i in [begin, end), in 0..1.

    Along rows tap by tap, BLOCK_K source rows at a time; then a product of sums of two fp16 numbers on tensor cores.
    """
    RADIUS: tl.constexpr = 2.0 if CUBIC else 1.0
    center_x, narrow_x, reach_x = _axis(j, columns, W, RADIUS)
    center_y, narrow_y, reach_y = _axis(i, rows, H, RADIUS)
    norm_x = _norm(center_x, narrow_x, reach_x, columns, CUBIC) * (1 / 255)
    first_x = _first(center_x, reach_x)
    low, _, _ = _axis(begin, rows, H, RADIUS)
    high, _, _ = _axis(end - 1, rows, H, RADIUS)
    last = tl.minimum((high + reach_y).to(tl.int32) + 1, rows)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for row in tl.range(_first(low, reach_y), last, BLOCK_K):
        y = row + tl.arange(0, BLOCK_K)
        # beyond the crop weights are 0: its last row and column are read
        line = source + (tl.minimum(y, rows - 1) * stride_y)[:, None]
        along = tl.zeros((BLOCK_K, BLOCK), tl.float32)
        for tap in tl.range(0, (2 * reach_x).to(tl.int32) + 2):
            x = first_x + tap
            # the hint has neighboring threads read along a row; a byte is aligned to nothing, so no load widens
            at = tl.max_contiguous(line + (tl.minimum(x, columns - 1) * stride_x)[None, :], [1, 2])
            along += _weight(x, center_x, narrow_x, columns, CUBIC)[None, :] * tl.load(at).to(tl.float32)
        along *= norm_x[None, :]
        if CUBIC:
            along = _clamp(along)
        value, value_rest = _split(along)
        weight, weight_rest = _split(_weight(y[None, :], center_y[:, None], narrow_y, rows, CUBIC))
        total = tl.dot(weight_rest, value, total)
        total = tl.dot(weight, value_rest, total)
        total = tl.dot(weight, value, total)
    return _clamp(total * _norm(center_y, narrow_y, reach_y, rows, CUBIC)[:, None])


@triton.jit
def resize_kernel(
    pixels, places, boxes, factors, room, sums, C, H, W,
    RGB: tl.constexpr, CUBIC: tl.constexpr, PATCH: tl.constexpr, FIXED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Resize a tile of one channel of a view, and add up its part of the mean for the contrast."""
    # the channels of a tile are neighbors, as they may share lines of memory
    across = tl.cdiv(W, BLOCK)
    tiles = tl.cdiv(H, BLOCK) * across
    c, tile, n = tl.program_id(0) % C, tl.program_id(0) // C % tiles, (tl.program_id(0) // C // tiles).to(tl.int64)
    box = boxes + n * 6
    place = places + tl.load(box).to(tl.int64) * 4
    top, left, rows, columns = tl.load(box + 1), tl.load(box + 2), tl.load(box + 3), tl.load(box + 4)
    turn, stride_y, stride_x = tl.load(box + 5), tl.load(place + 2), tl.load(place + 3)
    source = pixels + tl.load(place) + c * tl.load(place + 1) + top * stride_y + left * stride_x

    begin = tile // across * BLOCK
    end = tl.minimum(begin + BLOCK, H)
    i, j = begin + tl.arange(0, BLOCK), tile % across * BLOCK + tl.arange(0, BLOCK)
    mask = (i < H)[:, None] & (j < W)[None, :]
    if (turn & 4) != 0:
        at = _cell(0, i, C, W, PATCH)[:, None] + _cell(j, 0, C, W, PATCH)[None, :]
    else:
        at = _cell(i, 0, C, W, PATCH)[:, None] + _cell(0, j, C, W, PATCH)[None, :]
    i, j = tl.minimum(i, H - 1), tl.minimum(j, W - 1)  # beyond the view: its last pixel again
    if (turn & 1) != 0:
        i, begin, end = H - 1 - i, H - end, H - begin
    if (turn & 2) != 0:
        j = W - 1 - j
    value = _resized(source, stride_y, stride_x, rows, columns, i, j, begin, end, H, W, CUBIC, BLOCK, BLOCK_K)
    plane = PATCH * PATCH if PATCH else H * W  # from a channel to the next, in the result
    _store(room + n * C * H * W + c * plane + at, value, mask, FIXED)
    share = tl.where(c == 0, 0.2989, tl.where(c == 1, 0.587, 0.114)) if RGB else 1.0 / C
    bright = tl.where(mask, _clamp(tl.load(factors + n * 7) * value), 0.0)
    tl.store(sums + tl.program_id(0), share * tl.sum(bright) / (H * W))


@triton.jit
def _hue_channel(h, value, chroma, n):
    k = h + n
    k -= 6 * tl.floor(k * (1 / 6))
    return value - chroma * _clamp(tl.minimum(k, 4 - k))


@triton.jit
def _colored(red, green, blue, row):
    """Apply saturation, hue and gray of a row of `factors`."""
    saturation, shift, is_gray = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4) != 0
    luma = (1 - saturation) * (0.2989 * red + 0.587 * green + 0.114 * blue)
    red, green = _clamp(saturation * red + luma), _clamp(saturation * green + luma)
    blue = _clamp(saturation * blue + luma)
    if shift != 0:
        value = tl.maximum(tl.maximum(red, green), blue)
        chroma = value - tl.minimum(tl.minimum(red, green), blue)
        scale = 1 / tl.maximum(chroma, 1e-12)
        last = tl.where(green == value, (blue - red) * scale + 2, (red - green) * scale + 4)
        h = tl.where(red == value, (green - blue) * scale, last) + 6 * shift
        red, green = _hue_channel(h, value, chroma, 5), _hue_channel(h, value, chroma, 3)
        blue = _hue_channel(h, value, chroma, 1)
    luma = 0.2989 * red + 0.587 * green + 0.114 * blue
    return tl.where(is_gray, luma, red), tl.where(is_gray, luma, green), tl.where(is_gray, luma, blue)


@triton.jit
def _finish(out, x, c, row, mean, std, mask):
    """Solarize, normalize and cast x, and store it in the result."""
    threshold = tl.where(tl.load(row + 6) != 0, 128 / 255, 2.0)  # 2: above all
    x = tl.where(x >= threshold, 1 - x, x)
    x = (x - tl.load(mean + c)) * (1 / tl.load(std + c))
    tl.store(out, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store_color(out, room, x, c, row, mean, std, mask, is_blurred, FIXED: tl.constexpr):
    """Store a colored pixel in the result, or in `room` for the blur."""
    if is_blurred:
        _store(room, x, mask, FIXED)
    else:
        _finish(out, x, c, row, mean, std, mask)


@triton.jit
def _reflected(i, size):
    i = tl.abs(i)
    return tl.where(i < size, i, 2 * (size - 1) - i)


@triton.jit
def color_kernel(
    room, levels, factors, mean, std, out, C, H, W,
    RGB: tl.constexpr, PATCH: tl.constexpr, BLUR: tl.constexpr, FIXED: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Color some pixels of a view; levels: of each view the mean of its luma after brightness."""
    size = H * W
    blocks = tl.cdiv(size, CELLS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    plane = PATCH * PATCH if PATCH else size
    row = factors + n * 7
    b, contrast = tl.load(row), tl.load(row + 1)
    level = (1 - contrast) * tl.load(levels + n)
    is_blurred = tl.load(row + 5) > 0 if BLUR else False

    p = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    mask = p < size
    y, x = _pixel(p, W, PATCH)
    cell = n * C * size + _cell(y, x, C, W, PATCH)
    if RGB:
        red = _clamp(contrast * _clamp(b * _load(room + cell, mask, FIXED)) + level)
        green = _clamp(contrast * _clamp(b * _load(room + plane + cell, mask, FIXED)) + level)
        blue = _clamp(contrast * _clamp(b * _load(room + 2 * plane + cell, mask, FIXED)) + level)
        red, green, blue = _colored(red, green, blue, row)
        _store_color(out + cell, room + cell, red, 0, row, mean, std, mask, is_blurred, FIXED)
        cell += plane
        _store_color(out + cell, room + cell, green, 1, row, mean, std, mask, is_blurred, FIXED)
        cell += plane
        _store_color(out + cell, room + cell, blue, 2, row, mean, std, mask, is_blurred, FIXED)
    else:
        for k in tl.range(0, C):
            value = _clamp(contrast * _clamp(b * _load(room + cell, mask, FIXED)) + level)
            _store_color(out + cell, room + cell, value, k, row, mean, std, mask, is_blurred, FIXED)
            cell += plane


@triton.jit
def blur_kernel(
    source, factors, mean, std, out, C, H, W, half,
    PATCH: tl.constexpr, FIXED: tl.constexpr, FINISH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Blur a tile of a blurred view along columns and store it transposed: planes [H, W] become planes [W, H].

    FINISH: the second time, `source` has whole planes [W, H], and the result is finished. Else it is `room`.
    """
    size = H * W  # of the planes that are read
    LENGTH, WIDTH = (W, H) if FINISH else (H, W)
    across = tl.cdiv(WIDTH, BLOCK_K)
    tiles = tl.cdiv(LENGTH, BLOCK) * across
    c, tile, n = tl.program_id(0) // tiles % C, tl.program_id(0) % tiles, (tl.program_id(0) // tiles // C).to(tl.int64)
    row = factors + n * 7
    sigma, view, plane = tl.load(row + 5), n * C * size, PATCH * PATCH if PATCH else size
    falloff = -0.5 / tl.maximum(sigma * sigma, 1e-12)
    if sigma > 0:
        i, j = tile // across * BLOCK + tl.arange(0, BLOCK), tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (i < LENGTH)[:, None] & (j < WIDTH)[None, :]
        total, weights = tl.zeros((BLOCK, BLOCK_K), tl.float32), 0.0
        for tap in tl.range(-half, half + 1):
            near = _reflected(i + tap, LENGTH)
            if FINISH:
                at = source + view + c * size + (near * WIDTH)[:, None] + j[None, :]
            else:
                at = source + view + c * plane
                at += _cell(near, 0, C, W, PATCH)[:, None] + _cell(0, j, C, W, PATCH)[None, :]
            weight = tl.exp(falloff * (tap * tap))
            total += weight * _load(at, mask, FIXED)
            weights += weight
        total *= 1 / weights
        if FINISH:
            at = out + view + c * plane + _cell(0, i, C, W, PATCH)[:, None] + _cell(j, 0, C, W, PATCH)[None, :]
            _finish(at, total, c, row, mean, std, mask)
        else:
            _store(out + view + c * size + i[:, None] + (j * LENGTH)[None, :], total, mask, FIXED)
