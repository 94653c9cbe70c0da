"""The U-Net estimators of CosyVoice 1 (GroupNorm) and 2 (causal convolutions, LayerNorm).

Everything between the ends works on ``[B, T, C]``.  The key of every parameter is upstream's.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastflow.layers import (
    Conv1d,
    ConvTranspose1d,
    Linear,
    active,
    attend_self,
    feed_forward_residual,
    is_one_op,
    plain,
    project_residual,
    transform,
)
from fastflow.ops.conv_block import conv_block
from fastflow.ops.half import autocast_dtype
from fastflow.ops.norm import Norm
from fastflow.ops.projection import projection
from fastflow.padding import Packing, Padded, pack, packing_of, unpack
from fastflow.recompute import Block, Recomputing


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoids of ``1000 * t``: ``[B]`` or a 0-dimensional t -> ``[B, width]``, all sines before all cosines.

    ``freq_k = exp(-k * ln(10000) / (width / 2 - 1))`` is float32; the result has the dtype of t.
    """
    half = width // 2
    freq = torch.exp(torch.arange(half, device=t.device).float() * -(math.log(10000.0) / (half - 1)))
    angle = 1000 * t.reshape(-1, 1) * freq
    return torch.cat([angle.sin(), angle.cos()], -1).to(t.dtype)


class TimestepEmbedding(nn.Module):
    """``linear_2(SiLU(linear_1(x)))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, hidden)
        self.linear_2 = Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def conv(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution of ``[B, T, C]``."""
    return module(x.transpose(1, 2)).transpose(1, 2)


class CausalConv1d(Conv1d):
    """A convolution of kernel 3 that sees the present and the two frames before it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Block1D(Recomputing, Padded):
    """``Mish(norm(conv3(x * mask))) * mask``."""

    def __init__(self, dim: int, dim_out: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        if causal:  # the indices are those of upstream, which transposes around its norm
            norm: list[nn.Module] = [nn.Identity(), nn.LayerNorm(dim_out), nn.Identity()]
            self.block = nn.Sequential(CausalConv1d(dim, dim_out, 3), *norm, nn.Mish())
        else:
            self.block = nn.Sequential(nn.Conv1d(dim, dim_out, 3, padding=1), nn.GroupNorm(8, dim_out), nn.Mish())

    def forward(self, x: Tensor, lengths: Tensor, time_bias: Tensor | None = None) -> Tensor:
        conv = plain(self.block[0], CausalConv1d if self.causal else nn.Conv1d)
        norm: Any = self.block[2 if self.causal else 1]
        return conv_block(
            x,
            conv.weight,
            conv.bias,
            norm.weight,
            norm.bias,
            lengths=lengths,
            groups=0 if self.causal else norm.num_groups,
            causal=self.causal,
            time_bias=time_bias,
            eps=norm.eps,
            padding=self.padding,
            keep_product=self.keeps_products,
        )


class ResnetBlock1D(Block):
    """Two blocks with the time embedding between them, and a projected residual; padding holds arbitrary values."""

    def __init__(self, dim: int, dim_out: int, time_emb_dim: int, causal: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), Linear(time_emb_dim, dim_out))
        self.block1 = Block1D(dim, dim_out, causal)
        self.block2 = Block1D(dim_out, dim_out, causal)
        self.res_conv = nn.Conv1d(dim, dim_out, 1)

    def _compute(  # type: ignore[override]
        self, x: Tensor, lengths: Tensor, time_bias: Tensor, packing: Packing | None = None
    ) -> Tensor:
        """``time_bias``: ``[B, dim_out]``, what ``mlp`` gives.  The result is packed, x is not."""
        h = self.block2(self.block1(x, lengths, time_bias), lengths)
        if autocast_dtype(h) is not None:
            # As upstream's norm gives it on a GPU: from here to the next convolution all is added to it, and beside the
            # hundreds that it grows to bfloat16 would lose what a block adds.
            h = h.float()
        last = plain(self.res_conv, nn.Conv1d)
        return projection(pack(x, packing), [last.weight[:, :, 0]], [last.bias], residual=pack(h, packing))


class Attention(Recomputing):
    """Self-attention without bias on q, k and v; the inner width differs from the channels."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim), nn.Dropout(dropout)])

    @property
    def linears(self) -> tuple[Any, ...]:
        return self.to_q, self.to_k, self.to_v, self.to_out[0]

    def forward(
        self, x: Tensor, norm: Norm, lengths: Tensor, chunk_size: int, packing: Packing | None = None
    ) -> Tensor:
        """``x + attention(norm(x))``."""
        out = attend_self(
            functools.partial(self._qkv, norm.eps),
            x,
            norm.scale,
            norm.shift,
            *(plain(part).weight for part in (self.to_q, self.to_k, self.to_v)),
            keep_qkv=self.keeps_heads(x),
            lengths=lengths,
            chunk_size=chunk_size,
            packing=packing,
        )
        last: Any = self.to_out[0]
        return project_residual(x, out, last, self.to_out[1])

    def _qkv(self, eps: float, x: Tensor, scale: Tensor, shift: Tensor, *weights: Tensor) -> Tensor:
        return projection(x, weights, [None] * 3, norm=Norm(scale, shift, eps)).unflatten(-1, (3, self.heads, -1))


