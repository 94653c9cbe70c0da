"""The range of float16 in Triton kernels: see fastflow.ops.half."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def saturated(x, dtype: tl.constexpr):
    """x, float32, within the range of float16 where it was loaded from or will be stored as that; NaN stays NaN."""
    if dtype == tl.float16:
        return tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return x
