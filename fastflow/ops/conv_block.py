"""Masked convolution, normalisation, Mish and mask: the block that the U-Nets and the length regulator are made of.

On ``[B, T, C]``, with frames past a row's length taken as zero before the convolution and set to zero after Mish::

    y = conv3(x * mask) + bias                            3 taps: one frame to each side, or (causal) two to the left
    out = Mish(norm(y) * norm_weight + norm_bias) * mask + time_bias                   time_bias also on padding
    Mish(z) = z * tanh(log(1 + exp(z)))                                                (Misra, 2019)

norm is GroupNorm (Wu, He, 2018), whose mean and variance are those of all frames of the padded row
(``padding="upstream"``) or of the row's own frames (``"exact"``), or LayerNorm over the channels of each frame.

Saved for the backward pass: x, y, mean and rstd; x alone with ``keep_product=False``, which forms the others again.
With ``h = dz * norm_weight``, dz the gradient before Mish and means over what was normalised together::

    dy = rstd * (h - mean(h) - y_normalised * mean(h * y_normalised))

which is not zero on padding that GroupNorm counts; nothing of size T is formed there, since y is the bias.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastflow import backend as _backend
from fastflow.ops.attention import length_mask
from fastflow.ops.half import autocast_dtype, fitted, saturated, widened
from fastflow.ops.registry import define, kernel, op

TAPS = 3
DTYPES = {
    "cpu": _backend.FLOATS,
    "cuda": _backend.FLOATS,
    "triton": frozenset({torch.float32, torch.float16, torch.bfloat16}),
}
PADDINGS = ("upstream", "exact")

Padding = Literal["upstream", "exact"]


# ------------------------------------------------------------------------------------------------ reference
def _exact_group_norm(y: Tensor, keep: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of ``[B, C', T]`` over the frames that ``keep`` ``[B, 1, T]`` marks; frames without any stay finite."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(1, (groups, -1))
    keep = keep[:, None]
    count = (keep.sum((2, 3), keepdim=True) * wide.shape[2]).clamp(min=1)
    mean = (wide * keep).sum((2, 3), keepdim=True) / count
    centred = (wide - mean) * keep
    variance = centred.square().sum((2, 3), keepdim=True) / count
    normal = (centred * (variance + eps).rsqrt()).flatten(1, 2).to(y.dtype)
    return saturated(normal * weight[:, None]) + bias[:, None]


def conv_block_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    lengths: Tensor | None = None,
    groups: int = 0,
    causal: bool = False,
    time_bias: Tensor | None = None,
    eps: float = 1e-5,
    padding: Padding = "upstream",
) -> Tensor:
    """The same as :func:`conv_block` in plain PyTorch, as upstream computes it: on ``[B, C, T]``."""
    frames = x.shape[1]
    if frames == 0:  # a convolution wants a frame
        x = F.pad(x, (0, 0, 0, 1))
    keep = None if lengths is None else length_mask(lengths, x.shape[1])[:, None]
    with _backend.no_autocast(x):
        x = x.transpose(1, 2)
        if keep is not None:
            x = x.masked_fill(~keep, 0.0)
        y = F.conv1d(F.pad(x, (TAPS - 1, 0)) if causal else x, weight, bias, padding=0 if causal else TAPS // 2)
        y = saturated(y)
        if not groups:
            y = F.layer_norm(y.transpose(1, 2), y.shape[1:2], norm_weight, norm_bias, eps).transpose(1, 2)
        elif padding == "exact" and keep is not None:
            y = _exact_group_norm(y, keep, norm_weight, norm_bias, groups, eps)
        else:
            y = torch.group_norm(y, groups, norm_weight, norm_bias, eps)
        y = F.mish(saturated(y))
        if keep is not None:
            y = y.masked_fill(~keep, 0.0)
    out = y.transpose(1, 2)[:, :frames]
    return out if time_bias is None else saturated(out + time_bias[:, None])


# ------------------------------------------------------------------------------------------------ fused
# The forward pass returns the output and, for the backward pass, y, mean and rstd, which have shape [0] unless `save`.
# `wanted` has a bit for each gradient: x, weight, bias, norm_weight, norm_bias, time_bias; the others have shape [0].
_PARAMETERS = "Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, Tensor? lengths"
_RULE = "int groups, bool causal, bool exact, float eps"
_FORWARD = f"({_PARAMETERS}, Tensor? time_bias, {_RULE}, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad, Tensor y, Tensor mean, Tensor rstd, {_PARAMETERS}, {_RULE}, int wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward_fake(x, weight, bias, scale, shift, lengths, time, groups, causal, exact, eps, save):  # type: ignore
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (*x.shape[:2], weight.shape[0])
    statistics = (x.shape[0], groups or x.shape[1]) if save else (0,)
    mean, rstd = (x.new_empty(statistics, dtype=wide) for _ in range(2))
    return x.new_empty(shape), x.new_empty(shape if save else (0,)), mean, rstd


def gradient_shapes(x: Tensor, weight: Tensor, wanted: int) -> list[tuple[int, ...]]:
    width = weight.shape[0]
    shapes = (x.shape, weight.shape, (width,), (width,), (width,), (x.shape[0], width))
    return [shape if wanted >> n & 1 else (0,) for n, shape in enumerate(shapes)]


def _backward_fake(grad, y, mean, rstd, x, weight, *rest):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(shape) for shape in gradient_shapes(x, weight, rest[-1]))


define("conv_block", _FORWARD, _forward_fake, kernel("conv_block", "conv_block"))
define("conv_block_backward", _BACKWARD, _backward_fake, kernel("conv_block", "conv_block_backward"))

# On CUDA the convolution is torch's, between kernels that make its input, which is [B, T + 2, C] with frames of zeros
# around the rows, and take its output.
_PASS = "Tensor bias, Tensor norm_weight, Tensor norm_bias, Tensor? lengths"
torch.library.define("fastflow::conv_block_pad", "(Tensor x, Tensor? lengths, int before, int after) -> Tensor")
torch.library.define(
    "fastflow::conv_block_normalise",
    f"(Tensor y, {_PASS}, Tensor? time_bias, {_RULE}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastflow::conv_block_normalise_backward",
    f"(Tensor grad, Tensor y, Tensor mean, Tensor rstd, {_PASS}, int groups, bool causal, bool exact, "
    "int before, int after, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of [B, T + 2, C], without a copy to [B, C, T]: as an image of one row whose channels come last."""
    image = x.transpose(1, 2)[:, :, None]
    with _backend.no_autocast(x):
        return F.conv2d(image, weight[:, :, None], bias)[:, :, 0].transpose(1, 2).contiguous()