class GELU(nn.Module):
    """A projection and the exact (erf) GELU."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim_out)


class FeedForward(Recomputing):
    """Four times the width inside."""

    activation = "gelu"

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    @property
    def linears(self) -> tuple[Any, ...]:
        layers: Any = self.net
        return layers[0].proj, layers[2]

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        """``x + feed_forward(norm(x))``."""
        rule: dict[str, Any] = {"activation": self.activation, "norm": norm}
        inner, outer = self.linears
        return feed_forward_residual(x, inner, outer, (self.net[1], None), keep_hidden=self.keeps_products, **rule)


class TransformerBlock(Block):
    """Pre-norm attention and feed-forward on ``[B, T, C]``, or ``[1, N, C]`` with a packing."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, head_dim, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)

    @property
    def draws(self) -> bool:
        return active(self.attn1.to_out[1]) or active(self.ff.net[1])

    def is_one_op(self, x: Tensor) -> bool:
        return is_one_op(x, [(self.attn1, Attention), (self.ff, FeedForward)], self.draws)

    def _compute(  # type: ignore[override]
        self, x: Tensor, lengths: Tensor, chunk_size: int, packing: Packing | None = None
    ) -> Tensor:
        norms = (
            Norm(self.norm1.weight, self.norm1.bias, self.norm1.eps),
            Norm(self.norm3.weight, self.norm3.bias, self.norm3.eps),
        )
        if self.is_one_op(x):
            linears, dropouts = (*self.attn1.linears, *self.ff.linears), (self.attn1.to_out[1], self.ff.net[1])
            mask: dict[str, Any] = {"lengths": lengths, "chunk_size": chunk_size, "packing": packing}
            rule: dict[str, Any] = {
                "keep": self.kept_parts(self.attn1, self.ff, x),
                "heads": self.attn1.heads,
                "activation": self.ff.activation,
            }
            return transform(x, linears, dropouts, norms, **rule, **mask)
        return self.ff(self.attn1(x, norms[0], lengths, chunk_size, packing), norms[1])


