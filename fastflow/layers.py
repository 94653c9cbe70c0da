"""What the encoders and estimators share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastflow.backend import no_autocast
from fastflow.ops.attention import (
    RelativePosition,
    attention,
    restored_attention,
    restored_self_attention,
    self_attention,
)
from fastflow.ops.dropout import dropout
from fastflow.ops.feed_forward import ACTIVATIONS, feed_forward
from fastflow.ops.half import autocast_fitted, computes_half, linear, saturated
from fastflow.ops.norm import Norm
from fastflow.ops.projection import projection
from fastflow.ops.transformer_block import Part, is_fused, transformer_block
from fastflow.padding import Packing, normalised, pack, scaled
from fastflow.recompute import records, replayed


class Linear(nn.Linear):
    """``nn.Linear`` that saturates in float16: see :mod:`fastflow.ops.half`.  For what no op computes."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv1d(nn.Conv1d):
    """``nn.Conv1d`` that saturates in float16."""

    def forward(self, x: Tensor) -> Tensor:
        return saturated(super().forward(autocast_fitted(x)))


class ConvTranspose1d(nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` that saturates in float16."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = autocast_fitted(x)
        if x.device.type != "cpu" or not computes_half(x):
            return saturated(super().forward(x))
        # On a CPU torch adds the taps in float16, where infinities of both signs would meet.
        with no_autocast(x):
            bias = None if self.bias is None else self.bias.float()
            padding: Any = self.padding
            out = F.conv_transpose1d(x.float(), self.weight.float(), bias, self.stride, padding)
        return saturated(out.half())


def plain(layer: Any, kind: type[nn.Module] = nn.Linear) -> Any:
    """The layer, whose parameters a fused op reads instead of calling it.  Its forward hooks are not called.

    Raises:
        TypeError: its class computes something else than ``kind`` with them, as a LoRA or quantised layer does.
    """
    if type(layer).forward is not kind.forward:
        raise TypeError(
            f"a {type(layer).__module__}.{type(layer).__qualname__} stands for a {kind.__name__} that fastflow does "
            "not call, but reads the parameters of: merge LoRA weights into the layer, or use "
            "torch.nn.utils.parametrize, which changes the parameters themselves"
        )
    return layer


def rate_of(dropout: nn.Module | None) -> float:
    """The share of its input that a dropout drops, 0 in eval mode or without one."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def active(dropout: nn.Module | None) -> bool:
    """Whether a dropout drops anything."""
    return rate_of(dropout) > 0


def drop(x: Tensor, layer: nn.Module | None) -> Tensor:
    """What a dropout layer makes of x; x itself without one."""
    return dropout(x, rate_of(layer)) if active(layer) else x


def project_residual(
    x: Tensor,
    y: Tensor,
    layer: nn.Linear,
    last: nn.Module | None,
    gate: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """``x + gate * last(layer(y))``, with a gate ``[B, C]`` or without, and a dropout or None last.

    A gate of packed x needs the packing.
    """
    plain(layer)
    if packing is None and not active(last):
        return projection(y, [layer.weight], [layer.bias], residual=x, gate=gate)
    return saturated(x + scaled(drop(projection(y, [layer.weight], [layer.bias]), last), gate, packing))


def is_one_op(x: Tensor, parts: Sequence[tuple[nn.Module, type[nn.Module]]], drops: bool) -> bool:
    """Whether a transformer block of these parts may be one op on x, which calls none of them.

    So it may, unless a part does something else than its class, or a hook listens to it.
    """
    if _has_any_global_hook() or ((torch.is_grad_enabled() or drops) and not is_fused(x)):
        return False
    return all(
        type(part).forward is kind.forward
        and "forward" not in vars(part)
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        for part, kind in parts
    )


def transform(
    x: Tensor,
    linears: Sequence[nn.Linear],
    dropouts: Sequence[nn.Module],
    norms: tuple[Norm, Norm],
    *,
    keep: Sequence[Part],
    lengths: Tensor,
    packing: Packing | None = None,
    **options: Any,
) -> Tensor:
    """The transformer block of the layers of q, k, v, out and the two of the feed-forward.

    Args:
        dropouts: after out and inside the feed-forward.
        packing: of x and of the result.
        keep, lengths, options: as for :func:`transformer_block`.
    """
    options |= {"lengths": lengths} if packing is None else {"sizes": packing.sizes}
    weights, biases = [plain(layer).weight for layer in linears], [layer.bias for layer in linears]
    after, inside = (rate_of(layer) for layer in dropouts)
    return transformer_block(x, weights, biases, norms=norms, rates=(after, inside), keep=keep, **options)


def split_heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """``[B, T, 3, H, D]`` -> q, k and v ``[B, H, T, D]`` as views, whose gradients become that of qkv in one copy."""
    return tuple(x.transpose(1, 2) for x in qkv.unbind(2))


def attend(
    heads: Callable[..., Sequence[Tensor]],
    *tensors: Tensor | None,
    keep_heads: bool,
    packing: Packing | None = None,
    **options: Any,
) -> Tensor:
    """Attention of ``heads(*tensors)``, (q, k, v) or (q, k, v, position, bias_u, bias_v), with the heads side by side.

    Args:
        keep_heads: whether q, k and v are kept for the backward pass; else they are formed again there.
        packing: of the result.
        options: as for :func:`attention`.
    """
    if keep_heads:
        q, k, v, *rel = heads(*tensors)
        out = attention(q, k, v, rel_pos=RelativePosition(*rel) if rel else None, **options)
    else:
        out = restored_attention(heads, *tensors, **options)
    return pack(out.transpose(1, 2).flatten(2), packing)


def attend_self(
    qkv: Callable[..., Tensor],
    *tensors: Tensor | None,
    keep_qkv: bool,
    lengths: Tensor,
    packing: Packing | None = None,
    **options: Any,
) -> Tensor:
    """Self-attention of ``qkv(*tensors)``, ``[B, T, 3, H, D]``, with the heads side by side.

    Args:
        keep_qkv: whether qkv is kept for the backward pass; else it is formed again there.
        packing: of qkv and of the result.
        lengths, options: as for :func:`self_attention`.
    """
    options |= {"lengths": lengths} if packing is None else {"sizes": packing.sizes}
    out = self_attention(qkv(*tensors), **options) if keep_qkv else restored_self_attention(qkv, *tensors, **options)
    return out.flatten(2)


def feed_forward_residual(
    x: Tensor,
    inner: nn.Linear,
    outer: nn.Linear,
    dropouts: tuple[nn.Module, nn.Module | None],
    *,
    activation: str,
    norm: Norm | None,
    gate: Tensor | None = None,
    keep_hidden: bool = True,
    packing: Packing | None = None,
) -> Tensor:
    """``x + gate * last(outer(first(activation(inner(norm(x))))))``, with ``dropouts`` first and last.

    Packed x needs the packing if norm or gate differ between rows.
    """
    first, last = dropouts
    plain(inner), plain(outer)
    drops = active(first) or active(last)
    parameters = inner.weight, inner.bias, outer.weight, outer.bias
    if packing is None and not drops:
        return feed_forward(x, *parameters, activation=activation, norm=norm, gate=gate, keep_hidden=keep_hidden)

    def in_parts(x: Tensor) -> Tensor:
        y, rest = normalised(x, norm, packing)
        if drops:
            h = drop(ACTIVATIONS[activation](projection(y, [inner.weight], [inner.bias], norm=rest)), first)
            return project_residual(x, h, outer, last, gate, packing)
        y = feed_forward(y, *parameters, activation=activation, norm=rest, residual=False)
        return saturated(x + scaled(y, gate, packing))

    if keep_hidden or not records(inner, x):
        return in_parts(x)
    return replayed(in_parts, x, draws=drops)
