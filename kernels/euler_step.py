"""Triton kernel of fastflow.ops.euler_step, which states the formula.

No multiply-add is fused (``enable_fp_fusion=False``), so the bits are those of the formula's separate operations.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels.half import saturated

CONFIG = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": False}  # for every dtype and architecture


@triton.jit(do_not_specialize=["batch", "frames", "stride_xb", "stride_vb"])
def euler_step_kernel(
    after_ptr,
    doubled_ptr,
    x_ptr,
    velocity_ptr,
    dt_ptr,
    conditional_weight: tl.float64,
    unconditional_weight: tl.float64,
    batch,
    frames,
    channels,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_vb,
    stride_vt,
    stride_vc,
    BLOCK: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, t, b = n % channels, n // channels % frames, n // channels // frames
    inside = b < batch
    x = tl.load(x_ptr + b * stride_xb + t * stride_xt + c * stride_xc, mask=inside).to(wide)
    velocity = velocity_ptr + b * stride_vb + t * stride_vt + c * stride_vc
    conditional = tl.load(velocity, mask=inside).to(wide)
    unconditional = tl.load(velocity + batch.to(tl.int64) * stride_vb, mask=inside).to(wide)
    # `full` takes the weights to `wide`; in an operation the interpreter would take any Python number to float32.
    guided = (
        tl.full((), conditional_weight, wide) * conditional - tl.full((), unconditional_weight, wide) * unconditional
    )
    after = x + tl.load(dt_ptr).to(wide) * guided
    if after_ptr is not None:
        tl.store(after_ptr + n, after, mask=inside)
    count = batch.to(tl.int64) * frames * channels
    after = saturated(after, doubled_ptr.dtype.element_ty).to(doubled_ptr.dtype.element_ty)
    tl.store(doubled_ptr + n, after, mask=inside)
    tl.store(doubled_ptr + count + n, after, mask=inside)


def euler_step(x: Tensor, velocity: Tensor, dt: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel; ``velocity`` has the dtype of ``x``, or is 16 bits wide where that is float32."""
    same = x.dtype == velocity.dtype
    after, doubled = x.new_empty(0 if same else x.shape), velocity.new_empty(velocity.shape)
    if x.numel():
        with torch.cuda.device_of(x):
            euler_step_kernel[(triton.cdiv(x.numel(), CONFIG["BLOCK"]),)](
                None if same else after, doubled, x, velocity, dt, 1.0 + rate, rate, *x.shape, *x.stride(),
                *velocity.stride(), **CONFIG,
            )  # fmt: skip
    return after, doubled
