"""One step of an ODE solver with classifier-free guidance, from the estimator's output to its next input, in one pass.

``velocity`` holds the conditional rows and, after them, the unconditional ones::

    v = (1 + rate) * velocity[:B] - rate * velocity[B:]
    x + dt * v

Every operation is rounded by itself, in this order, as upstream computes it.  The result is written twice, one copy
below the other: so the estimator wants it next.  For inference: there is no backward pass.
"""

import torch
from torch import Tensor

from fastflow import backend as _backend
from fastflow.ops.half import fitted, saturated
from fastflow.ops.registry import define, kernel, op

DTYPES = dict.fromkeys(("cpu", "cuda", "triton"), _backend.FLOATS)

_SCHEMA = "(Tensor x, Tensor velocity, Tensor dt, float rate) -> (Tensor, Tensor)"


def _fake(x: Tensor, velocity: Tensor, dt: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The next x, or, where the second result has its dtype and so contains it, nothing; and two of it."""
    return x.new_empty(0 if x.dtype == velocity.dtype else x.shape), velocity.new_empty(velocity.shape)


define("euler_step", _SCHEMA, _fake, kernel("euler_step", "euler_step"))


def euler_step_ref(x: Tensor, velocity: Tensor, dt: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The same as :func:`euler_step` in plain PyTorch."""
    conditional, unconditional = velocity.to(x.dtype).chunk(2)
    guided = saturated(saturated((1.0 + rate) * conditional) - saturated(rate * unconditional))
    x = saturated(x + dt * guided)
    return x.contiguous(), fitted(x, velocity.dtype).to(velocity.dtype).repeat(2, 1, 1)


def _check(x: Tensor, velocity: Tensor, dt: Tensor) -> None:
    for name, tensor in (("x", x), ("velocity", velocity)):
        if tensor.dtype not in _backend.FLOATS:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, T, C], got {list(x.shape)}")
    if velocity.shape != (2 * x.shape[0], *x.shape[1:]):
        wanted = [2 * x.shape[0], *x.shape[1:]]
        raise ValueError(f"velocity must have shape {wanted}, twice the rows of x, got {list(velocity.shape)}")
    if dt.dim() != 0 or not dt.is_floating_point():
        raise ValueError(f"dt must be one floating-point number without dimensions, got {dt.dtype} {list(dt.shape)}")
    for name, tensor in (("velocity", velocity), ("dt", dt)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")
    for name, tensor in (("x", x), ("velocity", velocity)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"euler_step has no backward pass but {name} requires a gradient: use torch.no_grad()")


def euler_step(
    x: Tensor, velocity: Tensor, dt: Tensor, rate: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``x + dt * ((1 + rate) * velocity[:B] - rate * velocity[B:])``, once and twice.

    Args:
        x: ``[B, T, C]``, float32, float64, float16 or bfloat16, any strides.
        velocity: ``[2 * B, T, C]``, conditional rows first, any strides.  Its dtype may be lower than that of x, as
            under autocast; a higher one raises that of x.
        dt: the step, a tensor without dimensions on the device of x, so that no step waits for the host.
        rate: of the guidance.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Returns:
        The next x, ``[B, T, C]``, and two of it below each other, ``[2 * B, T, C]``, in the dtype of ``velocity``.
        Both are contiguous; they may share memory.  16-bit types are computed in float32 and rounded once.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.
        RuntimeError: an argument requires a gradient, or the chosen backend cannot run here, with the reason.
    """
    _check(x, velocity, dt)
    returned = velocity.dtype
    if x.dtype != returned:
        x = x.to(torch.promote_types(x.dtype, returned))
        if x.dtype != torch.float32:
            velocity = velocity.to(x.dtype)
    dt = dt.to(x.dtype)
    chosen = _backend.select("euler_step", x, DTYPES, backend)
    if chosen == "reference":
        after, doubled = euler_step_ref(x, velocity, dt, rate)
    else:
        after, doubled = op("euler_step", chosen)(x, velocity, dt, rate)
        after = doubled[: x.shape[0]] if x.dtype == velocity.dtype else after
    return after, doubled.to(returned)
