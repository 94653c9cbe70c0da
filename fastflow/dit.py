"""The diffusion transformer estimator of CosyVoice 3, on ``[B, T, C]``.  The key of every parameter is upstream's."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastflow.layers import (
    Linear,
    active,
    attend_self,
    feed_forward_residual,
    is_one_op,
    plain,
    project_residual,
    transform,
)
from fastflow.ops.grouped_conv import grouped_conv
from fastflow.ops.half import autocast_fitted, linear, saturated
from fastflow.ops.norm import Norm
from fastflow.ops.projection import projection
from fastflow.padding import Packing, Padded, normalised, pack, packing_of, unpack
from fastflow.recompute import Block, CheapBlock, Recomputing
from fastflow.unet import time_features

TIME_FEATURES = 256
CONV_POS_KERNEL, CONV_POS_GROUPS = 31, 16


class TimestepEmbedding(nn.Module):
    """Sinusoids of t through linear, SiLU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(Linear(TIME_FEATURES, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.time_mlp(time_features(t, TIME_FEATURES))


class CausalConvPositionEmbedding(nn.Module):
    """Twice: 30 zeros on the left, a grouped convolution of kernel 31, Mish.  Padding is not masked."""

    def __init__(self, dim: int) -> None:
        super().__init__()

        def conv() -> nn.Sequential:
            return nn.Sequential(nn.Conv1d(dim, dim, CONV_POS_KERNEL, groups=CONV_POS_GROUPS), nn.Mish())

        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        for layer, _mish in (self.conv1, self.conv2):
            conv = plain(layer, nn.Conv1d)
            x = grouped_conv(x, conv.weight, conv.bias, groups=conv.groups)
        return x


def _rest(cond: Tensor, mu: Tensor, spks: Tensor | None) -> list[Tensor]:
    """The channels after x, ``[B, T, C]`` each."""
    return [cond, mu] if spks is None else [cond, mu, spks[:, None].expand(-1, mu.shape[1], -1)]


class InputEmbedding(CheapBlock):
    """Project the channels x, cond, mu, spks (in this order) and add the convolutional position embedding."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, dim)
        self.conv_pos_embed = CausalConvPositionEmbedding(dim)

    def _compute(self, x: Tensor, cond: Tensor, mu: Tensor, spks: Tensor | None) -> Tensor:  # type: ignore[override]
        x = saturated(self.proj(autocast_fitted(torch.cat([x, *_rest(cond, mu, spks)], -1))))
        return saturated(x + self.conv_pos_embed(x))

    def invariant(self, cond: Tensor, mu: Tensor, spks: Tensor | None) -> Tensor:
        """The projection of all channels but those of x, ``[B, T, dim]``."""
        rest = torch.cat(_rest(cond, mu, spks), -1)
        proj = plain(self.proj)
        return linear(rest, proj.weight[:, -rest.shape[-1] :], proj.bias)

    def complete(self, x: Tensor, invariant: Tensor) -> Tensor:
        """What :meth:`forward` gives, from x and the projection of the rest."""
        x = projection(x, [self.proj.weight[:, : x.shape[-1]]], [None], residual=invariant)
        return saturated(x + self.conv_pos_embed(x))


class RotaryEmbedding(nn.Module):
    """Rotation angles of neighbouring channel pairs (2k, 2k+1)."""

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, frames: int) -> Tensor:
        """Cosine and sine of every angle, ``[2, T, dim / 2]``."""
        position = torch.arange(frames, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        angle = position[:, None] * self.inv_freq
        return torch.stack([angle.cos(), angle.sin()])


class Attention(Recomputing):
    """Self-attention with bias everywhere; the output is zero past a row's length."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head)
        self.to_k = nn.Linear(dim, heads * dim_head)
        self.to_v = nn.Linear(dim, heads * dim_head)
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)])

    @property
    def linears(self) -> tuple[Any, ...]:
        return self.to_q, self.to_k, self.to_v, self.to_out[0]

    def forward(
        self,
        x: Tensor,
        norm: Norm | None,
        gate: Tensor | None,
        lengths: Tensor,
        chunk_size: int,
        rotary: Tensor,
        packing: Packing | None = None,
    ) -> Tensor:
        """``x + gate * attention(norm(x))``; padding holds arbitrary values."""
        scale, shift, eps = (None, None, None) if norm is None else norm
        parts = (self.to_q, self.to_k, self.to_v)
        out = attend_self(
            functools.partial(self._qkv, eps, packing),
            x,
            scale,
            shift,
            *(plain(part).weight for part in parts),
            *(part.bias for part in parts),
            keep_qkv=self.keeps_heads(x),
            lengths=lengths,
            chunk_size=chunk_size,
            rotary=rotary,
            packing=packing,
        )
        last: Any = self.to_out[0]
        return project_residual(x, out, last, self.to_out[1], gate, packing)

    def _qkv(
        self,
        eps: float | None,
        packing: Packing | None,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *parts: Tensor,
    ) -> Tensor:
        x, norm = normalised(x, None if eps is None else Norm(scale, shift, eps), packing)
        return projection(x, parts[:3], parts[3:], norm=norm).unflatten(-1, (3, self.heads, -1))


