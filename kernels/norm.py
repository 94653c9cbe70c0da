"""Triton kernels of fastflow.ops.norm, which states the formula.

A program holds whole frames of one row in registers: reads them once, and forms mean and variance one after the other,
as the difference of two large sums would lose digits.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels.half import saturated
from fastflow.ops.norm import CHUNK

# By the largest number of channels they are for: frames of a tile, and num_warps, which float64 gets twice.
CONFIGS = {256: (8, 4), 512: (4, 4), 1024: (2, 4), 2048: (1, 4), 4096: (1, 8), 8192: (1, 16)}

# These change from call to call: a new value must not compile a new kernel.
LENGTHS = ["batch", "frames"]


@triton.jit
def _vector(ptr, row, stride, c, channels, otherwise: tl.constexpr, wide: tl.constexpr):
    """Scale or shift [1, BLOCK_C] of a row; its stride is 0 where it holds for all."""
    if ptr is None:
        return otherwise
    else:
        return tl.load(ptr + row * stride + c, mask=c < channels, other=0.0).to(wide)[None, :]


@triton.jit(do_not_specialize=LENGTHS)
def norm_forward_kernel(
    out_ptr,
    stats_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    channels,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_scale,
    stride_shift,
    batch,
    frames,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(frames, BLOCK_T)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = (t < frames)[:, None] & (c < channels)[None, :]

    pointers = x_ptr + row * stride_xb + t[:, None] * stride_xt + c.to(tl.int64)[None, :] * stride_xc
    x = tl.load(pointers, mask=inside, other=0.0).to(wide)
    mean = tl.sum(x, 1) / channels
    x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / channels + EPS)
    out = x * rstd[:, None] * _vector(scale_ptr, row, stride_scale, c, channels, 1.0, wide)
    out += _vector(shift_ptr, row, stride_shift, c, channels, 0.0, wide)

    frame = row * frames + t
    out = saturated(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + frame[:, None] * channels + c[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(stats_ptr + frame, mean, mask=t < frames)
    tl.store(stats_ptr + batch.to(tl.int64) * frames + frame, rstd, mask=t < frames)


@triton.jit(do_not_specialize=LENGTHS)
def norm_backward_kernel(
    grad_x_ptr,
    normalised_ptr,
    sums_ptr,
    grad_ptr,
    x_ptr,
    stats_ptr,
    scale_ptr,
    shift_ptr,
    grad_residual_ptr,
    channels,
    stride_scale,
    stride_shift,
    batch,
    frames,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x = (g - mean(g) - xhat mean(g xhat)) / deviation with g = grad * scale and the means over channels."""
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    chunks = tl.cdiv(frames, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * CHUNK
    c = tl.arange(0, BLOCK_C)
    scale = _vector(scale_ptr, row, stride_scale, c, channels, 1.0, wide)
    shift = _vector(shift_ptr, row, stride_shift, c, channels, 0.0, wide)

    scale_sums = tl.zeros([BLOCK_T, BLOCK_C], wide)
    shift_sums = tl.zeros([BLOCK_T, BLOCK_C], wide)
    for t0 in range(begin, tl.minimum(begin + CHUNK, frames), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = (t < frames)[:, None] & (c < channels)[None, :]
        frame = row * frames + t
        offset = frame[:, None] * channels + c[None, :]
        mean = tl.load(stats_ptr + frame, mask=t < frames, other=0.0)
        rstd = tl.load(stats_ptr + batch.to(tl.int64) * frames + frame, mask=t < frames, other=0.0)[:, None]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(wide)
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(wide)
        xhat = tl.where(inside, (x - mean[:, None]) * rstd, 0.0)
        scale_sums += grad * xhat
        shift_sums += grad
        normalised = saturated(xhat * scale + shift, normalised_ptr.dtype.element_ty)
        tl.store(normalised_ptr + offset, normalised.to(normalised_ptr.dtype.element_ty), mask=inside)

        g = grad * scale
        constant = tl.sum(g, 1) / channels
        along = tl.sum(g * xhat, 1) / channels
        grad_x = (g - constant[:, None] - xhat * along[:, None]) * rstd
        if grad_residual_ptr is not None:
            grad_x += tl.load(grad_residual_ptr + offset, mask=inside, other=0.0).to(wide)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)

    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(sums, tl.sum(scale_sums, 0), mask=c < channels)
    tl.store(sums + channels, tl.sum(shift_sums, 0), mask=c < channels)


# ------------------------------------------------------------------------------------------------ launchers
def _config(x: Tensor) -> dict[str, int]:
    block_c = max(16, triton.next_power_of_2(x.shape[2]))
    block_t, num_warps = CONFIGS[next((most for most in CONFIGS if most >= block_c), max(CONFIGS))]
    num_warps *= 2 if x.dtype == torch.float64 else 1
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": num_warps, "enable_fp_fusion": True}


def _vectors(*vectors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """``[C]`` or ``[B, C]`` each, with contiguous channels, and their strides from row to row."""
    dense = [p if p is None or p.stride(-1) == 1 else p.contiguous() for p in vectors]
    return dense, [p.stride(0) if p is not None and p.dim() == 2 else 0 for p in dense]


def norm_forward(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        x: ``[B, T, C]`` of any strides.
        scale, shift: ``[C]`` or ``[B, C]``; None for 1 and 0.
        eps: added to the variance.
        dtype: of the result; None for that of x.

    Returns:
        The normalised x, contiguous, and mean and 1 / deviation, ``[2, B, T]``.
    """
    batch, frames, channels = x.shape
    out = x.new_empty((batch, frames, channels), dtype=dtype)
    stats = x.new_empty((2, batch, frames), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if out.numel():
        config = _config(x)
        vectors, strides = _vectors(scale, shift)
        with torch.cuda.device_of(x):
            norm_forward_kernel[(batch * triton.cdiv(frames, config["BLOCK_T"]),)](
                out, stats, x, *vectors, channels, *x.stride(), *strides, batch, frames, EPS=eps, **config
            )
    return out, stats


def norm_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    grad_residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel on contiguous ``[B, T, C]``.

    Returns:
        The gradient of x, the normalised x again, in the dtype of ``grad``, and ``[B, chunks, 2, C]``, the sums over
        CHUNK frames of grad * (x - mean) / deviation and of grad, in the dtype of ``stats``.
    """
    batch, frames, channels = x.shape
    chunks = triton.cdiv(frames, CHUNK)
    grad_x = x.new_empty((batch, frames, channels))
    normalised = grad.new_empty((batch, frames, channels))
    sums = stats.new_empty((batch, chunks, 2, channels))
    if grad_x.numel():
        vectors, strides = _vectors(scale, shift)
        with torch.cuda.device_of(x):
            norm_backward_kernel[(batch * chunks,)](
                grad_x, normalised, sums, grad, x, stats, *vectors, grad_residual, channels, *strides, batch, frames,
                CHUNK=CHUNK, **_config(x),
            )  # fmt: skip
    return grad_x, normalised, sums
