"""Triton kernels of fastflow.ops.conv_block, which states the formulas.

The convolution is a product of tiles of frames and channels, one for each tap and block of input channels; its
transpose, the gradient of x, is the same kernel with the taps reversed.  Products run in the dtype of x, sums in
float32.  GroupNorm counts frames of other tiles, so the convolution leaves the mean of each channel and tile and the
sum of the squared distances from it, which the next kernel combines (Chan, Golub, LeVeque, 1979).  Where GroupNorm
counts padding, ``reach`` frames past a row's end see its last ones; what lies beyond is the bias, and is not computed.
Nothing is atomic: every element has one writer, in a fixed order.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels.half import saturated
from fastflow.ops.conv_block import TAPS, gradient_shapes

# The interpreter multiplies bfloat16 as if its bits were integers; in float32 the products are those of tensor cores.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(math.log2(math.e))
LN2_HIGH = tl.constexpr(0.693359375)  # log(2) = high + low; high has so few bits that its multiples are exact
LN2_LOW = tl.constexpr(math.log(2) - 0.693359375)
LINEAR = tl.constexpr(20.0)  # from here on Mish is the identity

# These change from call to call: a new value must not compile a new kernel.
SIZES = ["batch", "frames", "left", "reach", "tiles", "splits"]

# Tiles by bytes of an element: frames, output channels, input channels of a product, num_warps and num_stages.
CONVOLVE = {2: (64, 64, 64, 4, 3), 4: (32, 64, 16, 4, 2)}
# Of the weight's gradient: output channels, input channels (of each tap), frames, num_warps and num_stages.
WEIGHT = {2: (64, 64, 32, 8, 3), 4: (32, 32, 32, 4, 2)}
SPLITS = 8  # at most so many programs share the frames of a tile of the weight's gradient

# Of the normalisation, whose tiles hold all channels that are normalised together: elements of a tile and num_warps.
GROUP, FRAME = (2048, 4), (4096, 8)
MAX_FRAMES = 64  # of such a tile
# Of the sums over frames: tiles that are read at once, channels, and num_warps.
SUM = {"BLOCK_E": 16, "BLOCK_C": 32, "num_warps": 4, "enable_fp_fusion": True}


# ------------------------------------------------------------------------------------------------ pieces
@triton.jit
def _program(frames, blocks, BLOCK_T: tl.constexpr):
    """Row, tile of frames, its frames and block of this program, in a flat grid: only its x may pass 65535."""
    tiles = tl.cdiv(frames, BLOCK_T)
    program = tl.program_id(0)
    tile = program // blocks % tiles
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    return (program // (blocks * tiles)).to(tl.int64), tile, t, program % blocks


@triton.jit
def _length(lengths_ptr, row, frames):
    if lengths_ptr is None:
        return frames
    else:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + row), 0), frames).to(tl.int32)


@triton.jit
def _active(length, frames, reach):
    """Frames whose y is computed."""
    return tl.where(length > 0, tl.minimum(length + reach, frames), 0)


@triton.jit
def _rest(active, frames, reach):
    """Frames beyond, if GroupNorm counts them: their y is the bias."""
    return tl.where(reach > 0, frames - active, 0)


@triton.jit
def _add_product(x, a, b):
    if INTERPRETED:
        return x + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, x, input_precision="ieee")


@triton.jit
def _exp(x):
    """exp(x), for x up to LINEAR, to a few units in the last place: exp2 of x * log2(e) would lose digits to it."""
    k = tl.floor(x * LOG2_E + 0.5)
    rest = tl.fma(k, -LN2_LOW, tl.fma(k, -LN2_HIGH, x))
    return tl.exp2(rest * LOG2_E) * tl.exp2(k)


@triton.jit
def _mish(x):
    """x n / (n + 2) with n = e (e + 2) and e = exp(x)."""
    e = _exp(tl.where(x > LINEAR, LINEAR, x))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


@triton.jit
def _mish_slope(x):
    """n / (n + 2) + 4 x e (e + 1) / (n + 2)^2"""
    x = tl.where(x > LINEAR, LINEAR, x)
    e = _exp(x)
    n = e * (e + 2.0)
    inverse = 1.0 / (n + 2.0)
    return inverse * (n + 4.0 * x * e * ((e + 1.0) * inverse))


@triton.jit
def _vector(ptr, c, width):
    return tl.load(ptr + c, mask=c < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile(ptr, row, t, c, stop, end, stride_b, stride_t, stride_c):
    """Frames t below ``stop`` and channels c below ``end`` of a row, zero elsewhere."""
    pointers = ptr + row * stride_b + t.to(tl.int64)[:, None] * stride_t + c.to(tl.int64)[None, :] * stride_c
    return tl.load(pointers, mask=(t < stop)[:, None] & (c < end)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, x, row, t, c, stop, end, frames, width):
    """Write frames t below ``stop`` and channels c below ``end`` of a row of a contiguous tensor."""
    offset = (row * frames + t)[:, None] * width + c[None, :]
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=(t < stop)[:, None] & (c < end)[None, :])


@triton.jit
def _store_activated(out_ptr, z, time_ptr, row, t, c, length, end, frames, width):
    """Mish, mask and time bias."""
    out = tl.where((t < length)[:, None], _mish(z), 0.0)
    if time_ptr is not None:
        out += _vector(time_ptr + row * width, c, end)
    out = saturated(out, out_ptr.dtype.element_ty)
    _store(out_ptr, out, row, t, c, frames, end, frames, width)


@triton.jit
def _store_sum(sums_ptr, x, kind, batch, row, tiles, tile, c, end, width):
    """The sum over the tile's frames: of dz, dz * normalised y, dy or the output's gradient, kinds 0 to 3."""
    entry = (kind * batch + row) * tiles + tile
    tl.store(sums_ptr + entry * width + c, tl.sum(x, 0), mask=c < end)


@triton.jit
def _store_time_sum(
    sums_ptr, grad_ptr, batch, row, tiles, tile, t, c, frames, end, width, stride_b, stride_t, stride_c
):
    grad = _tile(grad_ptr, row, t, c, frames, end, stride_b, stride_t, stride_c)  # also on padding
    _store_sum(sums_ptr, grad, 3, batch, row, tiles, tile, c, end, width)


# ------------------------------------------------------------------------------------------------ convolution
@triton.jit(do_not_specialize=SIZES)
def conv_block_convolve_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    moments_ptr,
    lengths_ptr,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_wc,
    stride_wo,
    channels,
    width,
    frames,
    left,
    reach,
    BACKWARD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y from x or, BACKWARD, the gradient of x from dy; what is not computed becomes zero."""
    row, tile, t, block = _program(frames, tl.cdiv(width, BLOCK_O), BLOCK_T)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    length = _length(lengths_ptr, row, frames)
    active = _active(length, frames, reach)
    known = active if BACKWARD else length
    wanted = length if BACKWARD else active

    blocks_c = tl.cdiv(channels, BLOCK_C)
    x_row = x_ptr + row * stride_xb
    product = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for n in range(tl.where(tile * BLOCK_T < wanted, 3 * blocks_c, 0)):
        tap = n % 3
        c = n // 3 * BLOCK_C + tl.arange(0, BLOCK_C)
        s = t + (left - tap if BACKWARD else tap - left)
        x_at = x_row + s.to(tl.int64)[:, None] * stride_xt + c.to(tl.int64)[None, :] * stride_xc
        x = tl.load(x_at, mask=((s >= 0) & (s < known))[:, None] & (c < channels)[None, :], other=0.0)
        w_at = weight_ptr + tap * channels * width + c[:, None] * stride_wc + o[None, :] * stride_wo
        w = tl.load(w_at, mask=(c < channels)[:, None] & (o < width)[None, :], other=0.0)
        product = _add_product(product, x, w)

    inside = (t < wanted)[:, None]
    if not BACKWARD:
        product = saturated(product + _vector(bias_ptr, o, width), out_ptr.dtype.element_ty)
    product = tl.where(inside, product, 0.0)
    _store(out_ptr, product, row, t, o, frames, width, frames, width)
    if moments_ptr is not None:  # of y as it was stored
        y = product.to(out_ptr.dtype.element_ty).to(tl.float32)
        mean = tl.sum(y, 0) / tl.maximum(tl.minimum(wanted - tile * BLOCK_T, BLOCK_T), 1)
        distance = tl.where(inside, y - mean[None, :], 0.0)
        entry = moments_ptr + (row * tl.cdiv(frames, BLOCK_T) + tile) * 2 * width + o
        tl.store(entry, mean, mask=o < width)
        tl.store(entry + width, tl.sum(distance * distance, 0), mask=o < width)