class Resample(nn.Module):
    """Halve (stride 2) or double (transposed) the number of frames."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Stage(nn.ModuleList):
    """A resnet block, transformer blocks and, except in the middle, the resampling that the caller applies after."""

    def forward(
        self, x: Tensor, lengths: Tensor, time_bias: Tensor, chunk_size: int, packing: Packing | None
    ) -> Tensor:
        x = self[0](x, lengths, time_bias, packing)
        blocks: Any = self[1]
        for block in blocks:
            x = block(x, lengths, chunk_size, packing)
        return unpack(x, packing)


class Invariants(NamedTuple):
    """What the evaluations of a solver share: all channels but those of x, and by level masks, lengths, packing."""

    input: Tensor
    masks: list[Tensor]
    lengths: list[Tensor]
    packings: list[Packing | None]


class ConditionalDecoder(Recomputing, Padded):
    """The U-Net of CosyVoice 1.  ``channels`` has one entry per level; between two levels time is halved.

    Args:
        in_channels: width of x, mu, spks and cond together (320).
        out_channels: mel channels (80).
        channels: width of each level.
        dropout: after the attention output and inside the feed-forward.
        attention_head_dim, num_heads: attention width is their product.
        n_blocks: transformer blocks per level and middle block.
        num_mid_blocks: middle blocks.
        act_fn: only ``"gelu"`` exists, as in the published configurations.
    """

    causal = False
    ignores_padding = False  # frames that the mask hides change the others, since GroupNorm counts them
    down_blocks: Any
    up_blocks: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (256, 256),
        dropout: float = 0.05,
        attention_head_dim: int = 64,
        n_blocks: int = 1,
        num_mid_blocks: int = 2,
        num_heads: int = 4,
        act_fn: str = "snake",
    ) -> None:
        super().__init__()
        if act_fn != "gelu":
            raise ValueError(f"act_fn must be 'gelu', as in the published configurations; got {act_fn!r}")
        channels = tuple(channels)
        self.in_channels, self.out_channels, self.static_chunk_size = in_channels, out_channels, 0
        time_width = 4 * channels[0]
        self.time_mlp = TimestepEmbedding(in_channels, time_width)

        def stage(dim: int, dim_out: int, *resample: nn.Module) -> Stage:
            blocks = [TransformerBlock(dim_out, num_heads, attention_head_dim, dropout) for _ in range(n_blocks)]
            resnet = ResnetBlock1D(dim, dim_out, time_width, self.causal)
            return Stage([resnet, nn.ModuleList(blocks), *resample])

        def same(dim: int) -> nn.Module:
            return CausalConv1d(dim, dim, 3) if self.causal else Conv1d(dim, dim, 3, padding=1)

        last = len(channels) - 1
        down, up = [], []
        for i, (dim, dim_out) in enumerate(zip((in_channels, *channels), channels, strict=False)):
            resample = same(dim_out) if i == last else Resample(Conv1d(dim_out, dim_out, 3, stride=2, padding=1))
            down.append(stage(dim, dim_out, resample))
        mirrored = channels[::-1]
        for j, (dim, dim_out) in enumerate(zip(mirrored, (*mirrored[1:], channels[0]), strict=True)):
            transposed = Resample(ConvTranspose1d(dim_out, dim_out, 4, stride=2, padding=1))
            up.append(stage(2 * dim, dim_out, same(dim_out) if j == last else transposed))
        self.down_blocks = nn.ModuleList(down)
        self.mid_blocks = nn.ModuleList(stage(channels[-1], channels[-1]) for _ in range(num_mid_blocks))
        self.up_blocks = nn.ModuleList(up)
        self.final_block = Block1D(channels[0], channels[0], self.causal)
        self.final_proj = nn.Conv1d(channels[0], out_channels, 1)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """Kaiming normal for every convolution and linear, biases zero; not for the transposed convolutions."""
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def time_table(self, t: Tensor) -> list[Tensor]:
        """All that depends on the times ``[n]`` alone: for every stage ``[n, channels]``."""
        e = F.mish(self.time_mlp(time_features(t, self.in_channels)))  # each stage begins with it
        stages = (*self.down_blocks, *self.mid_blocks, *self.up_blocks)
        return [stage[0].mlp[1](e) for stage in stages]  # type: ignore[index]

    def invariants(self, mask: Tensor, mu: Tensor, spks: Tensor | None, cond: Tensor | None) -> Invariants:
        """All that depends on neither x nor t."""
        parts = [mu.transpose(1, 2)]
        if spks is not None:
            parts.append(spks[:, None].expand(-1, mu.shape[2], -1))
        if cond is not None:
            parts.append(cond.transpose(1, 2))
        masks = [mask[:, 0, :, None]]
        for _ in self.down_blocks[1:]:
            masks.append(masks[-1][:, ::2])
        lengths = [(m[..., 0] > 0).sum(-1) for m in masks]
        packings = [packing_of(n, m.shape[1]) for n, m in zip(lengths, masks, strict=True)]
        return Invariants(torch.cat(parts, 2), masks, lengths, packings)

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
        """The velocity at (x, t).

        Args:
            x: ``[B, 80, T]`` noisy mel.
            mask: ``[B, 1, T]``, ones in a row's first frames and zeros after them.
            mu: ``[B, 80, T]`` encoder output.
            t: ``[B]`` or 0-dimensional, in [0, 1].
            spks: ``[B, 80]`` speaker vector.
            cond: ``[B, 80, T]`` known mel frames, zero elsewhere.
            streaming: attention sees its own chunk and all before it; without effect in CosyVoice 1.
            time: what :meth:`time_table` gives for t, if the caller has it.
            fixed: what :meth:`invariants` gives, if the caller has it: then mask, mu, spks and cond are not read.

        Returns:
            ``[B, 80, T]``, zero at padded frames.
        """
        biases = iter(self.time_table(t.expand(x.shape[0])) if time is None else time)
        known, *parts = self.invariants(mask, mu, spks, cond) if fixed is None else fixed
        levels = list(zip(*parts, strict=True))
        x = torch.cat([x.transpose(1, 2), known], 2)
        chunk = self.static_chunk_size if streaming else 0

        skips: list[Tensor] = []
        for stage, (mask, lengths, packing) in zip(self.down_blocks, levels, strict=True):
            skips.append(stage(x, lengths, next(biases), chunk, packing))
            x = conv(stage[2], skips[-1] * mask)
        for stage in self.mid_blocks:
            x = stage(x, lengths, next(biases), chunk, packing)
        for stage, (mask, lengths, packing), skip in zip(self.up_blocks, levels[::-1], skips[::-1], strict=True):
            x = stage(torch.cat([x[:, : skip.shape[1]], skip], 2), lengths, next(biases), chunk, packing)
            x = conv(stage[2], x * mask)
        x = self.final_block(x, lengths)
        last = plain(self.final_proj, nn.Conv1d)
        x = projection(x, [last.weight[:, :, 0]], [last.bias])
        return (x * mask).transpose(1, 2)


class CausalConditionalDecoder(ConditionalDecoder):
    """The U-Net of CosyVoice 2; with one level and ``streaming`` it is causal at the grain of a chunk.

    Args:
        static_chunk_size: frames of a chunk in streaming mode, the same at every level.
        num_decoding_left_chunks: ignored, as upstream does: all chunks to the left are seen.
        The others as :class:`ConditionalDecoder`.
    """

    causal = True
    ignores_padding = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (256, 256),
        dropout: float = 0.05,
        attention_head_dim: int = 64,
        n_blocks: int = 1,
        num_mid_blocks: int = 2,
        num_heads: int = 4,
        act_fn: str = "snake",
        static_chunk_size: int = 50,
        num_decoding_left_chunks: int = 2,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            channels,
            dropout,
            attention_head_dim,
            n_blocks,
            num_mid_blocks,
            num_heads,
            act_fn,
        )
        self.static_chunk_size = static_chunk_size
        self.num_decoding_left_chunks = num_decoding_left_chunks
