"""The range of float16 in the forward pass: what a product, a sum or an activation carries beyond it becomes +-65504.

Infinity instead would make NaN of the next norm or product.  NaN stays NaN, and an infinity becomes +-65504 like every
number beyond, as nothing tells it from one.  All backends do so where they store a result; its gradient passes as if
nothing had happened.  Gradients themselves overflow to infinity, by which a scaler of the loss sees that its scale is
too large.  The weights are taken as they are.  Nothing here touches another dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_MAX = torch.finfo(torch.float16).max  # 65504


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clamp(-HALF_MAX, HALF_MAX)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad


def saturated(x: Tensor) -> Tensor:
    """A result of float16 within its range; x itself of another dtype."""
    return _Saturate.apply(x) if x.dtype == torch.float16 else x


def saturated_(x: Tensor) -> Tensor:
    """:func:`saturated` in place, where autograd does not look."""
    return x.clamp_(-HALF_MAX, HALF_MAX) if x.dtype == torch.float16 else x


def fitted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x within the range of a dtype that it is about to be cast to."""
    return _Saturate.apply(x) if dtype == torch.float16 and x.dtype != dtype else x


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """In which dtype autocast, if it is on, multiplies x; None where it leaves x alone, as it does float64."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def computes_half(x: Tensor) -> bool:
    """Whether a product of x is float16, of itself or by autocast."""
    return (autocast_dtype(x) or x.dtype) == torch.float16


def autocast_fitted(x: Tensor) -> Tensor:
    """x within the range of the dtype that autocast is about to cast it to."""
    return fitted(x, torch.float16) if computes_half(x) else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` that saturates, also the input that autocast casts."""
    return saturated(F.linear(autocast_fitted(x), weight, bias))


def widened(x: Tensor) -> Tensor:
    """float32 of float16, x itself of another dtype: for sums of squares, and gradients that C++ must not saturate."""
    return x.float() if x.dtype == torch.float16 else x
