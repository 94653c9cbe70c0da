"""Attention whose masks are numbers: key lengths, a chunk size and a limit of chunks to the left, never a tensor.

Query i of a row stands at position ``t = key_offset + i``.  It sees key j if

* ``j < lengths[b]``, and
* with a chunk size c > 0, ``j < (t // c + 1) * c``: its own chunk and all before it, and
* with ``num_left_chunks`` n >= 0 too, ``j >= (t // c - n) * c``.

With ``padded_queries=False`` the queries at positions from ``lengths[b]`` on see nothing, and cost nothing.  A query
that sees no key has the output 0 and gives no gradient.  The scores are

    score[i, j] = scale * q_i . k_j                                                     or, with a relative position,
    score[i, j] = scale * ((q_i + bias_u) . k_j + (q_i + bias_v) . position[Tk - 1 - t + j])

(Transformer-XL, section 3.3, with the table of ESPnet: row m belongs to the distance ``Tk - 1 - m``, so it runs from
the key furthest to the left to the one furthest to the right).  Dropout acts on the probabilities; whether one is kept
is a pure function of the seed and its place (:func:`dropout_mask`), so the backward pass recomputes it.

Saved for the backward pass: q, k, v, the output and the logarithm of each query's softmax sum (in a scale of the
backend's own); nothing of size Tq x Tk.  :func:`restored_attention` saves, instead of q, k and v, what they come from.

:func:`self_attention` takes q, k and v as one tensor, as a projection gives them, so that their gradient is one too.
Its rows may lie one after the other without padding, and it turns q and k by a rotary embedding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from fastflow import backend as _backend
from fastflow.ops.dropout import draw_seed, dropout_mask
from fastflow.ops.half import fitted, saturated, widened
from fastflow.ops.registry import define, kernel, op

HEAD_DIMS = range(8, 257, 8)
DTYPES = {"triton": _backend.FLOATS - {torch.float64}, "cpu": _backend.FLOATS}


class RelativePosition(NamedTuple):
    """The relative position term: ``position`` ``[H, 2*Tk-1, D]``, ``bias_u`` and ``bias_v`` ``[H, D]``."""

    position: Tensor
    bias_u: Tensor
    bias_v: Tensor


class _Options(NamedTuple):
    """Of :func:`attention`, which explains them."""

    lengths: Tensor | None = None
    chunk_size: int = 0
    num_left_chunks: int = -1
    dropout_p: float = 0.0
    seed: Tensor | None = None
    key_offset: int = 0
    padded_queries: bool = True
    scale: float | None = None

    def rule(self, q: Tensor) -> tuple[tuple, Tensor | None]:
        """The numbers of the fused op's schema, and the seed of its dropout."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        seed = self.seed
        if self.dropout_p and seed is None:
            seed = draw_seed(q.device)
        numbers = self.chunk_size, self.num_left_chunks, self.key_offset, self.padded_queries, scale, self.dropout_p
        return numbers, seed if self.dropout_p else None

    def check(self, q: Tensor, k: Tensor, v: Tensor, *rel: Tensor) -> None:
        """Validate the arguments without reading device memory."""
        _check(q, k, v, RelativePosition(*rel) if rel else None, self)