@triton.jit(do_not_specialize=SIZES)
def conv_block_weight_kernel(
    out_ptr,
    dy_ptr,
    x_ptr,
    lengths_ptr,
    stride_xb,
    stride_xt,
    stride_xc,
    channels,
    width,
    batch,
    frames,
    left,
    reach,
    splits,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A part of the weight's gradient [splits, C', C, 3]: of every splits-th tile of frames of all rows."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tiles_o = tl.cdiv(width, BLOCK_O)
    program = tl.program_id(0)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o = program // tiles_c % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    split = program // (tiles_c * tiles_o)

    x_columns = x_ptr + c.to(tl.int64)[None, :] * stride_xc
    first = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    third = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for b in range(batch):
        row = tl.zeros((), tl.int64) + b
        length = _length(lengths_ptr, row, frames)
        active = _active(length, frames, reach)
        for t0 in range(split * BLOCK_T, active, splits * BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            dy_at = dy_ptr + (row * frames + t)[None, :] * width + o[:, None]
            dy = tl.load(dy_at, mask=(t < active)[None, :] & (o < width)[:, None], other=0.0)
            s = t - left
            at = x_columns + row * stride_xb + s.to(tl.int64)[:, None] * stride_xt
            inside = (c < channels)[None, :]
            x = tl.load(at, mask=((s >= 0) & (s < length))[:, None] & inside, other=0.0)
            first = _add_product(first, dy, x)
            x = tl.load(at + stride_xt, mask=((s >= -1) & (s < length - 1))[:, None] & inside, other=0.0)
            second = _add_product(second, dy, x)
            x = tl.load(at + 2 * stride_xt, mask=((s >= -2) & (s < length - 2))[:, None] & inside, other=0.0)
            third = _add_product(third, dy, x)

    out_at = out_ptr + ((split.to(tl.int64) * width + o)[:, None] * channels + c[None, :]) * 3
    inside = (o < width)[:, None] & (c < channels)[None, :]
    tl.store(out_at, first, mask=inside)
    tl.store(out_at + 1, second, mask=inside)
    tl.store(out_at + 2, third, mask=inside)


# ------------------------------------------------------------------------------------------------ GroupNorm
@triton.jit
def _merge_moments(
    moments_ptr, bias_ptr, row, c, end, width, tiles, active, rest, count, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """Mean and variance of the channels c below ``end``: of the tiles' y, and of ``rest`` frames that are the bias."""
    channels = (c < end)[None, :]
    bias = _vector(bias_ptr, c, end)
    total = tl.where(tl.arange(0, BLOCK)[:, None] == 0, bias * rest, 0.0)
    for tile0 in range(0, tl.cdiv(active, TILE), BLOCK):
        tile = (tile0 + tl.arange(0, BLOCK))[:, None]
        frames = tl.minimum(active - tile * TILE, TILE)
        at = moments_ptr + (row * tiles + tile) * 2 * width + c[None, :]
        total += tl.load(at, mask=(frames > 0) & channels, other=0.0) * frames
    mean = tl.sum(total) / count

    of_bias = bias - mean
    squares = tl.where((tl.arange(0, BLOCK)[:, None] == 0) & channels, of_bias * of_bias * rest, 0.0)
    for tile0 in range(0, tl.cdiv(active, TILE), BLOCK):
        tile = (tile0 + tl.arange(0, BLOCK))[:, None]
        frames = tl.minimum(active - tile * TILE, TILE)
        inside = (frames > 0) & channels
        at = moments_ptr + (row * tiles + tile) * 2 * width + c[None, :]
        distance = tl.load(at, mask=inside, other=0.0) - mean
        within = tl.load(at + width, mask=inside, other=0.0)
        squares += tl.where(inside, within + distance * distance * frames, 0.0)
    return mean, tl.sum(squares) / count


@triton.jit(do_not_specialize=SIZES)
def conv_block_normalise_groups_kernel(
    out_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    moments_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    time_ptr,
    lengths_ptr,
    groups,
    size,
    eps,
    frames,
    reach,
    tiles,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    width = groups * size
    row, slab, t, group = _program(frames, groups, BLOCK_T)
    c = group * size + tl.arange(0, BLOCK_C)
    end = group * size + size
    length = _length(lengths_ptr, row, frames)
    active = _active(length, frames, reach)
    rest = _rest(active, frames, reach)
    count = tl.maximum((active + rest) * size, 1).to(tl.float32)
    mean, variance = _merge_moments(
        moments_ptr, bias_ptr, row, c, end, width, tiles, active, rest, count, TILE, BLOCK_T
    )
    rstd = 1.0 / tl.sqrt(variance + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row * groups + group, mean, mask=slab == 0)
        tl.store(rstd_ptr + row * groups + group, rstd, mask=slab == 0)
    y = _tile(y_ptr, row, t, c, length, end, frames * width, width, 1)
    z = (y - mean) * (rstd * _vector(scale_ptr, c, end)) + _vector(shift_ptr, c, end)
    _store_activated(out_ptr, z, time_ptr, row, t, c, length, end, frames, width)


@triton.jit(do_not_specialize=SIZES)
def conv_block_differentiate_groups_kernel(
    sums_ptr,
    group_sums_ptr,
    grad_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    shift_ptr,
    lengths_ptr,
    stride_gb,
    stride_gt,
    stride_gc,
    groups,
    size,
    batch,
    frames,
    tiles,
    TIME: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over a tile's frames, and [B, groups, tiles, 2]: over its channels too, of h and h * normalised y."""
    width = groups * size
    row, tile, t, group = _program(frames, groups, BLOCK_T)
    c = group * size + tl.arange(0, BLOCK_C)
    end = group * size + size
    length = _length(lengths_ptr, row, frames)
    mean = tl.load(mean_ptr + row * groups + group)
    rstd = tl.load(rstd_ptr + row * groups + group)
    scale = _vector(scale_ptr, c, end)
    x = (_tile(y_ptr, row, t, c, length, end, frames * width, width, 1) - mean) * rstd
    grad = _tile(grad_ptr, row, t, c, length, end, stride_gb, stride_gt, stride_gc)
    dz = grad * _mish_slope(x * scale + _vector(shift_ptr, c, end))
    _store_sum(sums_ptr, dz, 0, batch, row, tiles, tile, c, end, width)
    _store_sum(sums_ptr, dz * x, 1, batch, row, tiles, tile, c, end, width)
    entry = group_sums_ptr + ((row * groups + group) * tiles + tile) * 2
    tl.store(entry, tl.sum(dz * scale))
    tl.store(entry + 1, tl.sum(dz * scale * x))
    if TIME:
        _store_time_sum(
            sums_ptr, grad_ptr, batch, row, tiles, tile, t, c, frames, end, width, stride_gb, stride_gt, stride_gc
        )


@triton.jit(do_not_specialize=SIZES)
def conv_block_centre_groups_kernel(
    dy_ptr,
    sums_ptr,
    group_sums_ptr,
    grad_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    lengths_ptr,
    stride_gb,
    stride_gt,
    stride_gc,
    groups,
    size,
    batch,
    frames,
    reach,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    width = groups * size
    row, tile, t, group = _program(frames, groups, BLOCK_T)
    c = group * size + tl.arange(0, BLOCK_C)
    end = group * size + size
    length = _length(lengths_ptr, row, frames)
    active = _active(length, frames, reach)
    rest = _rest(active, frames, reach)
    mean = tl.load(mean_ptr + row * groups + group)
    rstd = tl.load(rstd_ptr + row * groups + group)

    total = tl.zeros([BLOCK_T], tl.float32)
    total_x = tl.zeros([BLOCK_T], tl.float32)
    for tile0 in range(0, tl.cdiv(length, BLOCK_T), BLOCK_T):
        entry = tile0 + tl.arange(0, BLOCK_T)
        at = group_sums_ptr + ((row * groups + group) * tiles + entry) * 2
        total += tl.load(at, mask=entry < tiles, other=0.0)
        total_x += tl.load(at + 1, mask=entry < tiles, other=0.0)
    count = tl.maximum((active + rest) * size, 1).to(tl.float32)
    mean_h = tl.sum(total) / count
    mean_hx = tl.sum(total_x) / count

    scale = _vector(scale_ptr, c, end)
    x = (_tile(y_ptr, row, t, c, active, end, frames * width, width, 1) - mean) * rstd
    grad = _tile(grad_ptr, row, t, c, length, end, stride_gb, stride_gt, stride_gc)
    h = grad * _mish_slope(x * scale + _vector(shift_ptr, c, end)) * scale
    dy = tl.where((t < active)[:, None], (h - mean_h - x * mean_hx) * rstd, 0.0)
    _store(dy_ptr, dy, row, t, c, active, end, frames, width)
    x = (_vector(bias_ptr, c, end) - mean) * rstd  # of the frames that are the bias, where h = 0
    dy_rest = -(mean_h + x * mean_hx) * rstd * rest
    dy += tl.where((t == 0)[:, None], dy_rest, 0.0)
    _store_sum(sums_ptr, dy, 2, batch, row, tiles, tile, c, end, width)


# ------------------------------------------------------------------------------------------------ LayerNorm
@triton.jit(do_not_specialize=SIZES)
def conv_block_normalise_frames_kernel(
    out_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    scale_ptr,
    shift_ptr,
    time_ptr,
    lengths_ptr,
    width,
    eps,
    frames,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, _, t, _ = _program(frames, 1, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    length = _length(lengths_ptr, row, frames)
    y = _tile(y_ptr, row, t, c, length, width, frames * width, width, 1)
    mean = tl.sum(y, 1) / width
    x = tl.where((c < width)[None, :], y - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row * frames + t, mean, mask=t < frames)
        tl.store(rstd_ptr + row * frames + t, tl.where(t < length, rstd, 0.0), mask=t < frames)
    z = x * rstd[:, None] * _vector(scale_ptr, c, width) + _vector(shift_ptr, c, width)
    _store_activated(out_ptr, z, time_ptr, row, t, c, length, width, frames, width)


@triton.jit(do_not_specialize=SIZES)
def conv_block_differentiate_frames_kernel(
    dy_ptr,
    sums_ptr,
    grad_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    shift_ptr,
    lengths_ptr,
    stride_gb,
    stride_gt,
    stride_gc,
    width,
    batch,
    frames,
    tiles,
    TIME: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, tile, t, _ = _program(frames, 1, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    length = _length(lengths_ptr, row, frames)
    mean = tl.load(mean_ptr + row * frames + t, mask=t < length, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + row * frames + t, mask=t < length, other=0.0)[:, None]
    scale = _vector(scale_ptr, c, width)
    y = _tile(y_ptr, row, t, c, length, width, frames * width, width, 1)
    x = tl.where((c < width)[None, :], (y - mean) * rstd, 0.0)
    grad = _tile(grad_ptr, row, t, c, length, width, stride_gb, stride_gt, stride_gc)
    dz = grad * _mish_slope(x * scale + _vector(shift_ptr, c, width))
    h = dz * scale
    mean_h = tl.sum(h, 1)[:, None] / width
    mean_hx = tl.sum(h * x, 1)[:, None] / width
    dy = (h - mean_h - x * mean_hx) * rstd
    _store(dy_ptr, dy, row, t, c, length, width, frames, width)
    _store_sum(sums_ptr, dz, 0, batch, row, tiles, tile, c, width, width)
    _store_sum(sums_ptr, dz * x, 1, batch, row, tiles, tile, c, width, width)
    _store_sum(sums_ptr, dy, 2, batch, row, tiles, tile, c, width, width)
    if TIME:
        _store_time_sum(
            sums_ptr, grad_ptr, batch, row, tiles, tile, t, c, frames, width, width, stride_gb, stride_gt, stride_gc
        )


# ------------------------------------------------------------------------------------------------ sums
@triton.jit
def _store_total(ptr, sums_ptr, first, count, c, width, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of ``count`` tiles from ``first``."""
    if ptr is not None:
        total = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
        for e0 in range(0, count, BLOCK_E):
            e = e0 + tl.arange(0, BLOCK_E)
            at = sums_ptr + (first + e)[:, None] * width + c[None, :]
            total += tl.load(at, mask=(e < count)[:, None] & (c < width)[None, :], other=0.0)
        tl.store(ptr + c, tl.sum(total, 0).to(ptr.dtype.element_ty), mask=c < width)


@triton.jit(do_not_specialize=SIZES)
def conv_block_sums_kernel(
    grad_bias_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    grad_time_ptr,
    sums_ptr,
    width,
    batch,
    tiles,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients that are sums over frames: a program for the channels of each row, and one for those of all."""
    blocks = tl.cdiv(width, BLOCK_C)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    entries = batch.to(tl.int64) * tiles  # of a kind
    if row == batch:
        _store_total(grad_shift_ptr, sums_ptr, 0, entries, c, width, BLOCK_E, BLOCK_C)
        _store_total(grad_scale_ptr, sums_ptr, entries, entries, c, width, BLOCK_E, BLOCK_C)
        _store_total(grad_bias_ptr, sums_ptr, 2 * entries, entries, c, width, BLOCK_E, BLOCK_C)
    elif grad_time_ptr is not None:
        first = 3 * entries + row * tiles
        _store_total(grad_time_ptr + row * width, sums_ptr, first, tiles, c, width, BLOCK_E, BLOCK_C)


# ------------------------------------------------------------------------------------------------ launchers
def _tile_of(channels: int, groups: int) -> dict[str, Any]:
    """The tile of the normalisation of so many channels together."""
    elements, num_warps = GROUP if groups else FRAME
    block_c = triton.next_power_of_2(channels)
    block_t = max(min(elements // block_c, MAX_FRAMES), 1)
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": num_warps, "enable_fp_fusion": True}


def _convolve(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    moments: Tensor | None,
    lengths: Tensor | None,
    reach: tuple[int, int],
    out: Tensor,
) -> None:
    """Of x, or without a bias backwards, of dy; ``packed`` is the weight as [3, C', C]."""
    batch, frames, channels = x.shape
    width = out.shape[2]
    backward = bias is None
    weight_strides = packed.stride()[1:] if backward else packed.stride()[:0:-1]
    block_t, block_o, block_c, num_warps, num_stages = CONVOLVE[x.element_size()]
    grid = (batch * triton.cdiv(frames, block_t) * triton.cdiv(width, block_o),)
    conv_block_convolve_kernel[grid](
        out, x, packed, bias, moments, lengths, *x.stride(), *weight_strides, channels, width, frames, *reach,
        BACKWARD=backward, BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_C=block_c, num_warps=num_warps,
        num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _reach(groups: int, causal: bool, exact: bool) -> tuple[int, int]:
    """Frames of x that a frame sees to its left, and frames past a row's end whose y is computed."""
    left = TAPS - 1 if causal else TAPS // 2
    return left, left if groups and not exact else 0


def _pack(weight: Tensor) -> Tensor:
    """[3, C', C], so that neighbouring threads read neighbouring elements."""
    return weight.permute(2, 0, 1).contiguous()


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lengths: Tensor | None,
    time_bias: Tensor | None,
    groups: int,
    causal: bool,
    exact: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernels; arguments and results are those of the op ``fastflow::conv_block``."""
    batch, frames, _ = x.shape
    width = weight.shape[0]
    out = x.new_empty((batch, frames, width))
    y = x.new_empty((batch, frames, width) if save else (0,))
    statistics = (batch, groups or frames) if save else (0,)
    mean, rstd = (x.new_empty(statistics, dtype=torch.float32) for _ in range(2))
    if not out.numel():
        return out, y, mean.zero_(), rstd.zero_()
    where = y if save else out  # of y
    saved = (mean, rstd) if save else (None, None)
    bias, scale, shift = (v.contiguous() for v in (bias, norm_weight, norm_bias))
    time_bias = None if time_bias is None else time_bias.contiguous()
    tile = CONVOLVE[x.element_size()][0]
    tiles = triton.cdiv(frames, tile)
    moments = x.new_empty((batch, tiles, 2, width), dtype=torch.float32) if groups else None
    reach = _reach(groups, causal, exact)
    config = _tile_of(width // (groups or 1), groups)
    with torch.cuda.device_of(x):
        _convolve(x, _pack(weight), bias, moments, lengths, reach, where)
        if groups:
            conv_block_normalise_groups_kernel[(batch * triton.cdiv(frames, config["BLOCK_T"]) * groups,)](
                out, *saved, where, moments, bias, scale, shift, time_bias, lengths, groups, width // groups, eps,
                frames, reach[1], tiles, TILE=tile, **config,
            )  # fmt: skip
        else:
            conv_block_normalise_frames_kernel[(batch * triton.cdiv(frames, config["BLOCK_T"]),)](
                out, *saved, where, scale, shift, time_bias, lengths, width, eps, frames, **config,
            )  # fmt: skip
    return out, y, mean, rstd


def _differentiate(
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor | None,
    groups: int,
    reach: int,
    time: bool,
) -> tuple[Tensor, Tensor]:
    """dy, which holds anything where it is not computed, and the sums [4, B, tiles, C'] of ``_store_sum``."""
    batch, frames, width = grad.shape
    size = width // (groups or 1)
    config = _tile_of(size, groups)
    tiles = triton.cdiv(frames, config["BLOCK_T"])
    dy = grad.new_empty(grad.shape)
    sums = grad.new_empty((4, batch, tiles, width), dtype=torch.float32)
    bias, scale, shift = parameters
    if not groups:
        conv_block_differentiate_frames_kernel[(batch * tiles,)](
            dy, sums, grad, *saved, scale, shift, lengths, *grad.stride(), width, batch, frames, tiles, TIME=time,
            **config,
        )  # fmt: skip
        return dy, sums
    group_sums = grad.new_empty((batch, groups, tiles, 2), dtype=torch.float32)
    conv_block_differentiate_groups_kernel[(batch * tiles * groups,)](
        sums, group_sums, grad, *saved, scale, shift, lengths, *grad.stride(), groups, size, batch, frames, tiles,
        TIME=time, **config,
    )  # fmt: skip
    conv_block_centre_groups_kernel[(batch * tiles * groups,)](
        dy, sums, group_sums, grad, *saved, bias, scale, shift, lengths, *grad.stride(), groups, size, batch, frames,
        reach, tiles, **config,
    )  # fmt: skip
    return dy, sums


def _grad_weight(dy: Tensor, x: Tensor, lengths: Tensor | None, reach: tuple[int, int]) -> Tensor:
    batch, frames, channels = x.shape
    width = dy.shape[2]
    block_o, block_c, block_t, num_warps, num_stages = WEIGHT[x.element_size()]
    splits = min(SPLITS, triton.cdiv(frames, 2 * block_t))
    parts = x.new_empty((splits, width, channels, TAPS), dtype=torch.float32)
    conv_block_weight_kernel[(splits * triton.cdiv(width, block_o) * triton.cdiv(channels, block_c),)](
        parts, dy, x, lengths, *x.stride(), channels, width, batch, frames, *reach, splits,
        BLOCK_O=block_o, BLOCK_C=block_c, BLOCK_T=block_t, num_warps=num_warps, num_stages=num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return parts.sum(0).to(x.dtype)


def conv_block_backward(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lengths: Tensor | None,
    groups: int,
    causal: bool,
    exact: bool,
    eps: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; arguments and results are those of the op ``fastflow::conv_block_backward``."""
    batch, width = x.shape[0], weight.shape[0]
    grads = [x.new_empty(shape) for shape in gradient_shapes(x, weight, wanted)]
    if not grad.numel():
        return tuple(g.zero_() for g in grads)
    reach = _reach(groups, causal, exact)
    parameters = bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    with torch.cuda.device_of(x):
        dy, sums = _differentiate(grad, (y, mean, rstd), parameters, lengths, groups, reach[1], bool(wanted >> 5))
        if wanted >> 2:
            pointers = (g if wanted >> n & 1 else None for n, g in enumerate(grads))
            conv_block_sums_kernel[((batch + 1) * triton.cdiv(width, SUM["BLOCK_C"]),)](
                *list(pointers)[2:], sums, width, batch, sums.shape[2], **SUM
            )
        if wanted & 1:
            _convolve(dy, _pack(weight), None, None, lengths, reach, grads[0])
        if wanted & 2:
            grads[1] = _grad_weight(dy, x, lengths, reach)
    return tuple(grads)
