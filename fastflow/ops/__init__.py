"""The fused ops, one file each: formula, reference, autograd function and public function."""

from fastflow.ops.attention import RelativePosition, attention, attention_ref, self_attention
from fastflow.ops.conv_block import conv_block, conv_block_ref
from fastflow.ops.dropout import dropout, dropout_ref
from fastflow.ops.euler_step import euler_step, euler_step_ref
from fastflow.ops.feed_forward import feed_forward, feed_forward_ref
from fastflow.ops.grouped_conv import grouped_conv, grouped_conv_ref
from fastflow.ops.interpolate import interpolate, interpolate_ref
from fastflow.ops.norm import Norm, norm_ref
from fastflow.ops.projection import projection, projection_ref
from fastflow.ops.transformer_block import transformer_block, transformer_block_ref

__all__ = [
    "Norm",
    "RelativePosition",
    "attention",
    "attention_ref",
    "conv_block",
    "conv_block_ref",
    "dropout",
    "dropout_ref",
    "euler_step",
    "euler_step_ref",
    "feed_forward",
    "feed_forward_ref",
    "grouped_conv",
    "grouped_conv_ref",
    "interpolate",
    "interpolate_ref",
    "norm_ref",
    "projection",
    "projection_ref",
    "self_attention",
    "transformer_block",
    "transformer_block_ref",
]
