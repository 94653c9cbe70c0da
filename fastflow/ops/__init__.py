"""The fused ops, one file each: formula, reference, autograd function and public function."""

from fastflow.ops.attention import RelativePosition, attention, attention_ref
from fastflow.ops.interpolate import interpolate, interpolate_ref

__all__ = ["RelativePosition", "attention", "attention_ref", "interpolate", "interpolate_ref"]