class FeedForward(Recomputing):
    """Linear, GELU (tanh form), dropout, linear."""

    activation = "gelu_tanh"

    def __init__(self, dim: int, mult: int, dropout: float) -> None:
        super().__init__()
        project = nn.Sequential(nn.Linear(dim, mult * dim), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(project, nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    @property
    def linears(self) -> tuple[Any, ...]:
        layers: Any = self.ff
        return layers[0][0], layers[2]

    def forward(self, x: Tensor, norm: Norm | None, gate: Tensor | None, packing: Packing | None = None) -> Tensor:
        """``x + gate * feed_forward(norm(x))``."""
        rule: dict[str, Any] = {"activation": self.activation, "norm": norm, "gate": gate, "packing": packing}
        inner, outer = self.linears
        return feed_forward_residual(x, inner, outer, (self.ff[1], None), keep_hidden=self.keeps_products, **rule)


class AdaLayerNorm(nn.Module):
    """A linear of SiLU of the time embedding: ``parts`` vectors of shift, scale or gate, ``[B, parts * dim]``."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = Linear(dim, parts * dim)

    def forward(self, e: Tensor) -> Tensor:
        layer = plain(self.linear, Linear)
        return projection(e[:, None], [layer.weight], [layer.bias])[:, 0]


def modulated(shift: Tensor, scale: Tensor) -> Norm:
    """LayerNorm without parameters (eps 1e-6), then ``* (1 + scale) + shift``."""
    return Norm(1 + scale, shift, 1e-6)


class DiTBlock(Block):
    """Attention and feed-forward, each modulated before and gated after; order: shift, scale, gate, twice."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = AdaLayerNorm(dim, 6)
        self.attn = Attention(dim, heads, dim_head, dropout)
        self.ff = FeedForward(dim, ff_mult, dropout)

    @property
    def draws(self) -> bool:
        return active(self.attn.to_out[1]) or active(self.ff.ff[1])

    def is_one_op(self, x: Tensor) -> bool:
        return is_one_op(x, [(self.attn, Attention), (self.ff, FeedForward)], self.draws)

    def _compute(  # type: ignore[override]
        self,
        x: Tensor,
        modulation: Tensor,
        lengths: Tensor,
        chunk_size: int,
        rotary: Tensor,
        packing: Packing | None = None,
    ) -> Tensor:
        """``modulation``: ``[B, 6 * dim]``, what ``attn_norm`` gives."""
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, -1)
        norms, gates = (modulated(shift_attn, scale_attn), modulated(shift_ff, scale_ff)), (gate_attn, gate_ff)
        if self.is_one_op(x):
            linears, dropouts = (*self.attn.linears, *self.ff.linears), (self.attn.to_out[1], self.ff.ff[1])
            mask: dict[str, Any] = {"lengths": lengths, "chunk_size": chunk_size, "packing": packing, "rotary": rotary}
            mask |= {"keep": self.kept_parts(self.attn, self.ff, x)}
            rule: dict[str, Any] = {"gates": gates, "heads": self.attn.heads, "activation": self.ff.activation}
            return transform(x, linears, dropouts, norms, **rule, **mask)
        x = self.attn(x, norms[0], gates[0], lengths, chunk_size, rotary, packing)
        return self.ff(x, norms[1], gates[1], packing)


class Invariants(NamedTuple):
    """What the evaluations of a solver share: the input's projection but for x, lengths, packing, the rotary table."""

    input: Tensor
    lengths: Tensor
    packing: Packing | None
    rotary: Tensor


class DiT(Recomputing, Padded):
    """The estimator of CosyVoice 3.

    Args:
        dim: width; ``heads * dim_head`` is the attention width.
        depth: blocks.
        dropout: after the attention output and inside the feed-forward.
        ff_mult: the feed-forward's width is ``ff_mult * dim``.
        mel_dim: mel channels.
        mu_dim: channels of mu; default ``mel_dim``.
        long_skip_connection: concatenate the blocks' input to their output and project.
        spk_dim: channels of the speaker vector; default 0, no speaker vector.
        out_channels: equal to ``mel_dim``, as the velocity has the shape of the mel; upstream never reads it.
        static_chunk_size: frames of a chunk in streaming mode.
        num_decoding_left_chunks: ignored, as upstream does: all chunks to the left are seen.
    """

    ignores_padding = True  # frames that the mask hides change no other frame

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 8,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.1,
        ff_mult: int = 4,
        mel_dim: int = 80,
        mu_dim: int | None = None,
        long_skip_connection: bool = False,
        spk_dim: int | None = None,
        out_channels: int | None = None,
        static_chunk_size: int = 50,
        num_decoding_left_chunks: int = 2,
    ) -> None:
        super().__init__()
        mu_dim, spk_dim = mu_dim or mel_dim, spk_dim or 0
        self.time_embed = TimestepEmbedding(dim)
        self.input_embed = InputEmbedding(2 * mel_dim + mu_dim + spk_dim, dim)
        self.rotary_embed = RotaryEmbedding(dim_head)
        self.dim, self.depth, self.out_channels = dim, depth, out_channels
        self.static_chunk_size, self.num_decoding_left_chunks = static_chunk_size, num_decoding_left_chunks
        self.transformer_blocks = nn.ModuleList(DiTBlock(dim, heads, dim_head, ff_mult, dropout) for _ in range(depth))
        self.long_skip_connection = Linear(2 * dim, dim, bias=False) if long_skip_connection else None
        self.norm_out = AdaLayerNorm(dim, 2)
        self.proj_out = nn.Linear(dim, mel_dim)

    def time_table(self, t: Tensor) -> list[Tensor]:
        """All that depends on the times ``[n]`` alone: ``[n, 6 * dim]`` for every block, then ``[n, 2 * dim]``."""
        e = F.silu(self.time_embed(t))
        return [*(block.attn_norm(e) for block in self.transformer_blocks), self.norm_out(e)]  # type: ignore[operator]

    def invariants(self, mask: Tensor, mu: Tensor, spks: Tensor | None, cond: Tensor) -> Invariants:
        """All that depends on neither x nor t."""
        known = self.input_embed.invariant(cond.transpose(1, 2), mu.transpose(1, 2), spks)
        return Invariants(known, *self._lengths(mask), self.rotary_embed(mu.shape[2]))

    def _lengths(self, mask: Tensor) -> tuple[Tensor, Packing | None]:
        lengths = (mask[:, 0] > 0).sum(-1)
        return lengths, packing_of(lengths, mask.shape[2])

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        streaming: bool = False,
        time: Sequence[Tensor] | None = None,
        fixed: Invariants | None = None,
    ) -> Tensor:
        """The velocity at (x, t); arguments as :meth:`fastflow.ConditionalDecoder.forward`.

        With ``fixed``, neither mask, mu, spks nor cond is read.

        Returns:
            ``[B, 80, T]``; padded frames hold arbitrary finite values.
        """
        x, mu = x.transpose(1, 2), mu.transpose(1, 2)
        cond = torch.zeros_like(x) if cond is None else cond.transpose(1, 2)
        *modulations, last = self.time_table(t.expand(x.shape[0])) if time is None else time
        chunk = self.static_chunk_size if streaming else 0
        if fixed is None:
            x = self.input_embed(x, cond, mu, spks)
            (lengths, packing), rotary = self._lengths(mask), self.rotary_embed(x.shape[1])
        else:
            x = self.input_embed.complete(x, fixed.input)
            lengths, packing, rotary = fixed.lengths, fixed.packing, fixed.rotary
        skip = x
        x = pack(x, packing)
        for block, modulation in zip(self.transformer_blocks, modulations, strict=True):
            x = block(x, modulation, lengths, chunk, rotary, packing)
        x = unpack(x, packing)
        if self.long_skip_connection is not None:
            x = self.long_skip_connection(torch.cat([x, skip], -1))
        scale, shift = last.chunk(2, -1)
        norm = modulated(shift, scale)
        proj = plain(self.proj_out)
        return projection(x, [proj.weight], [proj.bias], norm=norm).transpose(1, 2)
