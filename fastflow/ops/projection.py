"""One or several linear layers of the same input as one product, from the norm before it to the residual after it:

    y = norm(x) @ concatenation(weights).T + concatenation(biases)
    y,  residual + y,  or  residual + gate[:, None] * y

Saved for the backward pass: x, mean and deviation of each frame, the weights; neither the normalised x nor y.  With
``G_b = grad_b.T @ norm(x)_b`` the gradient of the weight is ``sum_b gate_b * G_b`` and that of the gate of row b
``(weight * G_b).sum(1) + bias * sum_t grad_b``.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    sum_type,
    to_wide,
)
from fastflow.ops.packed import packed_weights
from fastflow.ops.registry import define, gpu_pass, kernel, op

DTYPES = dict.fromkeys(("cpu", "cuda", "triton"), _backend.FLOATS)
THIN_FRAMES = 16  # as in csrc/linear.h


def projection_ref(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The same as :func:`projection` in plain PyTorch."""
    x = norm_ref(x, norm)
    parts = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return gated(residual, gate, parts[0] if len(parts) == 1 else torch.cat(parts, -1))


# ------------------------------------------------------------------------------------------------ fused
def fake_stats(x: Tensor, eps: float | None) -> Tensor:
    return x.new_empty((0 if eps is None else 2, *x.shape[:2]), dtype=sum_type(x))


def _projection_fake(  # type: ignore[no-untyped-def]
    x, weights, biases, scale, shift, eps, residual, gate, packed=None
):
    like = weights[0] if residual is None else residual
    return like.new_empty(*x.shape[:2], sum(weight.shape[0] for weight in weights)), fake_stats(x, eps)


def fake_weight_gradients(  # type: ignore[no-untyped-def]
    x, rows, channels, gate, wants_weights, wants_bias
):
    """On the CPU: of a weight, its bias and its gate."""
    shapes = (rows, channels), (rows,), (x.shape[0], rows)
    wanted = wants_weights, wants_weights and (wants_bias or gate is not None), wants_weights and gate is not None
    return tuple(x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


def fake_vectors(x: Tensor, *vectors: Tensor | None) -> tuple[Tensor, ...]:
    """On the CPU: the gradients of scale and shift."""
    return tuple(x.new_empty((0,) if v is None else v.shape) for v in vectors)


def _projection_backward_fake(  # type: ignore[no-untyped-def]
    grad, scaled, x, stats, weights, bias, scale, shift, normalises, gate, wants_x, wants_weights, wants_bias
):
    grad_x = x.new_empty(x.shape if wants_x or normalises else (0,))
    linear = fake_weight_gradients(x, grad.shape[2], x.shape[2], gate, wants_weights, wants_bias)
    return grad_x, *linear, *fake_vectors(x, scale, shift)


def _gate_backward_fake(products, sums, weight, bias, gate):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), gate.new_empty(gate.shape)


def normalised_on_gpu(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """What goes into a product, ``[B * T, C]`` of its dtype, and the statistics to be saved."""
    if eps is None:
        return fitted(x, dtype).to(dtype).flatten(0, 1), fake_stats(x, eps)
    narrowed = () if x.dtype == dtype else (dtype,)  # by Triton alone
    y, stats = gpu_pass("norm_forward", backend)(x, scale, shift, eps, *narrowed)
    return y.flatten(0, 1), stats


def linear_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None, batch: int, frames: int) -> Tensor:
    """``[B * T, C]`` -> ``[B, T, N]``, not as a view: an autograd function's result must be safe to change in place."""
    y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    return torch.ops.aten._unsafe_view(y, [batch, frames, weight.shape[0]])


def on_gpu(  # type: ignore[no-untyped-def]
    backend: str, x, weights, biases, scale, shift, eps, residual, gate, packed=None
):
    """The op as a product of cuBLAS's between a pass before it and one after it."""
    y, stats = normalised_on_gpu(x, scale, shift, eps, weights[0].dtype, backend)
    y = linear_on_gpu(y, _joined(weights), _joined_biases(biases, weights), *x.shape[:2])
    return (saturated_(y) if residual is None else gpu_pass("gated_residual", backend)(y, residual, gate)), stats


define(
    "projection",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? scale, Tensor? shift, float? eps, Tensor? residual, "
    "Tensor? gate, Tensor? packed=None) -> (Tensor, Tensor)",
    _projection_fake,
    functools.partial(on_gpu, "triton"),
)
torch.library.impl("fastflow::projection", "cuda", functools.partial(on_gpu, "cuda"))
define(
    "gated_residual",
    "(Tensor y, Tensor residual, Tensor? gate) -> Tensor",
    lambda y, residual, gate: residual.new_empty(y.shape),
    kernel("projection", "gated_residual"),
)
define(
    "gate_backward",
    "(Tensor products, Tensor sums, Tensor weight, Tensor? bias, Tensor gate) -> (Tensor, Tensor, Tensor)",
    _gate_backward_fake,
    kernel("projection", "gate_backward"),
)


