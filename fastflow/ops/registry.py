"""How an op is defined, and found for a backend.

``name`` belongs to the compiled module, which implements it for the CPU and, where csrc/cuda has it, for CUDA;
``name_triton`` is the same op by Triton's kernels, also for CPU tensors, which go through its interpreter.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

_ops: dict[str, torch._ops.OpOverload] = {}
_launchers: dict[str, Callable] = {}


def kernel(file: str, name: str) -> Callable:
    """The function ``name`` of kernels/``file``.py, which is imported when it is first called."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastflow.kernels.{file}"), name)(*args)

    return launch


def define(name: str, schema: str, fake: Callable, triton: Callable | None) -> None:
    """Define the op ``name`` and, where it is not None, ``name_triton``, which ``triton`` implements."""
    for suffix in ("", "_triton") if triton else ("",):
        torch.library.define(f"fastflow::{name}{suffix}", schema)
        torch.library.register_fake(f"fastflow::{name}{suffix}", fake)
        _ops[name + suffix] = getattr(torch.ops.fastflow, name + suffix).default
    if triton:
        for device in ("cpu", "cuda"):
            torch.library.impl(f"fastflow::{name}_triton", device, triton)
        _launchers[name] = triton


def op(name: str, backend: str) -> torch._ops.OpOverload:
    """The op of a backend: ``cpu``, ``cuda`` or ``triton``."""
    return _ops[f"{name}_triton" if backend == "triton" else name]


def gpu_pass(name: str, backend: str) -> Callable:
    """An op to be called inside another, where Triton's needs no boundary of its own."""
    return _launchers[name] if backend == "triton" else _ops[name]
