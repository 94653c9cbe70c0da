"""The fused ops, one file each: formula, reference, autograd function and public function."""

from fastflow.ops.attention import RelativePosition, attention, attention_ref
from fastflow.ops.conv_block import conv_block, conv_block_ref
from fastflow.ops.interpolate import interpolate, interpolate_ref

__all__ = [
    "RelativePosition",
    "attention",
    "attention_ref",
    "conv_block",
    "conv_block_ref",
    "interpolate",
    "interpolate_ref",
]