def product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float | None,
    backend: str,
) -> Tensor:
    """The fused op alone, for the backward pass of another."""
    return op("projection", backend)(x, weights, biases, scale, shift, eps, None, None)[0]


define(
    "projection_backward",
    "(Tensor grad, Tensor scaled, Tensor x, Tensor stats, Tensor[] weights, Tensor? bias, Tensor? scale, "
    "Tensor? shift, bool normalises, Tensor? gate, bool wants_x, bool wants_weights, bool wants_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _projection_backward_fake,
    None,
)


class WeightGradients(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None


NO_GRADIENTS = WeightGradients(None, None, None)


def weight_gradients(
    grad: Tensor,
    x: Tensor,
    backend: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> WeightGradients:
    """On a GPU, of ``gate[:, None] * (x @ weight.T + bias)``; without a gate no weight is needed either."""
    if gate is None:
        grad = grad.flatten(0, 1)
        return WeightGradients(grad.T @ x.flatten(0, 1), grad.sum(0), None)
    assert weight is not None
    products, sums = grad.transpose(1, 2) @ x, grad.sum(1, dtype=sum_type(grad))
    dense = [None if t is None else t.contiguous() for t in (products, sums, weight, bias)]
    return WeightGradients(*op("gate_backward", backend)(*dense, gate))


def to_input(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of what it belongs to; None for what is not there."""
    return None if grad is None or x is None else grad.to(x.dtype)


class ProjectionFunction(torch.autograd.Function):
    """``tensors``: ``count`` weights, then their biases."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps, residual, gate, backend, count, *tensors):  # type: ignore[no-untyped-def]
        weights, biases = tensors[:count], tensors[count:]
        out, stats = op("projection", backend)(x, weights, biases, scale, shift, eps, residual, gate)
        ctx.eps, ctx.backend, ctx.count = eps, backend, count
        ctx.save_for_backward(x, stats, scale, shift, gate, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, stats, scale, shift, gate, *tensors = ctx.saved_tensors
        weights, biases = tensors[: ctx.count], tensors[ctx.count :]
        needs = ctx.needs_input_grad
        backward = _backward_on_cpu if ctx.backend == "cpu" else functools.partial(_backward_on_gpu, ctx.backend)
        with torch.autocast(x.device.type, enabled=False):
            found = backward(
                grad, x, stats, weights, biases, scale, shift, ctx.eps is not None, gate, needs[0],
                needs[5] or any(needs[8:]), any(needs[8 + ctx.count :]),
            )  # fmt: skip
        grads = [None] * len(tensors)
        if found.weight is not None:
            sizes = [w.shape[0] for w in weights]
            of_biases = [None] * ctx.count if found.bias is None else found.bias.split(sizes)
            grads = [to_input(g, t) for g, t in zip((*found.weight.split(sizes), *of_biases), tensors, strict=True)]
        grad_x, grad_gate = to_input(found.x, x), to_input(found.gate, gate)
        of_norm = to_input(found.scale, scale), to_input(found.shift, shift)
        return grad_x, *of_norm, None, grad if needs[4] else None, grad_gate, None, None, *grads


class Gradients(NamedTuple):
    """None is what is not wanted, or not there."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def scaled_by(grad: Tensor, gate: Tensor | None) -> Tensor:
    return grad if gate is None else grad * gate[:, None]


def _backward_on_cpu(  # type: ignore[no-untyped-def]
    grad, x, stats, weights, biases, scale, shift, normalises, gate, wants_x, wants_weights, wants_bias
) -> Gradients:
    bias = None if gate is None else _joined_biases(biases, weights)
    grad, x, bias, scale, shift, gate = (to_wide(t) for t in (grad.contiguous(), x, bias, scale, shift, gate))
    weights = [to_wide(weight) for weight in weights]
    found = op("projection_backward", "cpu")(
        grad, scaled_by(grad, gate), x.contiguous(), stats, weights, bias, scale, shift, normalises, gate, wants_x,
        wants_weights, wants_bias,
    )  # fmt: skip
    there = (
        *(wants_x, wants_weights, wants_weights and wants_bias, wants_weights and gate is not None),
        *(scale is not None, shift is not None),
    )
    return Gradients(*(t if is_there else None for t, is_there in zip(found, there, strict=True)))


def _backward_on_gpu(  # type: ignore[no-untyped-def]
    backend, grad, x, stats, weights, biases, scale, shift, normalises, gate, wants_x, wants_weights, wants_bias
) -> Gradients:
    weight, linear = _joined(weights), NO_GRADIENTS
    grad = grad.to(weight.dtype)
    norm = NormBackward(None, x, None, None)
    if normalises:
        norm = norm_backward(scaled_by(grad, gate).to(weight.dtype) @ weight, x, stats, scale, shift, None, backend)
    elif wants_x:
        norm = norm._replace(grad_x=scaled_by(grad, gate).to(weight.dtype) @ weight)
    if wants_weights:
        bias = None if gate is None else _joined_biases(biases, weights)
        linear = weight_gradients(grad, norm.normalised, backend, weight, bias, gate)
    return Gradients(norm.grad_x, linear.weight, linear.bias, linear.gate, norm.grad_scale, norm.grad_shift)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))


def _joined_biases(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return _joined([w.new_zeros(w.shape[0]) if b is None else b for b, w in zip(biases, weights, strict=True)])


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def cast_norm(norm: Norm | None, dtype: torch.dtype) -> Norm | None:
    return norm if norm is None else Norm(cast(norm.scale, dtype), cast(norm.shift, dtype), norm.eps)


# ------------------------------------------------------------------------------------------------ public
def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Norm | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    """Validate the arguments without reading memory."""
    check_signal(x)
    batch, frames, channels = x.shape
    if not len(weights) or len(weights) != len(biases):
        raise ValueError(f"weights and biases must be as many, at least one; got {len(weights)} and {len(biases)}")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != channels:
            raise ValueError(f"weights[{i}] must have shape [N, {channels}], got {list(weight.shape)}")
        check_like(x, f"weights[{i}]", weight, weight.shape[0], channels)
        check_like(x, f"biases[{i}]", bias, weight.shape[0])
    check_norm(x, norm)
    width = sum(weight.shape[0] for weight in weights)
    if gate is not None and residual is None:
        raise ValueError("gate needs a residual")
    check_like(x, "residual", residual, batch, frames, width)
    check_like(x, "gate", gate, batch, width)


def projection(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Norm, linear layers, gate and residual as at the top of this file, in one pass over the frames.

    Under autocast the tensors may differ in dtype (float64 stays): the norm is float32, the product has the dtype of
    autocast, on ``cpu`` of its result alone, and the result that of the residual.

    Args:
        x: ``[B, T, C]``, float32, float64, float16 or bfloat16, any strides.
        weights: ``[N_i, C]`` each, as ``nn.Linear`` has them.
        biases: ``[N_i]`` or None for each weight.
        norm: applied to x first.
        residual: ``[B, T, N]`` with N the sum of the N_i, added to the result.
        gate: ``[B, N]``, factors of the result; needs a residual.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Returns:
        ``[B, T, N]`` of the dtype of x, but under autocast.  Norm and sums are float32 (float64 for float64).

    Raises:
        ValueError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    _check(x, weights, biases, norm, residual, gate)
    chosen = _backend.select("projection", x, DTYPES, backend)
    dtype = autocast_dtype(x)
    if dtype is None:
        return _run(x, weights, biases, norm, residual, gate, chosen)
    # The CPU's kernel multiplies in float32 whatever it is given: rounding the weights and what is added to the product
    # would only lose digits.
    product_dtype = torch.float32 if chosen == "cpu" else dtype
    weights, biases = [w.to(product_dtype) for w in weights], [cast(b, product_dtype) for b in biases]
    out_dtype = dtype if residual is None else residual.dtype
    if chosen == "cpu":
        x, norm = x.float(), cast_norm(norm, torch.float32)
        residual, gate = cast(residual, torch.float32), cast(gate, torch.float32)
    elif norm is None or chosen != "triton":
        x, norm = fitted(norm_ref(x, norm), dtype).to(dtype), None  # autocast normalises in float32
    with _backend.no_autocast(x):
        if chosen in ("cpu", "triton"):
            y = _run(x, weights, biases, norm, residual, gate, chosen)
        else:
            y = gated(residual, gate, _run(x, weights, biases, None, None, None, chosen))
        return fitted(y, out_dtype).to(out_dtype)


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Norm | None,
    residual: Tensor | None,
    gate: Tensor | None,
    chosen: str,
) -> Tensor:
    """The op on a backend, with autocast off.  On Triton x, weights and residual may differ in dtype."""
    if chosen == "reference":
        return projection_ref(x, weights, biases, norm=norm, residual=residual, gate=gate)
    scale, shift, eps = (None, None, None) if norm is None else norm
    given = (x, scale, shift, residual, gate, *weights, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        function = ProjectionFunction.apply
        return function(x, scale, shift, eps, residual, gate, chosen, len(weights), *weights, *biases)
    thin = x.shape[0] * x.shape[1] <= THIN_FRAMES  # reads a weight once, where it is
    packed = packed_weights(x, weights, biases) if chosen == "cpu" and not thin else None
    return op("projection", chosen)(x, weights, biases, scale, shift, eps, residual, gate, packed)[0]
