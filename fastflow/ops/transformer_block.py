"""A transformer block as one op, where the parts are so small that calling them one by one shows:

    x = x + gate_1 * dropout_1(attention(norm_1(x)) @ out.T)      by projection, self_attention and projection
    x = x + gate_2 * feed_forward(norm_2(x))                      by feed_forward, with dropout_2 inside

The kernels are those of these four ops; only the C++ backend has them in one call, forward and backward.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from fastflow import backend as _backend
from fastflow.ops.attention import self_attention
from fastflow.ops.dropout import draw_seed, dropout
from fastflow.ops.feed_forward import ACTIVATION_NUMBERS, ACTIVATIONS, feed_forward
from fastflow.ops.half import saturated
from fastflow.ops.norm import Norm, check_signal, norm_ref
from fastflow.ops.packed import packed_weights
from fastflow.ops.projection import projection
from fastflow.ops.registry import define, op

DTYPES = dict.fromkeys(("cpu", "cuda", "triton"), _backend.FLOATS)
NAMES = ("q", "k", "v", "out", "w1", "w2")
Part = Literal["inputs", "qkv", "hidden"]
PARTS: dict[Part, int] = {"inputs": 1, "qkv": 2, "hidden": 4}  # as in csrc/bindings.cpp; any brings the inputs
ADDED_FRAMES = 2048  # as in csrc/bindings.cpp


# ------------------------------------------------------------------------------------------------ by its parts
def _spread(vectors: Tensor, sizes: Sequence[int]) -> Tensor:
    """A vector for each row, ``[B, C]``, to each of its frames, ``[1, N, C]``."""
    return vectors.repeat_interleave(torch.tensor(sizes, device=vectors.device), 0)[None]


def _dropped(x: Tensor, rate: float, seed: Tensor | None, backend: str | None) -> Tensor:
    return dropout(x, rate, seed=seed, backend=backend) if rate else x


def transformer_block_ref(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norms: tuple[Norm, Norm],
    gates: tuple[Tensor | None, Tensor | None],
    heads: int,
    activation: str,
    sizes: Sequence[int] | None = None,
    rates: tuple[float, float] = (0.0, 0.0),
    seeds: tuple[Tensor | None, Tensor | None] = (None, None),
    backend: str | None = "reference",
    **attention: Any,
) -> Tensor:
    """The same as :func:`transformer_block` by the ops that it is made of."""

    def normalised(x: Tensor, norm: Norm) -> tuple[Tensor, Norm | None]:
        """The norm is left to an op, which knows no rows that lie one after the other."""
        if sizes is None or norm.scale is None or norm.scale.dim() == 1:
            return x, norm
        assert norm.shift is not None
        x = norm_ref(x, Norm(None, None, norm.eps))
        return saturated(x * _spread(norm.scale, sizes) + _spread(norm.shift, sizes)), None

    def added(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            y = saturated(y * (gate[:, None] if sizes is None else _spread(gate, sizes)))
        return saturated(x + y)

    normal, norm = normalised(x, norms[0])
    qkv = projection(normal, weights[:3], biases[:3], norm=norm, backend=backend).unflatten(-1, (3, heads, -1))
    y = self_attention(qkv, sizes=sizes, **attention, backend=backend).flatten(2)
    if not rates[0] and (sizes is None or gates[0] is None):
        x = projection(y, weights[3:4], biases[3:4], residual=x, gate=gates[0], backend=backend)
    else:
        y = projection(y, weights[3:4], biases[3:4], backend=backend)
        x = added(x, _dropped(y, rates[0], seeds[0], backend), gates[0])
    normal, norm = normalised(x, norms[1])
    rule: dict[str, Any] = {"activation": activation, "norm": norm, "backend": backend}
    if not rates[1] and norm is not None and (sizes is None or gates[1] is None):
        return feed_forward(x, weights[4], biases[4], weights[5], biases[5], gate=gates[1], **rule)
    if rates[1]:
        hidden = ACTIVATIONS[activation](projection(normal, weights[4:5], biases[4:5], norm=norm, backend=backend))
        y = projection(_dropped(hidden, rates[1], seeds[1], backend), weights[5:], biases[5:], backend=backend)
    else:
        y = feed_forward(normal, weights[4], biases[4], weights[5], biases[5], residual=False, **rule)
    return added(x, y, gates[1])


# ------------------------------------------------------------------------------------------------ fused
def _fake(  # type: ignore[no-untyped-def]
    x, weights, biases, norms, eps_1, eps_2, gates, heads, activation, lengths, sizes, *rest
):
    keep, (batch, frames, _), inner = rest[-1], x.shape, weights[0].shape[0]
    out = x.new_empty(x.shape)
    if not keep:
        return [out]
    rows, longest = (batch, frames) if sizes is None else (len(sizes), max(sizes))
    stats, nothing = x.new_empty(2, batch, frames), x.new_empty(0)
    qkv = x.new_empty(batch, frames, 3, heads, inner // heads) if keep & PARTS["qkv"] else nothing
    few = batch * frames <= ADDED_FRAMES
    added = [nothing if gate is None or not few else x.new_empty(x.shape) for gate in gates]
    hidden = x.new_empty(batch, frames, weights[4].shape[0]) if keep & PARTS["hidden"] else nothing
    attended, lse = x.new_empty(batch, frames, heads, inner // heads), x.new_empty(rows, heads, longest)
    return [out, stats, qkv, attended, lse, x.new_empty(x.shape), stats.new_empty(stats.shape), hidden, *added]


_SCHEMA = (
    "Tensor[] weights, Tensor?[] biases, Tensor?[] norms, float eps_1, float eps_2, Tensor?[] gates, int heads, "
    "int activation, Tensor? lengths, SymInt[]? sizes, SymInt chunk_size, float scale, Tensor? rotary, float[] rates, "
    "Tensor?[] seeds"
)
define("transformer_block", f"(Tensor x, {_SCHEMA}, Tensor?[] packed, int keep) -> Tensor[]", _fake, None)


def _backward_fake(  # type: ignore[no-untyped-def]
    grad, x, kept, weights, biases, norms, eps_1, eps_2, gates, *rest
):
    wanted = rest[-1]

    def of(bit: int, *likes: Tensor | None) -> list[Tensor]:
        return [x.new_empty((0,) if t is None or not wanted & bit else t.shape) for t in likes]

    qkv = x.new_empty(sum(w.shape[0] for w in weights[:3]), x.shape[2])
    bias = None if all(b is None for b in biases[:3]) else x.new_empty(qkv.shape[0])
    linears = *of(1, qkv, bias), *of(2, weights[3], weights[3][:, 0]), *of(4, weights[4], weights[4][:, 0])
    linears = *linears, *of(8, weights[5], weights[5][:, 0])
    return [x.new_empty(x.shape), *linears, *of(wanted, *norms), *of(2, gates[0]), *of(8, gates[1])]


define(
    "transformer_block_backward",
    f"(Tensor grad, Tensor x, Tensor[] kept, {_SCHEMA}, int wanted) -> Tensor[]",
    _backward_fake,
    None,
)


class _Rule(NamedTuple):
    """What the op is given beside x and parameters, in the order of the schema around them."""

    eps: tuple[float, float]
    heads: int
    activation: int
    lengths: Tensor | None
    sizes: Sequence[int] | None
    chunk_size: int
    scale: float
    rotary: Tensor | None
    rates: tuple[float, float]
    seeds: tuple[Tensor | None, Tensor | None]

    def arguments(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """``tensors``: weights, biases, norms and gates."""
        weights, biases, norms, gates = tensors[:6], tensors[6:12], tensors[12:16], tensors[16:]
        return weights, biases, norms, *self.eps, gates, *self[1:]


class TransformerBlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule, keep, x, *tensors):  # type: ignore[no-untyped-def]
        out, *kept = op("transformer_block", "cpu")(x, *rule.arguments(tensors), [None] * 4, keep)
        ctx.rule, ctx.count = rule, len(kept)
        ctx.save_for_backward(x, *kept, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, *rest = ctx.saved_tensors
        kept, tensors = rest[: ctx.count], rest[ctx.count :]
        needs = ctx.needs_input_grad[3:]
        groups = (0, 1, 2, 6, 7, 8), (3, 9, 16), (4, 10), (5, 11, 17)  # of tensors, by the product that they belong to
        wanted = sum(1 << bit for bit, group in enumerate(groups) if any(needs[i] for i in group))
        run = op("transformer_block_backward", "cpu")
        grad_x, w, b, *found = run(grad.contiguous(), x.contiguous(), kept, *ctx.rule.arguments(tensors), wanted)
        sizes = [weight.shape[0] for weight in tensors[:3]]
        weights, biases = (g.split(sizes) if g.dim() == 2 or g.numel() else (g,) * 3 for g in (w, b))
        # From the order of found, weights and biases in turn, to that of tensors.
        order = *weights, found[0], found[2], found[4], *biases, found[1], found[3], found[5], *found[6:]
        grads = (g if t is not None and n else None for g, t, n in zip(order, tensors, needs, strict=True))
        return None, None, grad_x if ctx.needs_input_grad[2] else None, *grads


# ------------------------------------------------------------------------------------------------ public
def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    heads: int,
    activation: str,
    rates: Sequence[float],
    keep: Sequence[str],
) -> None:
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
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"rates must lie in [0, 1), got {tuple(rates)}")
    if unknown := set(keep) - PARTS.keys():
        raise ValueError(f"keep may hold {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")


def is_fused(x: Tensor, backend: str | None = None) -> bool:
    """Whether :func:`transformer_block` of x is one op here."""
    return (
        type(x) in (Tensor, FakeTensor)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_dynamo_compiling()
        and (x.dtype in (torch.float32, torch.float64) or not torch.is_grad_enabled())
        and _backend.select("transformer_block", x, DTYPES, backend) == "cpu"
    )


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
    rates: tuple[float, float] = (0.0, 0.0),
    seeds: tuple[Tensor | None, Tensor | None] = (None, None),
    keep: Sequence[Part] = ("inputs", "qkv", "hidden"),
    backend: str | None = None,
) -> Tensor:
    """The block at the top of this file.

    Under autocast, while tracing, where autograd records float16 or bfloat16, and on other backends than ``cpu`` it is
    the four ops.

    Args:
        x: ``[B, T, C]``, float32, float64, float16 or bfloat16.
        weights: of q, k and v ``[H * D, C]`` each, out ``[C, H * D]``, w1 ``[hidden, C]`` and w2 ``[C, hidden]``.
        biases: of the same, or None.
        norms: before attention and before the feed-forward; their scale and shift are ``[C]``, or ``[B, C]``, where B
            is the number of ``sizes`` if these are given.
        gates: ``[B, C]`` each, factors of what the two add to x.
        heads: H.
        activation: as for :func:`feed_forward`.
        lengths, sizes, chunk_size, rotary: as for :func:`self_attention`.
        rates: shares to drop, in [0, 1), after out and inside the feed-forward.
        seeds: as for :func:`dropout`, of the two.
        keep: what the backward pass gets instead of computing it again, where the block is one op: the inputs of the
            sub-layers, with attention's output and, of up to 2048 frames, what gates scale; beside these q, k and v;
            and the hidden layer.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Returns:
        ``[B, T, C]`` of the dtype of x.

    Raises:
        ValueError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    _check(x, weights, biases, heads, activation, rates, keep)
    if not is_fused(x, backend):
        mask: dict[str, Any] = {"lengths": lengths, "sizes": sizes, "chunk_size": chunk_size, "rotary": rotary}
        rule: dict[str, Any] = {"norms": norms, "gates": gates, "heads": heads, "activation": activation}
        return transformer_block_ref(x, weights, biases, **rule, **mask, rates=rates, seeds=seeds, backend=backend)
    if rotary is not None:
        rotary = rotary.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    first, second = norms
    drawn = tuple(draw_seed(x.device) if r and s is None else s for r, s in zip(rates, seeds, strict=True))
    rest = _Rule(
        (first.eps, second.eps), heads, ACTIVATION_NUMBERS[activation], lengths, sizes, chunk_size,
        (weights[0].shape[0] // heads) ** -0.5, rotary, rates, drawn,  # type: ignore[arg-type]
    )  # fmt: skip
    tensors = *weights, *biases, first.scale, first.shift, second.scale, second.shift, *gates
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        bits = functools.reduce(operator.or_, (PARTS[part] for part in keep), 0)
        return TransformerBlockFunction.apply(rest, bits, x, *tensors)
    packed = [packed_weights(x, weights[:3], biases[:3])]
    packed += [packed_weights(x, weights[i : i + 1], biases[i : i + 1]) for i in (3, 4, 5)]
    return op("transformer_block", "cpu")(x, *rest.arguments(tensors), packed, 0)[0]
