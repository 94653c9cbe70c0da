"""The feed-forward layer of a transformer block, from the norm before it to the residual after it:

    y = activation(norm(x) @ w1.T + b1) @ w2.T + b2
    y,  x + y,  or  x + gate[:, None] * y

Saved for the backward pass: x, mean and deviation of each frame, and what goes into the activation, from which that is
recomputed; without gradients not even this is written to memory.  With ``keep_hidden=False`` not this either: one
product restores it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastflow import backend as _backend
from fastflow.ops.half import autocast_dtype, fitted, linear, saturated_
from fastflow.ops.norm import (
    Norm,
    NormBackward,
    check_like,
    check_norm,
    check_signal,
    gated,
    norm_backward,
    norm_ref,
    to_wide,
)
from fastflow.ops.packed import packed_weights
from fastflow.ops.projection import (
    NO_GRADIENTS,
    cast,
    cast_norm,
    fake_stats,
    fake_vectors,
    fake_weight_gradients,
    linear_on_gpu,
    normalised_on_gpu,
    product,
    scaled_by,
    to_input,
    weight_gradients,
)
from fastflow.ops.registry import define, gpu_pass, kernel, op

DTYPES = dict.fromkeys(("cpu", "cuda", "triton"), _backend.FLOATS)
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
ACTIVATION_NUMBERS = {name: n for n, name in enumerate(ACTIVATIONS, 1)}  # as in csrc/linear.h


def feed_forward_ref(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    norm: Norm | None = None,
    gate: Tensor | None = None,
    residual: bool = True,
) -> Tensor:
    """The same as :func:`feed_forward` in plain PyTorch."""
    hidden = ACTIVATIONS[activation](linear(norm_ref(x, norm), w1, b1))
    return gated(x if residual else None, gate, linear(hidden, w2, b2))


# ------------------------------------------------------------------------------------------------ fused
def _feed_forward_fake(  # type: ignore[no-untyped-def]
    x, w1, b1, w2, b2, activation, scale, shift, eps, gate, residual, save_hidden, packed_1=None, packed_2=None
):
    batch, frames, _ = x.shape
    hidden = w1.new_empty(batch if save_hidden else 0, frames, w1.shape[0])
    return (x if residual else w2).new_empty(batch, frames, w2.shape[0]), fake_stats(x, eps), hidden


def _feed_forward_backward_fake(  # type: ignore[no-untyped-def]
    grad, scaled, x, stats, hidden, w1, w2, b2, activation, scale, shift, normalises, gate, residual, *wanted
):
    wants_x, wants_first, wants_second = wanted
    grad_x = x.new_empty(x.shape if wants_x or normalises else (0,))
    first = fake_weight_gradients(x, *w1.shape, None, wants_first, True)[:2]
    second = fake_weight_gradients(x, *w2.shape, gate, wants_second, True)
    return grad_x, *first, *second[:2], *fake_vectors(x, scale, shift), second[2]


def _activation_backward_fake(grad, hidden, activation):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


def on_gpu(  # type: ignore[no-untyped-def]
    backend, x, w1, b1, w2, b2, activation, scale, shift, eps, gate, residual, save_hidden, packed_1=None, packed_2=None
):
    """The op as two products of cuBLAS's between passes."""
    y, stats = normalised_on_gpu(x, scale, shift, eps, w1.dtype, backend)
    hidden = linear_on_gpu(y, w1, b1, *x.shape[:2])
    y = gpu_pass("activation_forward", backend)(hidden, activation)
    y = linear_on_gpu(y.flatten(0, 1), w2, b2, *x.shape[:2])
    y = gpu_pass("gated_residual", backend)(y, x, gate) if residual else saturated_(y)
    return y, stats, hidden if save_hidden else hidden.new_empty(0, *hidden.shape[1:])


define(
    "feed_forward",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int activation, Tensor? scale, Tensor? shift, "
    "float? eps, Tensor? gate, bool residual, bool save_hidden, Tensor? packed_1=None, Tensor? packed_2=None) -> "
    "(Tensor, Tensor, Tensor)",
    _feed_forward_fake,
    functools.partial(on_gpu, "triton"),
)
torch.library.impl("fastflow::feed_forward", "cuda", functools.partial(on_gpu, "cuda"))
define(
    "feed_forward_backward",
    "(Tensor grad, Tensor scaled, Tensor x, Tensor stats, Tensor hidden, Tensor w1, Tensor w2, Tensor? b2, "
    "int activation, Tensor? scale, Tensor? shift, bool normalises, Tensor? gate, bool residual, bool wants_x, "
    "bool wants_first, bool wants_second) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _feed_forward_backward_fake,
    None,
)
define(
    "activation_forward",
    "(Tensor hidden, int activation) -> Tensor",
    lambda hidden, activation: hidden.new_empty(hidden.shape),
    kernel("feed_forward", "activation_forward"),
)
define(
    "activation_backward",
    "(Tensor grad, Tensor hidden, int activation) -> (Tensor, Tensor)",
    _activation_backward_fake,
    kernel("feed_forward", "activation_backward"),
)


class FeedForwardFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, w1, b1, w2, b2, scale, shift, gate, activation, eps, residual, keep_hidden, backend
    ):
        given = (x, w1, b1, w2, b2)
        forward = op("feed_forward", backend)
        out, *saved = forward(*given, activation, scale, shift, eps, gate, residual, keep_hidden)
        ctx.activation, ctx.eps, ctx.residual = activation, eps, residual
        ctx.keep_hidden, ctx.backend = keep_hidden, backend
        ctx.save_for_backward(*saved, *given, scale, shift, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        stats, hidden, *tensors = ctx.saved_tensors
        x, w1, b1, w2, b2, scale, shift, gate = tensors
        needs, normalises = ctx.needs_input_grad, ctx.eps is not None
        backward = _backward_on_cpu if ctx.backend == "cpu" else functools.partial(_backward_on_gpu, ctx.backend)
        with torch.autocast(x.device.type, enabled=False):
            if not ctx.keep_hidden:
                hidden = product(x, [w1], [b1], scale, shift, ctx.eps, ctx.backend)
            found = backward(
                grad, x, stats, hidden, w1, w2, b2, ctx.activation, scale, shift, normalises, gate, ctx.residual,
                needs[0], needs[1] or needs[2], needs[3] or needs[4] or needs[7],
            )  # fmt: skip
            if found.x is not None and ctx.residual and not normalises:
                found = found._replace(x=found.x + grad)
        of_inputs = zip(found, (x, w1, b1, w2, b2, scale, shift, gate), strict=True)
        return *(to_input(g, t) for g, t in of_inputs), *[None] * 5


class Gradients(NamedTuple):
    """None is what is not wanted, or not there."""

    x: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    gate: Tensor | None


def _backward_on_cpu(  # type: ignore[no-untyped-def]
    grad, x, stats, hidden, w1, w2, b2, activation, scale, shift, normalises, gate, residual,
    wants_x, wants_first, wants_second,
) -> Gradients:  # fmt: skip
    tensors = grad.contiguous(), x.contiguous(), hidden.contiguous(), w1, w2, b2, scale, shift, gate
    grad, x, hidden, w1, w2, b2, scale, shift, gate = (to_wide(t) for t in tensors)
    found = op("feed_forward_backward", "cpu")(
        grad, scaled_by(grad, gate), x, stats, hidden, w1, w2, b2, activation, scale, shift, normalises, gate, residual,
        wants_x, wants_first, wants_second,
    )  # fmt: skip
    there = (
        *(wants_x, wants_first, wants_first, wants_second, wants_second),
        *(scale is not None, shift is not None, wants_second and gate is not None),
    )
    return Gradients(*(t if is_there else None for t, is_there in zip(found, there, strict=True)))


def _backward_on_gpu(  # type: ignore[no-untyped-def]
    backend, grad, x, stats, hidden, w1, w2, b2, activation, scale, shift, normalises, gate, residual,
    wants_x, wants_first, wants_second,
) -> Gradients:  # fmt: skip
    narrow = grad.to(w2.dtype)
    activated, grad_hidden = op("activation_backward", backend)(
        (scaled_by(narrow, gate).to(w2.dtype) @ w2).contiguous(), hidden, activation
    )
    if normalises:
        norm = norm_backward(grad_hidden @ w1, x, stats, scale, shift, grad if residual else None, backend)
    else:
        norm = NormBackward(grad_hidden @ w1 if wants_x else None, fitted(x, w1.dtype).to(w1.dtype), None, None)
    first = weight_gradients(grad_hidden, norm.normalised, backend) if wants_first else NO_GRADIENTS
    second = weight_gradients(narrow, activated, backend, w2, b2, gate) if wants_second else NO_GRADIENTS
    return Gradients(
        norm.grad_x, first.weight, first.bias, second.weight, second.bias, norm.grad_scale, norm.grad_shift, second.gate
    )


# ------------------------------------------------------------------------------------------------ public
def _check(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    norm: Norm | None,
    gate: Tensor | None,
    residual: bool,
) -> None:
    """Validate the arguments without reading memory."""
    check_signal(x)
    batch, _, channels = x.shape
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if w1.dim() != 2 or w1.shape[1] != channels or w1.shape[0] == 0:
        raise ValueError(f"w1 must have shape [H, {channels}] with H > 0, got {list(w1.shape)}")
    hidden = w1.shape[0]
    if w2.dim() != 2 or w2.shape[1] != hidden:
        raise ValueError(f"w2 must have shape [N, {hidden}], got {list(w2.shape)}")
    if residual and w2.shape[0] != channels:
        raise ValueError(f"with a residual, w2 must have shape {[channels, hidden]}, got {list(w2.shape)}")
    if gate is not None and not residual:
        raise ValueError("gate needs residual=True")
    check_like(x, "w1", w1, hidden, channels)
    check_like(x, "b1", b1, hidden)
    check_like(x, "w2", w2, *w2.shape)
    check_like(x, "b2", b2, w2.shape[0])
    check_like(x, "gate", gate, batch, channels)
    check_norm(x, norm)


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    norm: Norm | None = None,
    gate: Tensor | None = None,
    residual: bool = True,
    keep_hidden: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The feed-forward layer at the top of this file in one pass over the frames.

    Under autocast the tensors may differ in dtype (float64 stays): the norm is float32, the products have the dtype of
    autocast, on ``cpu`` of their result alone, and the result that of x, or without a residual that of autocast.

    Args:
        x: ``[B, T, C]``, float32, float64, float16 or bfloat16, any strides.
        w1, b1: ``[H, C]`` and ``[H]`` or None, of the first linear layer.
        w2, b2: ``[N, H]`` and ``[N]`` or None, of the second; N = C with a residual.
        activation: ``gelu`` (with erf), ``gelu_tanh`` or ``silu``.
        norm: applied to x first.
        gate: ``[B, C]``, factors of the result; needs a residual.
        residual: whether x is added to the result.
        keep_hidden: whether the hidden layer is kept for the backward pass; False computes it again from x there.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Returns:
        ``[B, T, N]`` of the dtype of x, but under autocast.  Norm, activation and sums are float32 (float64 for
        float64).

    Raises:
        ValueError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    _check(x, w1, b1, w2, b2, activation, norm, gate, residual)
    chosen = _backend.select("feed_forward", x, DTYPES, backend)
    rule: dict[str, Any] = {"activation": activation, "keep_hidden": keep_hidden, "chosen": chosen}
    dtype = autocast_dtype(x)
    if dtype is None:
        return _run(x, (w1, b1, w2, b2), norm, gate, residual, **rule)
    product_dtype = torch.float32 if chosen == "cpu" else dtype  # as in projection
    layers = [cast(t, product_dtype) for t in (w1, b1, w2, b2)]
    out_dtype = x.dtype if residual else dtype
    if chosen == "cpu":
        x, norm, gate = x.float(), cast_norm(norm, torch.float32), cast(gate, torch.float32)
    normal = None if chosen in ("cpu", "triton") else norm_ref(x, norm)  # which autocast computes in float32
    with _backend.no_autocast(x):
        if normal is None:
            y = _run(x, layers, norm, gate, residual, **rule)
        else:
            y = _run(fitted(normal, dtype).to(dtype), layers, None, None, False, **rule)
            y = gated(x if residual else None, gate, y)
        return fitted(y, out_dtype).to(out_dtype)


def _run(
    x: Tensor,
    layers: Sequence[Any],
    norm: Norm | None,
    gate: Tensor | None,
    residual: bool,
    *,
    activation: str,
    keep_hidden: bool,
    chosen: str,
) -> Tensor:
    """The op on a backend, with autocast off.  On Triton x and the weights may differ in dtype."""
    w1, b1, w2, b2 = layers
    scale, shift, eps = (None, None, None) if norm is None else norm
    tensors = (x, w1, b1, w2, b2, scale, shift, gate)
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if chosen == "reference":
        rule: dict[str, Any] = {"activation": activation, "norm": norm, "gate": gate, "residual": residual}
        if records and not keep_hidden:
            replay: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(feed_forward_ref, x, w1, b1, w2, b2, **replay, **rule)
        return feed_forward_ref(x, w1, b1, w2, b2, **rule)
    number = ACTIVATION_NUMBERS[activation]
    if records:
        return FeedForwardFunction.apply(*tensors, number, eps, residual, keep_hidden, chosen)
    packed = (packed_weights(x, [w1], [b1]), packed_weights(x, [w2], [b2])) if chosen == "cpu" else ()
    run = op("feed_forward", chosen)
    return run(x, w1, b1, w2, b2, number, scale, shift, eps, gate, residual, False, *packed)[0]
