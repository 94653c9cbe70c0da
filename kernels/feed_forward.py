"""Triton kernels of fastflow.ops.feed_forward: the activations between its products, which are cuBLAS's."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels.half import saturated

# By bytes of an element; BLOCK elements to a program.
FORWARD = {
    2: {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": True},
    4: {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": True},
    8: {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True},
}
BACKWARD = {
    2: {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True},
    4: {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True},
    8: {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": True},
}


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) and its derivative, which overflow nowhere and are exact on both sides."""
    power = tl.exp(-tl.abs(x))
    value = 1.0 / (1.0 + power)
    return tl.where(x < 0.0, power * value, value), power * value * value


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative; its number is that of csrc/linear.h."""
    if ACTIVATION == 1:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752440))
        return x * cdf, cdf + x * 0.39894228040143267794 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == 2:  # (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
        gate, slope = _sigmoid(1.59576912160573071176 * x * (1.0 + 0.044715 * x * x))
        return x * gate, gate + x * slope * 1.59576912160573071176 * (1.0 + 3 * 0.044715 * x * x)
    else:
        gate, slope = _sigmoid(x)
        return x * gate, gate + x * slope


@triton.jit
def _hidden(hidden_ptr, n, count, wide: tl.constexpr):
    """What goes into the activation; cuBLAS's product may be infinite."""
    return saturated(tl.load(hidden_ptr + n, mask=n < count, other=0.0).to(wide), hidden_ptr.dtype.element_ty)


@triton.jit
def activation_forward_kernel(out_ptr, hidden_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    wide: tl.constexpr = tl.float64 if hidden_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, _ = _activate(_hidden(hidden_ptr, n, count, wide), ACTIVATION)
    tl.store(out_ptr + n, value.to(out_ptr.dtype.element_ty), mask=n < count)


@triton.jit
def activation_backward_kernel(
    activated_ptr, grad_hidden_ptr, grad_ptr, hidden_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    wide: tl.constexpr = tl.float64 if hidden_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, slope = _activate(_hidden(hidden_ptr, n, count, wide), ACTIVATION)
    grad = tl.load(grad_ptr + n, mask=n < count, other=0.0).to(wide)
    tl.store(activated_ptr + n, value.to(activated_ptr.dtype.element_ty), mask=n < count)
    tl.store(grad_hidden_ptr + n, (grad * slope).to(grad_hidden_ptr.dtype.element_ty), mask=n < count)


# ------------------------------------------------------------------------------------------------ launchers
def activation_forward(hidden: Tensor, activation: int) -> Tensor:
    """Launch the activation of contiguous ``hidden``."""
    out = hidden.new_empty(hidden.shape)
    if count := hidden.numel():
        config = FORWARD[hidden.element_size()]
        with torch.cuda.device_of(hidden):
            activation_forward_kernel[(triton.cdiv(count, config["BLOCK"]),)](
                out, hidden, count, ACTIVATION=activation, **config
            )
    return out


def activation_backward(grad: Tensor, hidden: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel on contiguous tensors: the activation again, and the gradient of ``hidden``."""
    activated, grad_hidden = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)
    if count := hidden.numel():
        config = BACKWARD[hidden.element_size()]
        with torch.cuda.device_of(hidden):
            activation_backward_kernel[(triton.cdiv(count, config["BLOCK"]),)](
                activated, grad_hidden, grad, hidden, count, ACTIVATION=activation, **config
            )
    return activated, grad_hidden
