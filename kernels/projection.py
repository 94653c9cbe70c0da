"""Triton kernels of fastflow.ops.projection: what follows its product, which is cuBLAS's."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels.half import saturated

# Tile of frames x channels.
RESIDUAL = {"BLOCK_T": 16, "BLOCK_C": 128, "num_warps": 4, "enable_fp_fusion": True}
# num_warps by the largest number of input channels, all of which a program of gate_backward holds.
GATE_WARPS = {512: 2, 1024: 4, 4096: 8, 8192: 16}


@triton.jit(do_not_specialize=["frames"])
def gated_residual_kernel(
    out_ptr,
    y_ptr,
    residual_ptr,
    gate_ptr,
    channels,
    stride_rb,
    stride_rt,
    stride_rc,
    stride_gate,
    frames,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = residual + gate[:, None] * y"""
    wide: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tiles_t = tl.cdiv(frames, BLOCK_T)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    t = (tl.program_id(0) // tiles_c % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    row = (tl.program_id(0) // (tiles_c * tiles_t)).to(tl.int64)
    inside = (t < frames)[:, None] & (c < channels)[None, :]

    offset = (row * frames + t)[:, None] * channels + c[None, :]
    y = saturated(tl.load(y_ptr + offset, mask=inside, other=0.0).to(wide), y_ptr.dtype.element_ty)
    if gate_ptr is not None:
        y *= tl.load(gate_ptr + row * stride_gate + c, mask=c < channels, other=0.0).to(wide)[None, :]
    pointers = residual_ptr + row * stride_rb + t[:, None] * stride_rt + c.to(tl.int64)[None, :] * stride_rc
    y += tl.load(pointers, mask=inside, other=0.0).to(wide)
    y = saturated(y, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def gate_backward_kernel(
    grad_weight_ptr,
    grad_bias_ptr,
    grad_gate_ptr,
    products_ptr,
    sums_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    rows,
    channels,
    stride_gate,
    batch,
    BLOCK_C: tl.constexpr,
):
    """One row n of the weight: what every row b of the batch adds to its gradient, and its own element of the gate."""
    wide: tl.constexpr = sums_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + n * channels + c, mask=c < channels, other=0.0).to(wide)
    bias = tl.zeros((), wide)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n).to(wide)

    grad_weight = tl.zeros([BLOCK_C], wide)
    grad_bias = tl.zeros((), wide)
    for b in range(batch):
        at = b * rows + n
        products = tl.load(products_ptr + at * channels + c, mask=c < channels, other=0.0).to(wide)
        total = tl.load(sums_ptr + at)
        gate = tl.load(gate_ptr + b * stride_gate + n).to(wide)
        grad_weight += gate * products
        grad_bias += gate * total
        grad_gate = tl.sum(products * weight, 0) + bias * total
        tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty))

    tl.store(grad_weight_ptr + n * channels + c, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=c < channels)
    tl.store(grad_bias_ptr + n, grad_bias.to(grad_bias_ptr.dtype.element_ty))


# ------------------------------------------------------------------------------------------------ launchers
def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def gated_residual(y: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    """Launch ``residual + gate[:, None] * y``, of the dtype of the residual.

    Args:
        y: ``[B, T, C]``, contiguous.
        residual: ``[B, T, C]`` of any strides.
        gate: ``[B, C]``, or None for 1.
    """
    batch, frames, channels = y.shape
    out = residual.new_empty((batch, frames, channels))
    if out.numel():
        gate = None if gate is None else _dense(gate)
        tiles = triton.cdiv(frames, RESIDUAL["BLOCK_T"]) * triton.cdiv(channels, RESIDUAL["BLOCK_C"])
        with torch.cuda.device_of(y):
            gated_residual_kernel[(batch * tiles,)](
                out, y, residual, gate, channels, *residual.stride(), 0 if gate is None else gate.stride(0), frames,
                **RESIDUAL,
            )  # fmt: skip
    return out


def gate_backward(
    products: Tensor, sums: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel of the gradients of ``gate[:, None] * (x @ weight.T + bias)``.

    Args:
        products: ``grad_b.T @ x_b`` of each row of the batch, ``[B, N, C]``, contiguous.
        sums: of grad over frames, ``[B, N]``, contiguous, in the dtype to compute in.
        weight, bias: ``[N, C]`` and ``[N]`` or None, contiguous.
        gate: ``[B, N]``.

    Returns:
        The gradients of weight and bias, in the dtype of the weight, and of the gate, in its own.
    """
    batch, rows, channels = products.shape
    grad_weight, grad_bias = weight.new_empty((rows, channels)), weight.new_empty(rows)
    grad_gate = gate.new_empty((batch, rows))
    if rows:
        gate = _dense(gate)
        block_c = max(16, triton.next_power_of_2(channels))
        num_warps = GATE_WARPS[next((most for most in GATE_WARPS if most >= block_c), max(GATE_WARPS))]
        with torch.cuda.device_of(products):
            gate_backward_kernel[(rows,)](
                grad_weight, grad_bias, grad_gate, products, sums, weight, bias, gate, rows, channels, gate.stride(0),
                batch, BLOCK_C=block_c, num_warps=num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return grad_weight, grad_bias, grad_gate
