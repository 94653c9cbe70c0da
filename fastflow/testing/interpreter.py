"""Repairs of Triton's interpreter, so that a test of a kernel on a CPU measures the kernel, in reasonable time."""

import dataclasses
from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Apply the repairs below to the interpreter of the installed Triton."""
    np.seterr(divide="ignore", invalid="ignore", over="ignore")  # log2(0), inf - inf, exp2(200): silent on a GPU
    _round_bfloat16()
    _round_multiply_add_once()
    _patch_language_once()
    _skip_unused_checks()


def _round_bfloat16() -> None:
    """Round float32 to bfloat16 to nearest even, as a GPU does; the interpreter truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding_mode)
        return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = convert


def _round_multiply_add_once() -> None:
    """``tl.fma`` of float32 rounds once, as a GPU does; the interpreter of Triton 3.6 rounds the product too."""
    from triton.runtime import interpreter

    if hasattr(interpreter._interpreter, "fma_fp32"):
        return
    original = interpreter.InterpreterBuilder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return original(self, x, y, z)
        wide = x.data.astype(np.float64) * y.data + z.data  # the product is exact
        return interpreter.TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def _patch_language_once() -> None:
    """Replace the functions of triton.language once per module, not at each call of a helper: half of the time."""
    from triton.runtime import interpreter

    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _skip_unused_checks() -> None:
    """Don't compute the overflow checks whose result the interpreter drops: a third of the time."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
