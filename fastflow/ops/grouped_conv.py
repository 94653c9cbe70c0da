"""The causal convolution in groups of channels, and Mish: what a DiT knows positions by, before its blocks.

On ``[B, T, C]``, with x zero before the first frame, K taps and the channels of a group next to each other::

    y[t] = bias + sum over k < K of weight[..., k] x[t - (K - 1) + k]          for every group of channels by itself
    out = Mish(y) = y * tanh(log(1 + exp(y)))                                  (Misra, 2019)

Saved for the backward pass: x and y.  Only the C++ backend has kernels of its own; a GPU's convolutions are cuDNN's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import backend as _backend
from fastflow.ops.half import autocast_dtype, fitted, saturated, widened
from fastflow.ops.norm import check_like, check_signal
from fastflow.ops.registry import define, op

DTYPES = dict.fromkeys(("cpu", "cuda", "triton"), _backend.FLOATS)


# ------------------------------------------------------------------------------------------------ reference
def grouped_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int) -> Tensor:
    """The same as :func:`grouped_conv` in plain PyTorch, as upstream computes it: on ``[B, C, T]``."""
    frames, taps = x.shape[1], weight.shape[2]
    before = taps - 1 if frames else taps  # a convolution wants a frame
    with _backend.no_autocast(x):
        y = F.conv1d(F.pad(x.transpose(1, 2), (before, 0)), weight, bias, groups=groups)
        out = F.mish(saturated(y))
    return out.transpose(1, 2)[:, :frames]


# ------------------------------------------------------------------------------------------------ fused
# The forward pass returns the output and y, which has shape [0] unless `save`.  `wanted` has a bit for the gradient of
# each of x, weight and bias; the others have shape [0].
def _forward_fake(x, weight, bias, groups, save):  # type: ignore[no-untyped-def]
    shape = (*x.shape[:2], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else (0,))


def _backward_fake(grad, y, x, weight, groups, wanted):  # type: ignore[no-untyped-def]
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if wanted >> n & 1 else (0,)) for n, shape in enumerate(shapes))


define(
    "grouped_conv",
    "(Tensor x, Tensor weight, Tensor? bias, int groups, bool save) -> (Tensor, Tensor)",
    _forward_fake,
    None,
)
define(
    "grouped_conv_backward",
    "(Tensor grad, Tensor y, Tensor x, Tensor weight, int groups, int wanted) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    None,
)


class GroupedConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups):  # type: ignore[no-untyped-def]
        out, y = op("grouped_conv", "cpu")(x, weight, bias, groups, True)
        ctx.groups = groups
        ctx.save_for_backward(y, x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        wanted = sum(needed << n for n, needed in enumerate(ctx.needs_input_grad[:3]))
        given = map(widened, (grad, *ctx.saved_tensors))
        grads = op("grouped_conv_backward", "cpu")(*given, ctx.groups, wanted)
        return *(g.to(grad.dtype) if wanted >> n & 1 else None for n, g in enumerate(grads)), None


# ------------------------------------------------------------------------------------------------ public
def _check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    check_signal(x)
    channels = x.shape[2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    shape = list(weight.shape)
    if weight.dim() != 3 or 0 in shape or shape[1] != channels // groups or shape[0] % groups:
        raise ValueError(
            f"weight must have shape [C', {channels // groups}, K] with {groups} groups dividing C' > 0 and K > 0, "
            f"got {shape}"
        )
    check_like(x, "weight", weight, *shape)
    check_like(x, "bias", bias, shape[0])


def grouped_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int, backend: str | None = None) -> Tensor:
    """``Mish(conv(x) + bias)``, as described at the top of this file.

    Under autocast the tensors may differ in dtype, and everything is cast to that of autocast first (float64 stays), as
    a convolution does; on ``cpu`` the result alone.

    Args:
        x: ``[B, T, C]``, float32, float64, float16 or bfloat16, any strides.
        weight: ``[C', C / groups, K]``, as ``nn.Conv1d`` has it.
        bias: ``[C']``, or None.
        groups: a divisor of C and C'.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu``, ``cuda`` or ``triton``; the last two
            are PyTorch's convolution, as the reference.

    Returns:
        ``[B, T, C']`` of the dtype of x, or of autocast.  Sums are float32 (float64 for float64).

    Raises:
        ValueError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    _check(x, weight, bias, groups)
    chosen = _backend.select("grouped_conv", x, DTYPES, backend)
    dtype = autocast_dtype(x)
    if dtype is not None:  # the CPU's kernel multiplies in float32 whatever it is given
        inside = torch.float32 if chosen == "cpu" else dtype
        x, weight = fitted(x, inside).to(inside), weight.to(inside)
        bias = None if bias is None else bias.to(inside)
    out = _run(x, weight, bias, groups, chosen)
    return out if dtype is None else fitted(out, dtype).to(dtype)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, chosen: str) -> Tensor:
    """The op on a backend, of tensors of one dtype."""
    if chosen != "cpu":
        return grouped_conv_ref(x, weight, bias, groups=groups)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return GroupedConvFunction.apply(x, weight, bias, groups)
    return op("grouped_conv", "cpu")(x, weight, bias, groups, False)[0]
