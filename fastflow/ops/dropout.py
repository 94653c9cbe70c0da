"""Dropout whose mask is kept nowhere: what is dropped is a pure function of a seed and of the place.

``x * kept / (1 - p)``, with :func:`dropout_mask`, which :func:`attention` applies to its probabilities, for the numbers
of x one after the other.  Kept for the backward pass is the seed; it does to the gradient what was
done to x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import backend as _backend
from fastflow.ops.half import fitted, saturated, widened
from fastflow.ops.registry import define, kernel, op

DTYPES = {"cpu": _backend.FLOATS, "triton": _backend.FLOATS}
PHILOX_ROUNDS = 7
_WORD = 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------ reference
def dropout_threshold(p: float) -> int:
    """Words below it drop; at most 2**32 - 1."""
    return min(round(p * 2**32), 2**32 - 1)


def threshold_as_int32(p: float) -> int:
    """The bits of the threshold as Triton's kernels take them."""
    threshold = dropout_threshold(p)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def draw_seed(device: torch.device) -> Tensor:
    """``[1]`` int64 from torch's generator on the device, without a read on the host."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


def dropout_mask(seed: Tensor, batch: int, heads: int, queries: int, keys: int, p: float) -> Tensor:
    """What is kept of ``[batch, heads, queries, keys]``, bool; every backend uses this function of place and seed.

    Philox4x32 (Salmon et al., SC 2011) with 7 rounds, key ``seed`` (64 bits, low word first) and counter
    ``(j // 4, i, b * heads + h, 0)``; word ``j % 4`` of the result, an unsigned integer, keeps (b, h, i, j) if it
    is at least ``round(p * 2**32)``.
    """
    grids = (torch.arange(-(-keys // 4)), torch.arange(queries), torch.arange(batch * heads))
    c0, c1, c2 = (grid.to(seed.device) for grid in grids)
    shape = (batch * heads, queries, c0.numel())
    c0, c1, c2 = c0.expand(shape), c1[:, None].expand(shape), c2[:, None, None].expand(shape)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed.view(-1)[0] & _WORD, (seed.view(-1)[0] >> 32) & _WORD
    for _ in range(PHILOX_ROUNDS):
        (high0, low0), (high2, low2) = _multiply(c0, 0xD2511F53), _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    words = torch.stack([c0, c1, c2, c3], -1).flatten(-2)[..., :keys]
    return (words >= dropout_threshold(p)).view(batch, heads, queries, keys)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words held in int64 (whose product would overflow)."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_ref(x: Tensor, p: float, *, seed: Tensor | None = None) -> Tensor:
    """The same as :func:`dropout` in plain PyTorch; without a seed, torch's own dropout with its own draws."""
    if seed is None:
        return saturated(F.dropout(x, p))
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = dropout_mask(seed, 1, 1, 1, x.numel(), p).view(x.shape)
    return fitted(x.to(wide) * (kept.to(wide) / (1 - p)), x.dtype).to(x.dtype)


# ------------------------------------------------------------------------------------------------ fused
define(
    "dropout",
    "(Tensor x, float p, Tensor seed) -> Tensor",
    lambda x, p, seed: x.new_empty(x.shape),
    kernel("dropout", "dropout"),
)


class DropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed, backend):  # type: ignore[no-untyped-def]
        ctx.p, ctx.backend = p, backend
        ctx.save_for_backward(seed)
        return op("dropout", backend)(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_x = op("dropout", ctx.backend)(widened(grad), ctx.p, *ctx.saved_tensors)
        return grad_x.to(grad.dtype), None, None, None


# ------------------------------------------------------------------------------------------------ public
def dropout(x: Tensor, p: float, *, seed: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Zero each number of x with probability p and divide the others by ``1 - p``.

    Args:
        x: float32, float64, float16 or bfloat16, any shape and strides, fewer than 2**34 numbers.
        p: in [0, 1).
        seed: ``[1]`` int64 that decides which; None draws one from torch's generator on the device (the reference
            then uses torch's own dropout).
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu`` or ``triton``.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    if x.dtype not in _backend.FLOATS:
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    if x.numel() >= 2**34:
        raise ValueError(f"x must have fewer than 2**34 numbers, got {x.numel()}")
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(f"seed must be one int64 on {x.device}, got {list(seed.shape)} {seed.dtype} on {seed.device}")
    chosen = _backend.select("dropout", x, DTYPES, backend)
    if chosen == "reference":
        return dropout_ref(x, p, seed=seed)
    seed = draw_seed(x.device) if seed is None else seed
    if torch.is_grad_enabled() and x.requires_grad:
        return DropoutFunction.apply(x, p, seed, chosen)
    return op("dropout", chosen)(x, p, seed)
