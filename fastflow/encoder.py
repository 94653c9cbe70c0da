"""The token encoders: conformer (CosyVoice 1), upsampling conformer (CosyVoice 2) and pre-lookahead (CosyVoice 3)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastflow.layers import Conv1d, Linear, attend, drop, feed_forward_residual, plain, project_residual, split_heads
from fastflow.ops.attention import length_mask, upstream_lengths
from fastflow.ops.half import linear, saturated
from fastflow.ops.norm import Norm
from fastflow.ops.projection import projection
from fastflow.padding import Packing, Padded, pack, packing_of, unpack
from fastflow.recompute import Block, CheapBlock, Recomputing


def relative_positions(frames: int, width: int, like: Tensor) -> Tensor:
    """Sinusoids of the distances T-1 down to -(T-1), ``[1, 2T-1, width]``: column 2m sine, 2m+1 cosine.

    Evaluated in float32, as upstream's table is, and cast to the dtype of ``like``.
    """
    distance = torch.arange(frames - 1, -frames, -1, device=like.device, dtype=torch.float32)
    even = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angle = distance[:, None] * torch.exp(even * -(math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None].to(like.dtype)


class RelPositionMultiHeadedAttention(Recomputing):
    """Conformer self-attention with relative positions; ``linear_pos`` has no bias."""

    def __init__(self, heads: int, width: int, dropout_rate: float, key_bias: bool) -> None:
        super().__init__()
        self.h, self.d_k, self.dropout_rate = heads, width // heads, dropout_rate
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width, bias=key_bias)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, self.d_k))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, self.d_k))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(
        self,
        x: Tensor,
        norm: Norm | None,
        lengths: Tensor,
        chunk_size: int,
        pos_emb: Tensor,
        padded_queries: bool,
        packing: Packing | None = None,
    ) -> Tensor:
        """The heads' outputs for ``norm(x)`` side by side, before ``linear_out``."""
        scale, shift, eps = (None, None, None) if norm is None else norm
        parts = (self.linear_q, self.linear_k, self.linear_v)
        return attend(
            functools.partial(self._heads, eps, packing),
            x,
            scale,
            shift,
            pos_emb,
            plain(self.linear_pos).weight,
            self.pos_bias_u,
            self.pos_bias_v,
            *(plain(part).weight for part in parts),
            *(part.bias for part in parts),
            keep_heads=self.keeps_heads(x),
            lengths=lengths,
            chunk_size=chunk_size,
            dropout_p=self.dropout_rate if self.training else 0.0,
            padded_queries=padded_queries,
            packing=packing,
        )

    def _heads(
        self,
        eps: float | None,
        packing: Packing | None,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        pos_emb: Tensor,
        pos_weight: Tensor,
        bias_u: Tensor,
        bias_v: Tensor,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        norm = None if eps is None else Norm(scale, shift, eps)
        qkv = unpack(projection(x, parts[:3], parts[3:], norm=norm), packing).unflatten(-1, (3, self.h, self.d_k))
        position = linear(pos_emb, pos_weight)[0].unflatten(-1, (self.h, self.d_k)).transpose(0, 1)
        return *split_heads(qkv), position, bias_u.to(qkv.dtype), bias_v.to(qkv.dtype)


class PositionwiseFeedForward(nn.Module):
    """``w_2(dropout(SiLU(w_1(x))))``."""

    def __init__(self, width: int, hidden: int, dropout_rate: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout_rate)
        self.w_2 = nn.Linear(hidden, width)


class ConformerEncoderLayer(Block):
    """Pre-norm self-attention and feed-forward, without macaron and convolution parts; x may be packed."""

    def __init__(
        self,
        self_attn: RelPositionMultiHeadedAttention,
        feed_forward: PositionwiseFeedForward,
        width: int,
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.feed_forward = feed_forward
        self.norm_ff = nn.LayerNorm(width, eps=1e-12)
        self.norm_mha = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout_rate)

    @property
    def draws(self) -> bool:
        return self.training and any((self.dropout.p, self.feed_forward.dropout.p, self.self_attn.dropout_rate))

    def _compute(  # type: ignore[override]
        self,
        x: Tensor,
        lengths: Tensor,
        chunk_size: int,
        pos_emb: Tensor,
        padded_queries: bool = True,
        packing: Packing | None = None,
    ) -> Tensor:
        norm = Norm(self.norm_mha.weight, self.norm_mha.bias, self.norm_mha.eps)
        h = self.self_attn(x, norm, lengths, chunk_size, pos_emb, padded_queries, packing)
        x = project_residual(x, h, self.self_attn.linear_out, self.dropout)
        norm, ff = Norm(self.norm_ff.weight, self.norm_ff.bias, self.norm_ff.eps), self.feed_forward
        dropouts = ff.dropout, self.dropout
        return feed_forward_residual(
            x, ff.w_1, ff.w_2, dropouts, activation="silu", norm=norm, keep_hidden=self.keeps_products
        )


class LinearEmbed(nn.Module):
    """Linear and LayerNorm, scaled by sqrt(width); the position table is returned beside it, never added."""

    def __init__(self, input_size: int, width: int, dropout_rate: float, positional_dropout_rate: float) -> None:
        super().__init__()
        self.out = nn.Sequential(Linear(input_size, width), nn.LayerNorm(width, eps=1e-5), nn.Dropout(dropout_rate))
        self.dropout = nn.Dropout(positional_dropout_rate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        project, norm, dropout = self.out
        x = drop(saturated(norm(project(x))), dropout)
        scaled = drop(saturated(x * math.sqrt(x.shape[-1])), self.dropout)
        return scaled, drop(relative_positions(x.shape[1], x.shape[2], x), self.dropout)


# What the published configurations choose; nothing else exists here.
_FIXED = {
    "input_layer": "linear",
    "pos_enc_layer_type": "rel_pos_espnet",
    "selfattention_layer_type": "rel_selfattn",
    "activation_type": "swish",
    "normalize_before": True,
    "macaron_style": False,
    "use_cnn_module": False,
    "global_cmvn": None,
}


class ConformerEncoder(Recomputing, Padded):
    """The token encoder of CosyVoice 1.

    The constructor takes upstream's arguments.  Of the architecture switches only the published values exist:
    ``input_layer="linear"``, ``pos_enc_layer_type="rel_pos_espnet"``, ``selfattention_layer_type="rel_selfattn"``,
    ``activation_type="swish"``, ``normalize_before=True``, ``macaron_style=False``, ``use_cnn_module=False``; any
    other raises ValueError.  ``gradient_checkpointing`` is another name for ``recompute = "block"`` (and has no effect
    in :class:`UpsampleConformerEncoder`, as upstream).  Arguments that upstream ignores for the published values are
    ignored here.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int = 256,
        attention_heads: int = 4,
        linear_units: int = 2048,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.0,
        input_layer: str = "conv2d",
        pos_enc_layer_type: str = "rel_pos",
        normalize_before: bool = True,
        static_chunk_size: int = 0,
        use_dynamic_chunk: bool = False,
        global_cmvn: nn.Module | None = None,
        use_dynamic_left_chunk: bool = False,
        positionwise_conv_kernel_size: int = 1,
        macaron_style: bool = True,
        selfattention_layer_type: str = "rel_selfattn",
        activation_type: str = "swish",
        use_cnn_module: bool = True,
        cnn_module_kernel: int = 15,
        causal: bool = False,
        cnn_module_norm: str = "batch_norm",
        key_bias: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        given = locals()
        for name, value in _FIXED.items():
            if given[name] != value:
                raise ValueError(f"{name} must be {value!r}, as in the published configurations; got {given[name]!r}")
        if use_dynamic_chunk and not isinstance(self, UpsampleConformerEncoder):  # which ignores it, as upstream's
            raise ValueError("use_dynamic_chunk must be False, as in the published configurations; got True")
        if output_size % attention_heads:
            raise ValueError(f"output_size {output_size} is not a multiple of attention_heads {attention_heads}")
        self._output_size = output_size
        self.static_chunk_size = static_chunk_size
        self.embed = LinearEmbed(input_size, output_size, dropout_rate, positional_dropout_rate)
        self.after_norm = nn.LayerNorm(output_size, eps=1e-5)

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                ConformerEncoderLayer(
                    RelPositionMultiHeadedAttention(attention_heads, output_size, attention_dropout_rate, key_bias),
                    PositionwiseFeedForward(output_size, linear_units, dropout_rate),
                    output_size,
                    dropout_rate,
                )
                for _ in range(count)
            )

        self._build_layers(layers, num_blocks, dropout_rate, positional_dropout_rate)
        self.gradient_checkpointing = gradient_checkpointing and not isinstance(self, UpsampleConformerEncoder)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the memory mode is ``"block"``."""
        return self.recompute == "block"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.recompute = "block" if value else "auto"

    def _build_layers(
        self,
        layers: Callable[[int], nn.ModuleList],
        num_blocks: int,
        dropout_rate: float,
        positional_dropout_rate: float,
    ) -> None:
        """Register the layers in upstream's order: optimizer states are indexed by position."""
        self.encoders = layers(num_blocks)

    def output_size(self) -> int:
        return self._output_size

    def _layers(self, layers: nn.ModuleList, x: Tensor, lengths: Tensor, *rule: Any) -> Tensor:
        packing = packing_of(lengths, x.shape[1]) if self.exact else None
        x = pack(x, packing)
        for layer in layers:
            x = layer(x, lengths, *rule, packing)
        return unpack(x, packing)

    def forward(
        self, xs: Tensor, xs_lens: Tensor, decoding_chunk_size: int = 0, num_decoding_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Encode tokens.

        Args:
            xs: ``[B, T, input_size]``.
            xs_lens: ``[B]`` tokens of each row.
            decoding_chunk_size, num_decoding_left_chunks: ignored, as upstream does without dynamic chunks.

        Returns:
            ``[B, T, output_size]``, where padded positions hold finite values that the length regulator reads unless
            ``padding`` is ``"exact"``, and the validity mask ``[B, 1, T]`` bool.
        """
        x, pos_emb = self.embed(xs)
        lengths = upstream_lengths(xs_lens, xs.shape[1])
        x = self._layers(self.encoders, x, lengths, self.static_chunk_size, pos_emb, not self.exact)
        return saturated(self.after_norm(x)), length_mask(xs_lens, xs.shape[1])[:, None]


class PreLookaheadLayer(CheapBlock):
    """Two convolutions and a residual that let every token see ``pre_lookahead_len`` tokens ahead."""

    def __init__(self, in_channels: int, channels: int, pre_lookahead_len: int = 1) -> None:
        super().__init__()
        self.in_channels, self.channels, self.pre_lookahead_len = in_channels, channels, pre_lookahead_len
        self.conv1 = Conv1d(in_channels, channels, kernel_size=pre_lookahead_len + 1)
        self.conv2 = Conv1d(channels, in_channels, kernel_size=3)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``[B, T, C]`` -> ``[B, T, C]``.

        Args:
            inputs: the tokens to compute.
            context: ``[B, pre_lookahead_len, C]``, the tokens after them, in eval mode only; without it, zeros.

        Raises:
            ValueError: a context of another length, or in training mode.
        """
        return super().forward(inputs, context)

    def _compute(self, inputs: Tensor, context: Tensor | None) -> Tensor:  # type: ignore[override]
        x = inputs.transpose(1, 2)
        if context is None or context.shape[1] == 0:
            x = F.pad(x, (0, self.pre_lookahead_len))
        elif self.training:
            raise ValueError("context is for inference: call eval() first")
        elif context.shape[1] != self.pre_lookahead_len:
            raise ValueError(f"context must hold {self.pre_lookahead_len} tokens, got {context.shape[1]}")
        else:
            x = torch.cat([x, context.transpose(1, 2)], 2)
        x = F.leaky_relu(self.conv1(x))
        x = self.conv2(F.pad(x, (2, 0)))
        return saturated(x.transpose(1, 2) + inputs)


class Upsample1D(nn.Module):
    """Repeat every frame ``stride`` times, then a causal convolution of kernel ``2 * stride + 1``."""

    def __init__(self, channels: int, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Conv1d(channels, channels, kernel_size=2 * stride + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).repeat_interleave(self.stride, dim=2)
        return self.conv(F.pad(x, (2 * self.stride, 0))).transpose(1, 2)


class UpsampleConformerEncoder(ConformerEncoder):
    """The token encoder of CosyVoice 2, from T tokens to 2T frames; same constructor as :class:`ConformerEncoder`.

    There are always four layers after the upsampling, and always three tokens of look-ahead.
    """

    def _build_layers(
        self,
        layers: Callable[[int], nn.ModuleList],
        num_blocks: int,
        dropout_rate: float,
        positional_dropout_rate: float,
    ) -> None:
        width = self._output_size
        self.pre_lookahead_layer = PreLookaheadLayer(width, width, pre_lookahead_len=3)
        self.encoders = layers(num_blocks)
        self.up_layer = Upsample1D(width)
        self.up_embed = LinearEmbed(width, width, dropout_rate, positional_dropout_rate)
        self.up_encoders = layers(4)

    def forward(  # type: ignore[override]
        self,
        xs: Tensor,
        xs_lens: Tensor,
        context: Tensor | None = None,
        decoding_chunk_size: int = 0,
        num_decoding_left_chunks: int = -1,
        streaming: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode tokens and double their rate.

        Args:
            xs: ``[B, T, input_size]``.
            xs_lens: ``[B]`` tokens of each row; with a context it may count the context's tokens too.
            context: ``[B, 3, input_size]``, the tokens after ``xs``, in eval mode only.
            decoding_chunk_size, num_decoding_left_chunks: ignored, as upstream does.
            streaming: attention sees its own chunk of ``static_chunk_size`` tokens and all before it.

        Returns:
            ``[B, 2T, output_size]`` and the validity mask ``[B, 1, 2T]`` bool.
        """
        chunk = self.static_chunk_size if streaming else 0
        x, pos_emb = self.embed(xs)
        if context is not None and context.shape[1]:
            context, _ = self.embed(context)
        if self.exact:  # the embedding of padding is not zero
            x = x.masked_fill(~length_mask(xs_lens, x.shape[1])[..., None], 0.0)
        x = self.pre_lookahead_layer(x, context)
        x = self._layers(self.encoders, x, xs_lens, chunk, pos_emb, False)
        x, pos_emb = self.up_embed(self.up_layer(x))
        lengths = 2 * xs_lens
        x = self._layers(self.up_encoders, x, lengths, 2 * chunk, pos_emb, False)
        return saturated(self.after_norm(x)), length_mask(lengths, x.shape[1])[:, None]