class _SelfOptions(NamedTuple):
    """Of :func:`self_attention`, which explains them."""

    lengths: Tensor | None = None
    sizes: Sequence[int] | None = None
    chunk_size: int = 0
    rotary: Tensor | None = None

    def rule(self, qkv: Tensor) -> tuple[tuple, Tensor | None]:
        """The numbers of the fused op's schema, and its rotary table."""
        rotary = self.rotary
        if rotary is not None:
            rotary = rotary.to(torch.promote_types(qkv.dtype, torch.float32)).contiguous()
        return (self.sizes, self.chunk_size, qkv.shape[-1] ** -0.5), rotary

    def check(self, qkv: Tensor) -> None:
        """Validate the arguments without reading device memory."""
        _check_self(qkv, *self)

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v ``[B, H, T, D]`` of padded rows, q and k turned."""
        self.check(qkv)
        if self.sizes is not None:
            qkv = pad_sequence(qkv[0].split(list(self.sizes)), batch_first=True)
        if self.rotary is not None:
            qkv = rotate_first_head(qkv, *self.rotary[:, : qkv.shape[1]])
        return tuple(x.transpose(1, 2) for x in qkv.unbind(2))

    def padded(self, device: torch.device) -> dict[str, Any]:
        """The options of :func:`attention` of these heads."""
        lengths = self.lengths if self.sizes is None else torch.tensor(self.sizes, device=device)
        return {"lengths": lengths, "chunk_size": self.chunk_size, "padded_queries": False}

    def result(self, out: Tensor) -> Tensor:
        """``[B, H, T, D]`` -> ``[B, T, H, D]``, the rows as those of qkv."""
        out = out.transpose(1, 2)
        if self.sizes is None:
            return out
        return torch.cat([row[:n] for row, n in zip(out, self.sizes, strict=True)])[None]


# ------------------------------------------------------------------------------------------------ masks
def length_mask(lengths: Tensor, frames: int) -> Tensor:
    """``[B, frames]`` bool: whether a frame lies inside its row."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def upstream_lengths(lengths: Tensor, frames: int) -> Tensor:
    """Upstream lets a row of length 0 see every key, so that its softmax is finite; as lengths ``[B]``."""
    return torch.where(lengths > 0, lengths, frames)


def visible_keys(
    lengths: Tensor | None,
    queries: int,
    keys: int,
    chunk_size: int = 0,
    num_left_chunks: int = -1,
    key_offset: int = 0,
    padded_queries: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """The rule at the top as a bool tensor that broadcasts to ``[B, queries, keys]``."""
    device = lengths.device if lengths is not None else device
    j = torch.arange(keys, device=device)
    t = torch.arange(queries, device=device)[:, None] + key_offset
    visible = torch.ones(1, 1, keys, dtype=torch.bool, device=device)
    if lengths is not None:
        visible = (j < lengths[:, None])[:, None]
        if not padded_queries:
            visible = visible & (t < lengths[:, None, None])
    if chunk_size > 0:
        chunk = t // chunk_size
        visible = visible & (j < (chunk + 1) * chunk_size)
        if num_left_chunks >= 0:
            visible = visible & (j >= (chunk - num_left_chunks) * chunk_size)
    return visible


# ------------------------------------------------------------------------------------------------ reference
def rel_shift(scores: Tensor, queries: int, keys: int, key_offset: int = 0) -> Tensor:
    """``[..., Tq, 2*Tk-1]`` scores by distance -> ``[..., Tq, Tk]``: (i, j) is column ``Tk-1-(key_offset+i)+j``."""
    i = torch.arange(queries, device=scores.device)[:, None] + key_offset
    column = keys - 1 - i + torch.arange(keys, device=scores.device)
    return scores.gather(-1, column.expand(*scores.shape[:-1], keys))


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    chunk_size: int = 0,
    num_left_chunks: int = -1,
    rel_pos: RelativePosition | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    key_offset: int = 0,
    padded_queries: bool = True,
    scale: float | None = None,
) -> Tensor:
    """The same as :func:`attention` in plain PyTorch, as upstream computes it: from a mask tensor.

    Without a seed the probabilities go through torch's own dropout.
    """
    queries, keys = q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rule = (lengths, queries, keys, chunk_size, num_left_chunks, key_offset, padded_queries, q.device)
    visible = visible_keys(*rule)[:, None]
    if rel_pos is None and not dropout_p:  # its result is 0, too, where no key is visible
        mask = None if lengths is None and chunk_size == 0 else visible
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if rel_pos is None:
        scores = saturated(q @ k.transpose(2, 3))
    else:
        position, bias_u, bias_v = rel_pos
        scores = saturated(saturated(q + bias_u[:, None]) @ k.transpose(2, 3))
        relative = saturated(saturated(q + bias_v[:, None]) @ position.transpose(1, 2))
        scores = saturated(scores + rel_shift(relative, queries, keys, key_offset))
    scores = saturated(scores * scale).masked_fill(~visible, float("-inf"))
    # The softmax of a query without any key would be 0 / 0: it sees zeros there, and its result is replaced.
    empty = ~visible.any(-1, keepdim=True)
    probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~visible, 0.0)
    if dropout_p and seed is None:
        probabilities = F.dropout(probabilities, dropout_p)
    elif dropout_p and seed is not None:
        keep = dropout_mask(seed, q.shape[0], q.shape[1], queries, keys, dropout_p)
        probabilities = probabilities * keep / (1 - dropout_p)
    return saturated(probabilities @ v)


