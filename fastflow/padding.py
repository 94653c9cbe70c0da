"""Padding of a batch: whether it takes part in the computation of a row, and how it is left out.

* ``upstream``: as upstream's, so GroupNorm counts padded frames, the length regulator of CosyVoice 1 stretches padded
  rows, and the last tokens of a row of CosyVoice 2 look ahead at padding.
* ``exact``: every row is what it is alone.

In the transformer blocks of an estimator, and with ``exact`` in those of an encoder, what treats each frame by itself
is computed on the frames of the rows alone, one row after the other (:class:`Packing`), where that saves enough and the
lengths can be read without stalling a device: for tensors on a CPU, but not on the reference.  ``attention`` and
``conv_block`` skip the padding by themselves.  Padded all the same are the convolutions that resample, the look-ahead,
the position embedding of the DiT, and narrow projections.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastflow import checks
from fastflow.backend import current_backend
from fastflow.ops.conv_block import PADDINGS, Padding
from fastflow.ops.half import saturated
from fastflow.ops.norm import Norm

LARGEST_SHARE = 0.9  # of the padded batch that the rows fill, up to which packing gains more than its copies cost


def check_padding(padding: str) -> None:
    """Raises ValueError: not one of ``PADDINGS``."""
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}; got {padding!r}")


class Padded(nn.Module):
    """A module that computes padded rows; setting its ``padding`` sets that of every part too."""

    _padding: Padding = "upstream"

    @property
    def padding(self) -> Padding:
        """What padding does to a row, ``"upstream"`` or ``"exact"``: see :mod:`fastflow.padding`."""
        return self._padding

    @padding.setter
    def padding(self, value: Padding) -> None:
        check_padding(value)
        for part in self.modules():
            if isinstance(part, Padded):
                part._padding = value

    @property
    def exact(self) -> bool:
        """Whether every row is what it is alone."""
        return self._padding == "exact"


class Packing(NamedTuple):
    """How ``[B, frames, C]`` becomes ``[1, N, C]``, the first ``sizes[b]`` frames of each row one after the other."""

    sizes: list[int]
    frames: int


def packing_of(lengths: Tensor, frames: int) -> Packing | None:
    """The packing of rows of ``lengths`` ``[B]`` in a batch ``frames`` wide; None where the batch stays padded."""
    if not checks.readable(lengths) or current_backend() == "reference":
        return None
    sizes = [min(n, frames) for n in lengths.tolist()]
    return Packing(sizes, frames) if 0 < sum(sizes) <= LARGEST_SHARE * len(sizes) * frames else None


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packing):  # type: ignore[no-untyped-def]
        ctx.packing = packing
        return torch.cat([row[:n] for row, n in zip(x, packing.sizes, strict=True)])[None]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Unpack.apply(grad, ctx.packing), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packing):  # type: ignore[no-untyped-def]
        ctx.packing = packing
        padded = x.new_empty(len(packing.sizes), packing.frames, *x.shape[2:])
        for row, n, frames in zip(padded, packing.sizes, x[0].split(packing.sizes), strict=True):
            row[:n] = frames
            row[n:] = 0
        return padded

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _Pack.apply(grad, ctx.packing), None


def pack(x: Tensor, packing: Packing | None) -> Tensor:
    """``[B, T, ...]`` -> ``[1, N, ...]``; x without a packing."""
    return x if packing is None else _Pack.apply(x, packing)


def unpack(x: Tensor, packing: Packing | None) -> Tensor:
    """``[1, N, ...]`` -> ``[B, T, ...]``, zero on padding; x without a packing."""
    return x if packing is None else _Unpack.apply(x, packing)


def _spread(rows: Tensor, packing: Packing) -> Tensor:
    """A vector for each row, ``[B, C]``, to each of its frames, ``[1, N, C]``."""
    return torch.cat([row.expand(n, -1) for row, n in zip(rows.split(1), packing.sizes, strict=True)])[None]


class _Scale(torch.autograd.Function):
    """``x * _spread(rows)``, of which the backward pass keeps x and rows."""

    @staticmethod
    def forward(ctx, x, rows, packing):  # type: ignore[no-untyped-def]
        ctx.packing = packing
        ctx.save_for_backward(x, rows)
        return saturated(x * _spread(rows, packing))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, rows = ctx.saved_tensors
        grad_x = grad * _spread(rows, ctx.packing)
        sums = torch.cat([part.sum(1) for part in (grad * x).split(ctx.packing.sizes, 1)])
        return grad_x.to(x.dtype), sums.to(rows.dtype), None


def scaled(x: Tensor, rows: Tensor | None, packing: Packing | None) -> Tensor:
    """Each frame times the vector of its row, ``[B, C]``; x where that is None."""
    if rows is None:
        return x
    return saturated(rows[:, None] * x) if packing is None else _Scale.apply(x, rows, packing)


def normalised(x: Tensor, norm: Norm | None, packing: Packing | None) -> tuple[Tensor, Norm | None]:
    """Packed frames after a norm whose scale and shift are ``[B, C]``, which an op cannot apply to them.

    Returns:
        x, and the norm that is left to an op.
    """
    if packing is None or norm is None or norm.scale is None or norm.shift is None:
        return x, norm
    x = F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    return saturated(scaled(x, norm.scale, packing) + _spread(norm.shift, packing)), None
