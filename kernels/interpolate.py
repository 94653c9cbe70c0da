"""Triton kernels of fastflow.ops.interpolate, which states the formula.

Positions are rounded where F.interpolate rounds them: the ratio is an IEEE division, ``src`` one fused multiply-add.
Every multiply-add is written out and the compiler may fuse no other (``enable_fp_fusion=False``), so the kernels
compute the same bits on every architecture and in the interpreter; in float32 they are those of F.interpolate on a CPU.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile of frames x channels, for every dtype and architecture.
FORWARD = {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4, "enable_fp_fusion": False}
BACKWARD = {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4, "enable_fp_fusion": False}

# These change from call to call: a new value must not compile a new kernel.
LENGTHS = ["in_frames", "frames", "per_row", "s0", "d0", "s1", "d1", "s2", "d2", "s3", "d3"]


@triton.jit
def _tile(frames, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row, frames [BLOCK_T] and channels [BLOCK_C] of this program, in a flat grid: only its x may pass 65535."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tiles_t = tl.cdiv(frames, BLOCK_T)
    program = tl.program_id(0)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    t = program // tiles_c % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)
    return (program // (tiles_c * tiles_t)).to(tl.int64), t, c.to(tl.int64)


@triton.jit
def _lengths(rows_ptr, row, per_row, k, src_len, dst_len, src_left):
    """Lengths of segment k of a row: the shared ones given, or those of the table; the source ends with the row."""
    if rows_ptr is not None:
        pair = rows_ptr + (row * per_row + k) * 2
        src_len = tl.load(pair, mask=k < per_row, other=0)
        dst_len = tl.load(pair + 1, mask=k < per_row, other=0)
    src_len = tl.minimum(tl.maximum(src_len, 0), src_left).to(tl.int32)
    return src_len, tl.maximum(dst_len, 0)


@triton.jit
def _ratio(src_len, dst_len, wide: tl.constexpr):
    """src_len / dst_len in IEEE division: `/` on float32 is an approximation on a GPU."""
    dst_len = tl.maximum(dst_len, 1).to(wide)
    if wide == tl.float64:
        return src_len.to(wide) / dst_len
    else:
        return tl.div_rn(src_len.to(wide), dst_len)


@triton.jit
def _source(j, ratio, last, wide: tl.constexpr):
    """Indices i0, i1 and weight w of output frame j of a segment whose input frames end with ``last``."""
    src = tl.maximum(tl.fma(j.to(wide) + 0.5, ratio, -0.5), 0.0)
    i0 = tl.minimum(src.to(tl.int32), last)
    return i0, tl.minimum(i0 + 1, last), src - i0.to(wide)


@triton.jit(do_not_specialize=LENGTHS)
def interpolate_forward_kernel(
    out_ptr,
    x_ptr,
    rows_ptr,
    channels,
    stride_xb,
    stride_xt,
    stride_xc,
    in_frames,
    frames,
    per_row,
    s0,
    d0,
    s1,
    d1,
    s2,
    d2,
    s3,
    d3,
    CHANNELS_FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row, t, c = _tile(frames, channels, BLOCK_T, BLOCK_C)

    # the segment of each output frame: its first input frame, its last one counted from there, its ratio
    shared = ((s0, d0), (s1, d1), (s2, d2), (s3, d3))
    src_start = tl.zeros((), tl.int32)
    dst_start = tl.zeros((), tl.int32)
    first = tl.zeros([BLOCK_T], tl.int32)
    last = tl.full([BLOCK_T], -1, tl.int32)
    ratio = tl.zeros([BLOCK_T], wide)
    j = tl.zeros([BLOCK_T], tl.int32)
    for k in tl.static_range(4):
        src_len, dst_len = _lengths(rows_ptr, row, per_row, k, shared[k][0], shared[k][1], in_frames - src_start)
        dst_stop = dst_start + tl.minimum(dst_len, frames - dst_start).to(tl.int32)
        inside = (t >= dst_start) & (t < dst_stop)
        first = tl.where(inside, src_start, first)
        last = tl.where(inside, src_len - 1, last)
        ratio = tl.where(inside, _ratio(src_len, dst_len, wide), ratio)
        j = tl.where(inside, t - dst_start, j)
        src_start += src_len
        dst_start = dst_stop

    i0, i1, w = _source(j, ratio, last, wide)
    w = w[:, None]
    x_row = x_ptr + row * stride_xb + c[None, :] * stride_xc
    filled = (last >= 0)[:, None] & (c < channels)[None, :]
    left = tl.load(x_row + (first + i0).to(tl.int64)[:, None] * stride_xt, mask=filled, other=0.0).to(wide)
    right = tl.load(x_row + (first + i1).to(tl.int64)[:, None] * stride_xt, mask=filled, other=0.0).to(wide)
    out = tl.fma(1.0 - w, left, w * right)

    if CHANNELS_FIRST:
        offset = c[None, :] * frames + t[:, None]
    else:
        offset = t.to(tl.int64)[:, None] * channels + c[None, :]
    written = (t < frames)[:, None] & (c < channels)[None, :]
    tl.store(out_ptr + row * frames * channels + offset, out.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=LENGTHS)
def interpolate_backward_kernel(
    out_ptr,
    grad_ptr,
    rows_ptr,
    channels,
    stride_gb,
    stride_gt,
    stride_gc,
    in_frames,
    frames,
    per_row,
    s0,
    d0,
    s1,
    d1,
    s2,
    d2,
    s3,
    d3,
    T_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    row, t, c = _tile(in_frames, channels, BLOCK_T, BLOCK_C)

    # The segment of each input frame i: its first output frame, and the output frames [begin, end) that may read i.
    # Output frame j reads input frames floor(src) and floor(src) + 1, so i is read where i - 1 <= src < i + 1.  Solved
    # for j this bounds the search; the slack covers the rounding, and the exact weights below decide.
    shared = ((s0, d0), (s1, d1), (s2, d2), (s3, d3))
    src_start = tl.zeros((), tl.int32)
    dst_start = tl.zeros((), tl.int32)
    first = tl.zeros([BLOCK_T], tl.int32)
    last = tl.zeros([BLOCK_T], tl.int32)
    ratio = tl.zeros([BLOCK_T], wide)
    i = tl.zeros([BLOCK_T], tl.int32)
    begin = tl.zeros([BLOCK_T], tl.int32)
    end = tl.zeros([BLOCK_T], tl.int32)
    for k in tl.static_range(4):
        src_len, dst_len = _lengths(rows_ptr, row, per_row, k, shared[k][0], shared[k][1], in_frames - src_start)
        dst_cut = tl.minimum(dst_len, frames - dst_start).to(tl.int32)
        inside = (t >= src_start) & (t < src_start + src_len)
        first = tl.where(inside, dst_start, first)
        last = tl.where(inside, src_len - 1, last)
        ratio = tl.where(inside, _ratio(src_len, dst_len, wide), ratio)
        i = tl.where(inside, t - src_start, i)
        stretch = dst_len.to(tl.float32) / tl.maximum(src_len, 1).to(tl.float32)
        slack = 0.0625 + dst_len.to(tl.float32) * 2.0**-20
        low = (i.to(tl.float32) - 0.5) * stretch - 0.5 - slack
        high = (i.to(tl.float32) + 1.5) * stretch + 0.5 + slack
        begin = tl.where(inside, tl.clamp(low, 0.0, 2.0**30).to(tl.int32), begin)
        end = tl.where(inside, tl.minimum(tl.minimum(high, 2.0**30).to(tl.int32), dst_cut), end)
        src_start += src_len
        dst_start += dst_cut

    # frames lie along dimension T_DIM of the tile, so that neighbouring threads read neighbouring elements
    c = tl.expand_dims(c, T_DIM)
    g_row = grad_ptr + row * stride_gb + c * stride_gc
    total = tl.zeros([BLOCK_C, BLOCK_T] if T_DIM else [BLOCK_T, BLOCK_C], wide)
    for n in range(tl.max(end - begin, axis=0)):
        j = begin + n
        i0, i1, w = _source(j, ratio, last, wide)
        weight = tl.where(i0 == i, 1.0 - w, 0.0) + tl.where(i1 == i, w, 0.0)
        read = tl.expand_dims((j < end) & (weight != 0.0), 1 - T_DIM) & (c < channels)
        at = tl.expand_dims((first + j).to(tl.int64), 1 - T_DIM) * stride_gt
        g = tl.load(g_row + at, mask=read, other=0.0).to(wide)
        total = tl.fma(tl.expand_dims(weight, 1 - T_DIM), g, total)

    t = tl.expand_dims(t.to(tl.int64), 1 - T_DIM)
    offset = row * in_frames * channels + t * channels + c
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=(t < in_frames) & (c < channels))


def _grid(batch: int, frames: int, channels: int, config: dict[str, int]) -> tuple[int]:
    return (batch * triton.cdiv(frames, config["BLOCK_T"]) * triton.cdiv(channels, config["BLOCK_C"]),)


def _segment_arguments(rows: Tensor | None, shared: Sequence[int]) -> tuple[Tensor | None, int, list[int]]:
    """The row table and its segments per row, and the shared lengths padded to four pairs."""
    if rows is None:
        return None, 0, [*shared, *(0,) * (8 - len(shared))]
    return rows.contiguous(), rows.shape[1], [0] * 8


def interpolate_forward(
    x: Tensor, rows: Tensor | None, shared: Sequence[int], frames: int, channels_first: bool
) -> Tensor:
    """Launch the forward kernel.

    Args:
        x: ``[B, T, C]`` of any strides.
        rows: segments of each row, int64 ``[B, S, 2]`` of (input, output) frames, or None for ``shared``.
        shared: segments of all rows, ``(s_0, d_0, s_1, d_1, ...)``.
        frames: output frames.
        channels_first: whether the result is ``[B, C, frames]`` instead of ``[B, frames, C]``.
    """
    batch, in_frames, channels = x.shape
    out = x.new_empty((batch, channels, frames) if channels_first else (batch, frames, channels))
    if out.numel():
        rows, per_row, lengths = _segment_arguments(rows, shared)
        with torch.cuda.device_of(x):
            interpolate_forward_kernel[_grid(batch, frames, channels, FORWARD)](
                out, x, rows, channels, *x.stride(), in_frames, frames, per_row, *lengths,
                CHANNELS_FIRST=channels_first, **FORWARD,
            )  # fmt: skip
    return out


def interpolate_backward(
    grad: Tensor, rows: Tensor | None, shared: Sequence[int], in_frames: int, channels_first: bool
) -> Tensor:
    """Launch the backward kernel: the gradient ``[B, in_frames, C]`` of x from that of the output, of any strides."""
    if channels_first:
        grad = grad.transpose(1, 2)
    batch, frames, channels = grad.shape
    out = grad.new_empty((batch, in_frames, channels))
    if out.numel():
        rows, per_row, lengths = _segment_arguments(rows, shared)
        with torch.cuda.device_of(grad):
            interpolate_backward_kernel[_grid(batch, in_frames, channels, BACKWARD)](
                out, grad, rows, channels, *grad.stride(), in_frames, frames, per_row, *lengths,
                T_DIM=int(grad.stride(1) < grad.stride(2)), **BACKWARD,
            )  # fmt: skip
    return out