def rotate_first_head(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels (2k, 2k+1) of head 0 of q and k, and of no other: upstream rotates before it splits
    ``[B, T, H*D]`` into heads.  ``[B, T, 3, H, D]`` and the cosines and sines ``[T, D/2]`` -> ``[B, T, 3, H, D]``.

    Computed in float32 at least, as upstream does under autocast.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    even, odd = qkv[:, :, :2, 0].to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = qkv.clone()
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    rotated[:, :, :2, 0] = fitted(turned, qkv.dtype)
    return rotated


# ------------------------------------------------------------------------------------------------ fused
# Results have the layout [B, T, H, D] in memory, seen as [B, H, T, D], so that heads merge without a copy.
_RULE = (
    "Tensor? lengths, SymInt chunk_size, SymInt num_left_chunks, SymInt key_offset, bool padded_queries, "
    "float scale, float dropout_p, Tensor? seed"
)
_REL = "Tensor position, Tensor bias_u, Tensor bias_v, "
_SCHEMAS = {
    "attention": f"(Tensor q, Tensor k, Tensor v, {_RULE}) -> (Tensor, Tensor)",
    "attention_backward": (
        f"(Tensor grad, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {_RULE}) -> (Tensor, Tensor, Tensor)"
    ),
    "relative_attention": f"(Tensor q, Tensor k, Tensor v, {_REL}{_RULE}) -> (Tensor, Tensor)",
    "relative_attention_backward": (
        f"(Tensor grad, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {_REL}{_RULE}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}
_SELF_RULE = "Tensor qkv, Tensor? lengths, SymInt[]? sizes, SymInt chunk_size, float scale, Tensor? rotary"
_SELF_SCHEMAS = {
    "self_attention": f"({_SELF_RULE}) -> (Tensor, Tensor)",
    "self_attention_backward": f"(Tensor grad, Tensor out, Tensor lse, {_SELF_RULE}) -> Tensor",
}


def _like_heads(x: Tensor) -> Tensor:
    batch, heads, frames, width = x.shape
    return x.new_empty((batch, frames, heads, width)).transpose(1, 2)


def _forward_fake(q, k, v, *rest):  # type: ignore[no-untyped-def]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _like_heads(q), q.new_empty(q.shape[:3], dtype=wide)


def _backward_fake(grad, out, lse, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return _like_heads(q), _like_heads(k), _like_heads(v)


def _relative_backward_fake(grad, out, lse, q, k, v, position, bias_u, bias_v, *rest):  # type: ignore[no-untyped-def]
    parameters = (x.new_empty(x.shape) for x in (position, bias_u, bias_v))
    return *_backward_fake(grad, out, lse, q, k, v), *parameters


def _self_forward_fake(qkv, lengths, sizes, *rest):  # type: ignore[no-untyped-def]
    batch, frames, _, heads, width = qkv.shape
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    rows = (batch, frames) if sizes is None else (len(sizes), functools.reduce(torch.sym_max, sizes, 0))
    return qkv.new_empty(batch, frames, heads, width), qkv.new_empty(rows[0], heads, rows[1], dtype=wide)


def _self_backward_fake(grad, out, lse, qkv, *rest):  # type: ignore[no-untyped-def]
    return qkv.new_empty(qkv.shape)


_FAKES: dict[str, Callable] = {
    "attention": _forward_fake,
    "attention_backward": _backward_fake,
    "relative_attention": _forward_fake,
    "relative_attention_backward": _relative_backward_fake,
    "self_attention": _self_forward_fake,
    "self_attention_backward": _self_backward_fake,
}
_NAMES = {1: "self_attention", 3: "attention", 6: "relative_attention"}  # by the number of differentiable tensors


for _name, _schema in _SCHEMAS.items():
    define(_name, _schema, _FAKES[_name], kernel("attention", _name))
for _name, _schema in _SELF_SCHEMAS.items():
    define(_name, _schema, _FAKES[_name], None)


def _gradients(ctx, grad, out, lse, tensors, lengths, last):  # type: ignore[no-untyped-def]
    """Of ``tensors``, as many."""
    backward = op(_NAMES[len(tensors)] + "_backward", ctx.backend)
    given = grad, out, lse, *tensors
    if ctx.backend == "cpu":
        given = map(widened, given)
    grads = backward(*given, lengths, *ctx.rule, last)
    return tuple(g.to(t.dtype) for g, t in zip((grads,) if len(tensors) == 1 else grads, tensors, strict=True))


class AttentionFunction(torch.autograd.Function):
    """``tensors`` is (q, k, v), (q, k, v, position, bias_u, bias_v) or (qkv,); ``rule`` the numbers of the schema and
    ``last`` its last tensor: the seed, or the rotary table.
    """

    @staticmethod
    def forward(ctx, backend, rule, lengths, last, *tensors):  # type: ignore[no-untyped-def]
        out, lse = op(_NAMES[len(tensors)], backend)(*tensors, lengths, *rule, last)
        ctx.backend, ctx.rule = backend, rule
        ctx.save_for_backward(lengths, last, out, lse, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        lengths, last, out, lse, *tensors = ctx.saved_tensors
        return None, None, None, None, *_gradients(ctx, grad, out, lse, tensors, lengths, last)


class RestoredAttentionFunction(torch.autograd.Function):
    """``heads(*tensors)`` gives what AttentionFunction calls its tensors, again in the backward pass."""

    @staticmethod
    def forward(ctx, heads, backend, options, *tensors):  # type: ignore[no-untyped-def]
        values = heads(*tensors)
        options.check(*values)
        (rule, last), lengths = options.rule(values[0]), options.lengths
        out, lse = op(_NAMES[len(values)], backend)(*values, lengths, *rule, last)
        ctx.heads, ctx.backend, ctx.rule, ctx.autocast = heads, backend, rule, _autocast(out.device.type)
        ctx.save_for_backward(lengths, last, out, lse, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        lengths, last, out, lse, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        # Aliases, so that hooks on the tensors see their gradients once, outside of here.
        aliases = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            heads = ctx.heads(*aliases)
        values = [x.detach() for x in heads]
        grads = _gradients(ctx, grad, out, lse, values, lengths, last)
        reached = [(x, g) for x, g in zip(heads, grads, strict=True) if x.requires_grad]
        wanted = [t for t, n in zip(aliases, needs, strict=True) if n]
        outputs, grads = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, None, None, *(next(found) if n else None for n in needs)


def _autocast(device_type: str) -> dict[str, object]:
    """The state of autocast, as arguments that restore it."""
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


# ------------------------------------------------------------------------------------------------ public
def _check_relative(q: Tensor, k: Tensor, rel_pos: RelativePosition) -> None:
    heads, width = q.shape[1], q.shape[3]
    if not k.shape[2]:
        raise ValueError("with rel_pos, k must hold at least one key, got none")
    wanted = {
        "rel_pos.position": (heads, 2 * k.shape[2] - 1, width),
        "rel_pos.bias_u": (heads, width),
        "rel_pos.bias_v": (heads, width),
    }
    for (name, shape), x in zip(wanted.items(), rel_pos, strict=True):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")


def _check_rule(name: str, x: Tensor, lengths: Tensor | None, chunk_size: int) -> None:
    if lengths is not None:
        if lengths.shape != x.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"lengths must be int32 or int64 of shape [{x.shape[0]}], got {list(lengths.shape)} {lengths.dtype}"
            )
        if lengths.device != x.device:
            raise ValueError(f"lengths is on {lengths.device} but {name} is on {x.device}")
    if chunk_size < 0:
        raise ValueError(f"chunk_size must be >= 0, where 0 means no chunks; got {chunk_size}")


def _check_self(
    qkv: Tensor, lengths: Tensor | None, sizes: Sequence[int] | None, chunk_size: int, rotary: Tensor | None
) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.dtype not in _backend.FLOATS:
        raise ValueError(f"qkv must have shape [B, T, 3, H, D] and a floating dtype, got {list(qkv.shape)} {qkv.dtype}")
    batch, frames, _, _, width = qkv.shape
    if width not in HEAD_DIMS:
        raise ValueError(f"the head dimension must be a multiple of 8 up to 256, got {width}")
    _check_rule("qkv", qkv, lengths, chunk_size)
    if sizes is not None:
        if lengths is not None or batch != 1:
            given = "none" if lengths is None else "some"
            raise ValueError(f"sizes need B == 1 and no lengths, got B == {batch} and {given}")
        if not sizes or any(n < 0 for n in sizes) or sum(sizes) != frames:
            raise ValueError(f"sizes must be numbers >= 0 with the sum {frames}, got {list(sizes)}")
        frames = max(sizes)
    if rotary is None:
        return
    if rotary.dim() != 3 or rotary.shape[::2] != (2, width // 2) or rotary.shape[1] < frames:
        raise ValueError(
            f"rotary must have shape [2, frames, {width // 2}] with at least {frames} frames, got {list(rotary.shape)}"
        )
    if not rotary.is_floating_point() or rotary.device != qkv.device:
        raise ValueError(f"rotary is {rotary.dtype} on {rotary.device} but qkv is {qkv.dtype} on {qkv.device}")


def _check(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition | None, options: _Options) -> None:
    """Validate the arguments without reading device memory."""
    lengths, chunk_size, num_left_chunks, dropout_p, seed, key_offset, _, _ = options
    if q.dim() != 4 or q.dtype not in _backend.FLOATS:
        raise ValueError(f"q must have shape [B, H, Tq, D] and a floating dtype, got {list(q.shape)} {q.dtype}")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"the head dimension must be a multiple of 8 up to 256, got {q.shape[3]}")
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have shape {[*q.shape[:2], 'Tk', q.shape[3]]}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
    if rel_pos is not None:
        _check_relative(q, k, rel_pos)
        if key_offset + q.shape[2] > k.shape[2]:
            end = key_offset + q.shape[2]
            raise ValueError(f"with rel_pos, key_offset + Tq must be at most Tk {k.shape[2]}, got {end}")
    tensors = {"k": k, "v": v, **(rel_pos._asdict() if rel_pos is not None else {})}
    for name, x in tensors.items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}")
    _check_rule("q", q, lengths, chunk_size)
    if num_left_chunks >= 0 and chunk_size == 0:
        raise ValueError(f"num_left_chunks {num_left_chunks} needs a chunk_size > 0")
    if key_offset < 0:
        raise ValueError(f"key_offset must be >= 0, got {key_offset}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device):
        raise ValueError(f"seed must be one int64 on {q.device}, got {list(seed.shape)} {seed.dtype} on {seed.device}")


def _records(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is done with them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    chunk_size: int = 0,
    num_left_chunks: int = -1,
    rel_pos: RelativePosition | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    key_offset: int = 0,
    padded_queries: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with the masks and the position term described at the top of this file.

    Args:
        q: ``[B, H, Tq, D]``, float32, float64, float16 or bfloat16, any strides; D a multiple of 8 up to 256.
        k, v: ``[B, H, Tk, D]``.
        lengths: ``[B]`` int32 or int64 valid keys of each row, never read on the host; None: all.
        chunk_size: frames of a chunk; 0: no chunks.
        num_left_chunks: chunks seen to the left of a query's own; negative: all.
        rel_pos: the relative position term, or None.
        dropout_p: share of the probabilities to drop, in [0, 1).
        seed: ``[1]`` int64 that decides which; None draws one from torch's generator on the device (the reference
            then uses torch's own dropout).
        key_offset: position of the first query among the keys, for queries that continue cached keys.
        padded_queries: whether queries past a row's length are computed like the others, as the length regulator of
            CosyVoice 1 wants it; False skips them, their output is 0.
        scale: of the scores; None: ``1 / sqrt(D)``.
        backend: ``auto`` (None takes the one in force), ``reference``, ``cpu`` or ``triton``.

    Returns:
        ``[B, H, Tq, D]`` of the dtype of q.  Softmax and sums are float32 (float64 for float64).

    Raises:
        ValueError: arguments that do not fit, by name.
        RuntimeError: the chosen backend cannot run here, with the reason.
    """
    options = _Options(lengths, chunk_size, num_left_chunks, dropout_p, seed, key_offset, padded_queries, scale)
    _check(q, k, v, rel_pos, options)
    chosen = _backend.select("attention", q, DTYPES, backend)
    if chosen == "reference":
        return attention_ref(q, k, v, rel_pos=rel_pos, **options._asdict())
    rule, seed = options.rule(q)
    tensors = (q, k, v) if rel_pos is None else (q, k, v, *rel_pos)
    if _records(tensors):
        return AttentionFunction.apply(chosen, rule, lengths, seed, *tensors)
    return op("attention" if rel_pos is None else "relative_attention", chosen)(*tensors, lengths, *rule, seed)[0]


def restored_attention(
    heads: Callable[..., Sequence[Tensor]], *tensors: Tensor | None, backend: str | None = None, **options: Any
) -> Tensor:
    """:func:`attention` of ``heads(*tensors)``, which the backward pass calls again instead of keeping its result.

    Kept are ``tensors``, the output and the softmax sums; the reference keeps ``tensors`` and computes all again.

    Args:
        heads: gives (q, k, v), or (q, k, v, position, bias_u, bias_v) with a relative position; it must draw nothing
            at random and see no tensor that needs a gradient but ``tensors``.
        tensors: the first is not None, and has the dtype of q or is cast to it by autocast.
        backend, options: as for :func:`attention`.

    Returns:
        ``[B, H, Tq, D]`` of the dtype of q.

    Raises:
        ValueError, RuntimeError: as :func:`attention`.
    """
    first = tensors[0]
    assert first is not None
    chosen = _backend.select("attention", first, DTYPES, backend)

    def compute(*tensors: Tensor | None) -> Tensor:
        q, k, v, *rel = heads(*tensors)
        return attention(q, k, v, rel_pos=RelativePosition(*rel) if rel else None, backend=chosen, **options)

    if not _records(tensors):
        return compute(*tensors)
    if chosen == "reference":
        draws = bool(options.get("dropout_p")) and options.get("seed") is None
        return checkpoint(compute, *tensors, use_reentrant=False, preserve_rng_state=draws)
    return RestoredAttentionFunction.apply(heads, chosen, _Options(**options), *tensors)


def self_attention(
    qkv: Tensor,
    *,
    lengths: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    chunk_size: int = 0,
    rotary: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`attention` of q, k and v that are one tensor, in which queries past a row's length cost nothing.

    Args:
        qkv: ``[B, T, 3, H, D]``, of the dtypes and D of :func:`attention`, any strides.
        lengths: ``[B]`` as there.
        sizes: frames of each row, where the rows lie one after the other in one row of qkv (B is 1, and lengths is
            None); their sum is T.
        chunk_size: as there.
        rotary: ``[2, frames, D/2]``, cosines and sines by which :func:`rotate_first_head` turns q and k at each frame
            of a row; frames is that of the longest row at least.  No gradient goes to it.
        backend: as there.  Those without a kernel of their own copy rows that are not padded, and turned heads.

    Returns:
        ``[B, T, H, D]`` of the dtype of qkv, zero past the lengths.

    Raises:
        ValueError, RuntimeError: as there.
    """
    options = _SelfOptions(lengths, sizes, chunk_size, rotary)
    options.check(qkv)
    chosen = _backend.select("self_attention", qkv, DTYPES, backend)
    if chosen != "cpu":
        return options.result(attention(*options.heads(qkv), **options.padded(qkv.device), backend=chosen))
    rule, table = options.rule(qkv)
    if _records((qkv,)):
        return AttentionFunction.apply(chosen, rule, lengths, table, qkv)
    return op("self_attention", chosen)(qkv, lengths, *rule, table)[0]


def restored_self_attention(
    qkv: Callable[..., Tensor], *tensors: Tensor | None, backend: str | None = None, **options: Any
) -> Tensor:
    """:func:`self_attention` of ``qkv(*tensors)``, which the backward pass calls again: see :func:`restored_attention`.

    Args:
        qkv: gives ``[B, T, 3, H, D]``.
        tensors: as for :func:`restored_attention`.
        backend, options: as for :func:`self_attention`.

    Returns:
        ``[B, T, H, D]`` of the dtype of qkv.

    Raises:
        ValueError, RuntimeError: as :func:`self_attention`.
    """
    first = tensors[0]
    assert first is not None
    chosen, given = _backend.select("self_attention", first, DTYPES, backend), _SelfOptions(**options)
    if chosen == "cpu" and _records(tensors):
        return RestoredAttentionFunction.apply(lambda *parts: (qkv(*parts),), chosen, given, *tensors)
    if chosen == "cpu":
        return self_attention(qkv(*tensors), backend=chosen, **options)
    padded = given.padded(first.device)
    return given.result(restored_attention(lambda *t: given.heads(qkv(*t)), *tensors, backend=chosen, **padded))
