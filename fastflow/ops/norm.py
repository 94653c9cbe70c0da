"""The normalisation over channels with which :func:`projection` and :func:`feed_forward` begin.

``(x - mean) / sqrt(variance + eps) * scale + shift``: LayerNorm (Ba et al. 2016) with scale and shift ``[C]``; with
``[B, C]``, one of each for every row, the adaptive form of DiT (Peebles and Xie 2023), whose scale is ``1 + s``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow.backend import FLOATS
from fastflow.ops.half import autocast_dtype, saturated
from fastflow.ops.registry import define, kernel, op


class Norm(NamedTuple):
    """``scale`` and ``shift``: ``[C]`` or ``[B, C]``, None for 1 and 0; ``eps`` is added to the variance."""

    scale: Tensor | None
    shift: Tensor | None
    eps: float


def norm_ref(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm of x ``[B, T, C]`` in plain PyTorch; x itself without one."""
    if norm is None:
        return x
    scale, shift, eps = norm
    if all(p is None or p.dim() == 1 for p in (scale, shift)):
        return saturated(F.layer_norm(x, x.shape[-1:], scale, shift, eps))
    x = F.layer_norm(x, x.shape[-1:], eps=eps)
    if scale is not None:
        x = saturated(x * (scale[:, None] if scale.dim() == 2 else scale))
    if shift is not None:
        x = saturated(x + (shift[:, None] if shift.dim() == 2 else shift))
    return x


def gated(x: Tensor | None, gate: Tensor | None, y: Tensor) -> Tensor:
    """``x + gate[:, None] * y``, without what is None."""
    y = y if gate is None else saturated(gate[:, None] * y)
    return y if x is None else saturated(x + y)


# ------------------------------------------------------------------------------------------------ checks
def check_signal(x: Tensor) -> None:
    if x.dim() != 3 or x.shape[2] == 0 or x.dtype not in FLOATS:
        raise ValueError(f"x must have shape [B, T, C] with C > 0 and a floating dtype, got {list(x.shape)} {x.dtype}")


def check_like(x: Tensor, name: str, t: Tensor | None, *shape: int) -> None:
    """A tensor that is given has its shape, and the dtype (but under autocast) and the device of x."""
    if t is None:
        return
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    if (t.dtype != x.dtype and autocast_dtype(x) is None) or t.device != x.device:
        raise ValueError(f"{name} is {t.dtype} on {t.device} but x is {x.dtype} on {x.device}")


def check_norm(x: Tensor, norm: Norm | None) -> None:
    if norm is None:
        return
    batch, _, channels = x.shape
    for name, p in (("norm.scale", norm.scale), ("norm.shift", norm.shift)):
        if p is not None and p.dim() == 1:
            check_like(x, name, p, channels)
        elif p is not None and p.shape != (batch, channels):
            raise ValueError(f"{name} must have shape [{channels}] or {[batch, channels]}, got {list(p.shape)}")
        else:
            check_like(x, name, p, batch, channels)
    if not norm.eps >= 0:
        raise ValueError(f"norm.eps must be >= 0, got {norm.eps}")


# ------------------------------------------------------------------------------------------------ passes
# On a GPU an op is a row of products, which are cuBLAS's, and of passes over the frames between them, each an op of its
# own, written in kernels/ and in csrc/cuda.
CHUNK = 16  # frames whose gradients of scale and shift are summed by one task, as in csrc/linear.h


def sum_type(x: Tensor) -> torch.dtype:
    """In which sums are formed: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_wide(x: Tensor | None) -> Tensor | None:
    """In the dtype of sums, in which the backward passes of the CPU compute."""
    return None if x is None else x.to(sum_type(x))


def _norm_forward_fake(x, scale, shift, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=sum_type(x))


def _norm_backward_fake(grad, x, stats, scale, shift, grad_residual):  # type: ignore[no-untyped-def]
    batch, frames, channels = x.shape
    sums = stats.new_empty(batch, (frames + CHUNK - 1) // CHUNK, 2, channels)
    return x.new_empty(x.shape), grad.new_empty(x.shape), sums


define(
    "norm_forward",
    "(Tensor x, Tensor? scale, Tensor? shift, float eps) -> (Tensor, Tensor)",
    _norm_forward_fake,
    kernel("norm", "norm_forward"),
)
define(
    "norm_backward",
    "(Tensor grad, Tensor x, Tensor stats, Tensor? scale, Tensor? shift, Tensor? grad_residual) -> "
    "(Tensor, Tensor, Tensor)",
    _norm_backward_fake,
    kernel("norm", "norm_backward"),
)


# ------------------------------------------------------------------------------------------------ backward
def sum_like(x: Tensor, like: Tensor | None) -> Tensor | None:
    """Partial sums ``[B, n, C]`` -> the gradient of ``like``, which is ``[B, C]``, ``[C]`` or None."""
    return None if like is None else x.sum(1 if like.dim() == 2 else (0, 1)).to(like.dtype)


class NormBackward(NamedTuple):
    """What :func:`norm_backward` finds: the gradient of x, the normalised x, and the gradients of scale and shift."""

    grad_x: Tensor | None
    normalised: Tensor
    grad_scale: Tensor | None
    grad_shift: Tensor | None


def norm_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    grad_residual: Tensor | None,
    backend: str,
) -> NormBackward:
    """One pass over the frames on a GPU: the norm again, from its saved mean and deviation, and its gradients.

    Args:
        grad: of the normalised x, ``[B, T, C]``, and of its dtype.
        x: the input of the norm, ``[B, T, C]``; of another dtype only under autocast, by Triton.
        stats: ``[2, B, T]``, mean and 1 / deviation.
        scale, shift: of the norm.
        grad_residual: what reaches x beside the norm, ``[B, T, C]`` of the dtype of x, or None.
        backend: of the forward pass.
    """
    beside = None if grad_residual is None else grad_residual.contiguous()
    backward = op("norm_backward", backend)
    grad_x, normalised, sums = backward(grad.contiguous(), x.contiguous(), stats, scale, shift, beside)
    return NormBackward(grad_x, normalised, *(sum_like(sums[:, :, n], p) for n, p in enumerate((scale, shift))))