def _taps(causal: bool) -> tuple[int, int]:
    """Frames that a frame sees to its left and to its right."""
    return (TAPS - 1, 0) if causal else (TAPS // 2, TAPS // 2)


@torch.no_grad()
def _forward_cuda(  # type: ignore[no-untyped-def]
    x, weight, bias, norm_weight, norm_bias, lengths, time_bias, groups, causal, exact, eps, save
):
    y = x.new_empty((*x.shape[:2], weight.shape[0]))
    if y.numel():
        y = _convolve(torch.ops.fastflow.conv_block_pad(x, lengths, *_taps(causal)), weight, bias)
    out, *saved = torch.ops.fastflow.conv_block_normalise(
        y, bias, norm_weight, norm_bias, lengths, time_bias, groups, causal, exact, eps
    )
    saved = (y, *saved) if save else (s.new_empty(0) for s in (y, *saved))
    return out, *saved


def _grad_weight(dy: Tensor, x: Tensor, right: int) -> Tensor:
    """Of dy and x with their zeros, ``right`` frames of them before each row of dy: products of shifted frames."""
    dy, x = dy.flatten(0, 1), x.flatten(0, 1)
    frames, channels = x.shape[0] - (TAPS - 1), x.shape[1]
    dy = dy[right : right + frames].T.expand(TAPS, -1, -1)
    x = x.as_strided((TAPS, frames, channels), (channels, channels, 1))
    with _backend.no_autocast(x):
        return torch.bmm(dy, x).permute(1, 2, 0).contiguous()


@torch.no_grad()
def _backward_cuda(  # type: ignore[no-untyped-def]
    grad, y, mean, rstd, x, weight, bias, norm_weight, norm_bias, lengths, groups, causal, exact, eps, wanted
):
    if not grad.numel():
        return tuple(x.new_zeros(shape) for shape in gradient_shapes(x, weight, wanted))
    left, right = _taps(causal)
    dy, *grads = torch.ops.fastflow.conv_block_normalise_backward(
        grad, y, mean, rstd, bias, norm_weight, norm_bias, lengths, groups, causal, exact, right, left, wanted >> 2
    )
    grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
    if wanted & 1:  # the convolution of dy with the weight's taps reversed
        grad_x = _convolve(dy, weight.transpose(0, 1).flip(2))
        grad_x = torch.ops.fastflow.conv_block_pad(grad_x, lengths, 0, 0)
    if wanted & 2:
        grad_weight = _grad_weight(dy, torch.ops.fastflow.conv_block_pad(x, lengths, left, right), right)
    return grad_x, grad_weight, *grads


torch.library.impl("fastflow::conv_block", "cuda", _forward_cuda)
torch.library.impl("fastflow::conv_block_backward", "cuda", _backward_cuda)


class ConvBlockFunction(torch.autograd.Function):
    """``rule`` holds the numbers of the schema, ``keep`` says whether y and its statistics are kept."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, weight, bias, norm_weight, norm_bias, time_bias, lengths, rule, keep, backend
    ):
        given = (x, weight, bias, norm_weight, norm_bias, lengths)
        out, *products = op("conv_block", backend)(*given, time_bias, *rule, keep)
        ctx.rule, ctx.keep, ctx.backend = rule, keep, backend
        ctx.save_for_backward(*products, *given)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        wanted = sum(needed << n for n, needed in enumerate(ctx.needs_input_grad[:6]))
        *products, x, weight, bias, norm_weight, norm_bias, lengths = ctx.saved_tensors
        given = (x, weight, bias, norm_weight, norm_bias)
        if not ctx.keep:
            _, *products = op("conv_block", ctx.backend)(*given, lengths, None, *ctx.rule, True)
        given = (grad, *products, *given)
        if ctx.backend == "cpu":
            given = map(widened, given)
        grads = op("conv_block_backward", ctx.backend)(*given, lengths, *ctx.rule, wanted)
        return *(g.to(x.dtype) if wanted >> n & 1 else None for n, g in enumerate(grads)), *[None] * 4


# ------------------------------------------------------------------------------------------------ public
def _check(x: Tensor, tensors: dict[str, Tensor], lengths: Tensor | None, groups: int, padding: str) -> None:
    """Validate the arguments without reading device memory."""
    if x.dim() != 3 or x.dtype not in _backend.FLOATS or x.shape[2] < 1:
        raise ValueError(f"x must have shape [B, T, C >= 1] and a floating dtype, got {list(x.shape)} {x.dtype}")
    weight = tensors["weight"]
    if weight.dim() != 3 or weight.shape[0] < 1 or weight.shape[1:] != (x.shape[2], TAPS):
        raise ValueError(f"weight must have shape [C' >= 1, {x.shape[2]}, {TAPS}], got {list(weight.shape)}")
    width = weight.shape[0]
    for name, tensor in tensors.items():
        shape = (x.shape[0], width) if name == "time_bias" else (width,)
        if name != "weight" and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if (tensor.dtype != x.dtype and autocast_dtype(x) is None) or tensor.device != x.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device} but x is {x.dtype} on {x.device}")
    if lengths is not None:
        if lengths.shape != x.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"lengths must be int32 or int64 of shape [{x.shape[0]}], got {list(lengths.shape)} {lengths.dtype}"
            )
        if lengths.device != x.device:
            raise ValueError(f"lengths is on {lengths.device} but x is on {x.device}")
    if groups < 0 or (groups and width % groups):
        raise ValueError(f"groups must be 0, which means LayerNorm, or divide the {width} channels; got {groups}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}; got {padding!r}")


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    lengths: Tensor | None = None,
    groups: int = 0,
    causal: bool = False,
    time_bias: Tensor | None = None,
    eps: float = 1e-5,
    padding: Padding = "upstream",
    keep_product: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``Mish(norm(conv3(x * mask) + bias)) * mask + time_bias``, as described at the top of this file.

    Under autocast the tensors may differ in dtype, and everything is cast to that of autocast first (float64 stays), as
    a convolution does; on ``cpu`` the result alone.

    Args:
        x: ``[B, T, C]``, float32, float64, float16 or bfloat16, any strides; what lies past a row's length is not read.
        weight: ``[C', C, 3]``, as ``nn.Conv1d`` has it.
        bias, norm_weight, norm_bias: ``[C']``.
        lengths: ``[B]`` int32 or int64 frames of each row, never read on the host; None: all.
        groups: of GroupNorm, a divisor of C'; 0: LayerNorm.
        causal: whether the convolution sees the frame and the two before it, instead of one to each side.
        time_bias: ``[B, C']`` to add to every frame, also on padding, or None.
        eps: added to the variance.
        padding: what GroupNorm counts: ``"upstream"``, all T frames, or ``"exact"``, the row's own.
        keep_product: whether the convolution's result is kept for the backward pass; False computes it again there.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu``, ``cuda`` or ``triton`` (no float64).

    Returns:
        ``[B, T, C']`` of the dtype of x, or of autocast.  Sums and statistics are float32 (float64 for float64).

    Raises:
        ValueError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    tensors = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    if time_bias is not None:
        tensors["time_bias"] = time_bias
    _check(x, tensors, lengths, groups, padding)
    chosen = _backend.select("conv_block", x, DTYPES, backend)
    dtype = autocast_dtype(x)
    if dtype is not None:  # the CPU's kernel multiplies in float32 whatever it is given
        inside = torch.float32 if chosen == "cpu" else dtype
        x, tensors = fitted(x, inside).to(inside), {name: tensor.to(inside) for name, tensor in tensors.items()}
    rule: dict[str, Any] = {
        "lengths": lengths,
        "groups": groups,
        "causal": causal,
        "eps": eps,
        "padding": padding,
    }
    out = _run(x, tensors, rule, keep_product, chosen)
    return out if dtype is None else fitted(out, dtype).to(dtype)


def _run(x: Tensor, tensors: dict[str, Tensor], rule: dict[str, Any], keep_product: bool, chosen: str) -> Tensor:
    """The op on a backend, of tensors of one dtype."""
    time_bias = tensors.pop("time_bias", None)
    given = (x, *tensors.values())
    records = torch.is_grad_enabled() and any(t.requires_grad for t in (*given, time_bias) if t is not None)
    if chosen == "reference":
        if records and not keep_product:
            replay: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(conv_block_ref, *given, time_bias=time_bias, **replay, **rule)
        return conv_block_ref(*given, time_bias=time_bias, **rule)
    lengths = None if rule["lengths"] is None else rule["lengths"].long().contiguous()
    numbers = (rule["groups"], rule["causal"], rule["padding"] == "exact" and lengths is not None, rule["eps"])
    if records:
        return ConvBlockFunction.apply(*given, time_bias, lengths, numbers, keep_product, chosen)
    return op("conv_block", chosen)(*given, lengths, time_bias, *numbers, False)[0]
