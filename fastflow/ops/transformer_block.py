"""A transformer block as one op, for inference, where the parts are so small that calling them one by one shows:

    x = x + gate_1 * (attention(norm_1(x)) @ out.T)        by projection, self_attention and projection
    x = x + gate_2 * feed_forward(norm_2(x))               by feed_forward

The kernels are those of these four ops; only the C++ backend has them in one call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow import backend as _backend
from fastflow.ops.attention import self_attention
from fastflow.ops.feed_forward import ACTIVATION_NUMBERS, feed_forward
from fastflow.ops.norm import Norm, check_signal
from fastflow.ops.packed import packed_weights
from fastflow.ops.projection import projection
from fastflow.ops.registry import define, op

DTYPES = dict.fromkeys(("cpu", "cuda", "triton"), _backend.FLOATS)
NAMES = ("q", "k", "v", "out", "w1", "w2")


def transformer_block_ref(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norms: tuple[Norm, Norm],
    gates: tuple[Tensor | None, Tensor | None],
    heads: int,
    activation: str,
    backend: str | None = "reference",
    **attention: Any,
) -> Tensor:
    """The same as :func:`transformer_block` by the ops that it is made of."""
    qkv = projection(x, weights[:3], biases[:3], norm=norms[0], backend=backend).unflatten(-1, (3, heads, -1))
    y = self_attention(qkv, **attention, backend=backend).flatten(2)
    x = projection(y, weights[3:4], biases[3:4], residual=x, gate=gates[0], backend=backend)
    rule: dict[str, Any] = {"activation": activation, "norm": norms[1], "gate": gates[1], "backend": backend}
    return feed_forward(x, weights[4], biases[4], weights[5], biases[5], **rule)


define(
    "transformer_block",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] norms, float eps_1, float eps_2, Tensor?[] gates, "
    "SymInt heads, int activation, Tensor? lengths, SymInt[]? sizes, SymInt chunk_size, float scale, Tensor? rotary, "
    "Tensor?[] packed) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    None,
)


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], heads: int, activation: str) -> None:
    """Validate what the op itself does not name well, without reading memory."""
    check_signal(x)
    if len(weights) != len(NAMES) or len(biases) != len(NAMES):
        raise ValueError(f"weights and biases must be those of {', '.join(NAMES)}; got {len(weights)}, {len(biases)}")
    channels, inner, hidden = x.shape[2], weights[0].shape[0], weights[4].shape[0]
    wanted = [(inner, channels)] * 3 + [(channels, inner), (hidden, channels), (channels, hidden)]
    for name, weight, shape in zip(NAMES, weights, wanted, strict=True):
        if weight.shape != shape:
            raise ValueError(f"the weight {name} must have shape {list(shape)}, got {list(weight.shape)}")
    if heads < 1 or inner % heads:
        raise ValueError(f"heads must divide the width {inner} of q, got {heads}")
    if activation not in ACTIVATION_NUMBERS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATION_NUMBERS)}; got {activation!r}")


def transformer_block(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norms: tuple[Norm, Norm],
    gates: tuple[Tensor | None, Tensor | None] = (None, None),
    heads: int,
    activation: str,
    lengths: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    chunk_size: int = 0,
    rotary: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The block at the top of this file.

    Where autograd records, under autocast, while tracing and on other backends than ``cpu`` it is the four ops.

    Args:
        x: ``[B, T, C]``, float32, float64, float16 or bfloat16.
        weights: of q, k and v ``[H * D, C]`` each, out ``[C, H * D]``, w1 ``[hidden, C]`` and w2 ``[C, hidden]``.
        biases: of the same, or None.
        norms: before attention and before the feed-forward.
        gates: ``[B, C]`` each, factors of what the two add to x.
        heads: H.
        activation: as for :func:`feed_forward`.
        lengths, sizes, chunk_size, rotary: as for :func:`self_attention`.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Returns:
        ``[B, T, C]`` of the dtype of x.

    Raises:
        ValueError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    _check(x, weights, biases, heads, activation)
    is_cpu = _backend.select("transformer_block", x, DTYPES, backend) == "cpu"
    single = type(x) is Tensor and not (
        torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    )
    if not (is_cpu and single):
        mask: dict[str, Any] = {"lengths": lengths, "sizes": sizes, "chunk_size": chunk_size, "rotary": rotary}
        rule: dict[str, Any] = {"norms": norms, "gates": gates, "heads": heads, "activation": activation}
        return transformer_block_ref(x, weights, biases, **rule, **mask, backend=backend)
    if rotary is not None:
        rotary = rotary.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    first, second = norms
    packed = [packed_weights(x, weights[:3], biases[:3])]
    packed += [packed_weights(x, weights[i : i + 1], biases[i : i + 1]) for i in (3, 4, 5)]
    return op("transformer_block", "cpu")(
        x, weights, biases, (first.scale, first.shift, second.scale, second.shift), first.eps, second.eps, gates, heads,
        ACTIVATION_NUMBERS[activation], lengths, sizes, chunk_size, (weights[0].shape[0] // heads) ** -0.5, rotary,
        packed,
    )  # fmt: skip
