"""Make reads and writes of the wrong memory visible: NaN in fresh memory, sentinels around tensors, unusual strides."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SENTINEL = 12345.0  # exact in every dtype but bfloat16, which rounds it the same way each time
GUARD = 64  # sentinel elements on either side


@contextlib.contextmanager
def nan_memory() -> Iterator[None]:
    """Fresh memory from torch, in Python and in C++, holds NaN (the largest value, for integers)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


@contextlib.contextmanager
def guarded_allocations() -> Iterator[list[Tensor]]:
    """Tensors from ``new_empty`` get sentinels on both sides and NaN (-1) inside; on exit the sentinels must be intact.

    This is how the Python launchers allocate.  Yields the list of the guarded buffers.
    """
    buffers: list[Tensor] = []
    original = Tensor.new_empty

    def new_empty(self: Tensor, *size, dtype=None, device=None, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        buffer = original(self, 2 * GUARD + math.prod(shape), dtype=dtype, device=device).fill_(SENTINEL)
        buffers.append(buffer)
        inside = buffer[GUARD : buffer.numel() - GUARD]
        return inside.fill_(math.nan if buffer.is_floating_point() else -1).view(shape)

    Tensor.new_empty = new_empty  # type: ignore[assignment,method-assign]
    try:
        yield buffers
    finally:
        Tensor.new_empty = original  # type: ignore[method-assign]
    for buffer in buffers:
        sentinels = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        assert (sentinels == sentinels.new_tensor(SENTINEL)).all(), "a kernel wrote outside its output"


def embedded(x: Tensor, fill: float = math.nan) -> Tensor:
    """A copy of ``x`` in the middle of a larger tensor of ``fill``: whatever a kernel reads around it is not ``x``."""
    buffer = x.new_full([n + 4 for n in x.shape], fill)
    inner = buffer[tuple(slice(2, n + 2) for n in x.shape)]
    return inner.copy_(x)


def permuted(x: Tensor, *order: int) -> Tensor:
    """A copy of ``x`` whose memory runs in the given order of dimensions, outermost first."""
    inverse = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def spread(x: Tensor) -> Tensor:
    """A copy whose elements lie two apart, NaN between them."""
    around = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype, device=x.device)
    around[..., 0] = x
    return around[..., 0]


def strided_copies(x: Tensor) -> dict[str, Tensor]:
    """Equal tensors of shape [B, T, C] in other memory layouts, by name."""
    return {
        "contiguous": x.contiguous(),
        "channels first": permuted(x, 0, 2, 1),
        "batch last": permuted(x, 1, 2, 0),
        "embedded in NaN": embedded(x),
        "embedded in garbage": embedded(x, SENTINEL),
        "every second channel": torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(2)[..., ::2],
        "unaligned": torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape),
    }
