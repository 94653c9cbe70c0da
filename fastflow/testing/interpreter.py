"""Repairs of Triton's interpreter, so that a test of a kernel on a CPU measures the kernel."""

from typing import Any

import torch


def round_bfloat16() -> None:
    """Make the interpreter round float32 to bfloat16 to nearest even, as a GPU does; it truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding_mode)
        return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = convert
