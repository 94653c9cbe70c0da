"""Triton kernel of fastflow.ops.dropout, which states what is kept."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels.half import saturated
from fastflow.ops.dropout import threshold_as_int32

CONFIG = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}  # for every dtype and architecture


@triton.jit(do_not_specialize=["count", "threshold"])
def dropout_kernel(out_ptr, x_ptr, seed_ptr, count, threshold, scale: tl.float64, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    n = first + tl.arange(0, BLOCK)
    counter = (first // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), counter, 0, 0, 0, n_rounds=7)
    least = threshold.to(tl.uint32, bitcast=True)
    kept = tl.interleave(tl.interleave(a >= least, c >= least), tl.interleave(b >= least, d >= least))
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    x = tl.load(x_ptr + n, mask=n < count).to(wide)
    out = x * tl.where(kept, tl.full((), scale, wide), tl.full((), 0.0, wide))
    out = saturated(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < count)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Launch the kernel."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            dropout_kernel[(triton.cdiv(x.numel(), CONFIG["BLOCK"]),)](
                out, x, seed, x.numel(), threshold_as_int32(p), 1 / (1 - p), **CONFIG
            )
    return out
