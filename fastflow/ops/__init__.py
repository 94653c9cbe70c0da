"""The fused ops, one file each: formula, reference, autograd function and public function."""

from fastflow.ops.interpolate import interpolate, interpolate_ref

__all__ = ["interpolate", "interpolate_ref"]
