"""Compile every Triton kernel ahead of time for each GPU architecture, on a machine that needs no GPU.

``python -m fastflow.testing.aot 80 90`` compiles for sm_80 and sm_90, in two processes, and prints one JSON line per
architecture, kernel and specialisation: registers and stack bytes per thread (from the cubin, by Triton's own
cuobjdump) and bytes of shared memory.

The launchers themselves are called, on meta tensors, and what they would launch is compiled with the specialisation
that Triton would choose at run time, so that the table below cannot drift from the kernels.  This needs a process
without TRITON_INTERPRET.  Compiled kernels stay in Triton's cache (TRITON_CACHE_DIR).
"""

import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastflow.backend import FLOATS
from fastflow.ops.norm import sum_type

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}  # most that a block can have, by architecture


ONLY_90 = "sm_90 "  # begins the name of a case that is compiled for that architecture alone


class Ceiling(NamedTuple):
    """What a kernel may use, in every dtype and on every architecture."""

    registers: int
    shared: int


CEILINGS = {
    "interpolate_forward_kernel": Ceiling(registers=144, shared=16 * KIB),
    "interpolate_backward_kernel": Ceiling(registers=248, shared=16 * KIB),
    "dropout_kernel": Ceiling(registers=48, shared=4 * KIB),
    "euler_step_kernel": Ceiling(registers=40, shared=0),
    "attention_forward_kernel": Ceiling(registers=240, shared=96 * KIB),
    "attention_backward_q_kernel": Ceiling(registers=255, shared=80 * KIB),
    "attention_backward_kv_kernel": Ceiling(registers=255, shared=96 * KIB),
    "attention_backward_position_kernel": Ceiling(registers=255, shared=32 * KIB),
    "norm_forward_kernel": Ceiling(registers=96, shared=4 * KIB),
    "norm_backward_kernel": Ceiling(registers=168, shared=8 * KIB),
    "gated_residual_kernel": Ceiling(registers=96, shared=4 * KIB),
    "gate_backward_kernel": Ceiling(registers=64, shared=1 * KIB),
    "activation_forward_kernel": Ceiling(registers=64, shared=0),
    "activation_backward_kernel": Ceiling(registers=64, shared=0),
    "conv_block_convolve_kernel": Ceiling(registers=136, shared=64 * KIB),
    "conv_block_weight_kernel": Ceiling(registers=208, shared=64 * KIB),
    "conv_block_normalise_groups_kernel": Ceiling(registers=80, shared=4 * KIB),
    "conv_block_differentiate_groups_kernel": Ceiling(registers=96, shared=4 * KIB),
    "conv_block_centre_groups_kernel": Ceiling(registers=96, shared=4 * KIB),
    "conv_block_normalise_frames_kernel": Ceiling(registers=72, shared=4 * KIB),
    "conv_block_differentiate_frames_kernel": Ceiling(registers=120, shared=8 * KIB),
    "conv_block_sums_kernel": Ceiling(registers=48, shared=4 * KIB),
}


def slack() -> tuple[int, float]:
    """Bytes of stack, and times the ceiling in registers, that the installed Triton is granted.

    None from 3.9 on, by which the ceilings were set; the older assembler of 3.6 takes a few words of stack for some.
    """
    import triton

    return (0, 1.0) if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else (32, 1.5)


class Use(NamedTuple):
    """What one specialisation of a kernel uses."""

    kernel: str
    case: str
    architecture: int
    registers: int
    stack: int
    shared: int
    explicit_fusion: bool  # whether the launcher says if the compiler may fuse multiply-adds


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_interpolate() -> Iterator[str]:
    """Launch the kernels of interpolate once for each case, and yield its name."""
    from fastflow.kernels.interpolate import interpolate_backward, interpolate_forward

    rows = _empty(8, 4, 2, dtype=torch.int64)
    for dtype in sorted(FLOATS, key=str):
        for table, channels_first in ((None, False), (rows, True), (rows, False), (None, True)):
            if dtype != torch.float32 and (table is None) == channels_first:
                continue
            segments = table, [500, 860] if table is None else []
            grad_shape = (8, 80, 860) if channels_first else (8, 860, 80)
            interpolate_forward(_empty(8, 500, 80, dtype=dtype), *segments, 860, channels_first)
            interpolate_backward(_empty(*grad_shape, dtype=dtype), *segments, 500, channels_first)
            yield f"{dtype} {'shared' if table is None else 'rows'} {'BCT' if channels_first else 'BTC'}"
    interpolate_forward(_empty(3, 15, 17, 2)[..., 0], None, [15, 29], 29, False)
    interpolate_backward(_empty(3, 29, 17, 2)[..., 0], None, [15, 29], 15, False)
    yield "odd sizes and strides"


def launch_attention() -> Iterator[str]:
    """Launch the kernels of attention: the head dimension is 64 in all three models, with dropout in the encoder.

    float16, whose code is that of bfloat16 with another type of product, is launched once.  Other head dimensions,
    which no model has, are launched without dropout and for one architecture alone.
    """
    from fastflow.kernels import attention as kernels

    batch, heads, frames = 4, 8, 500
    lengths, seed, lse = _empty(batch, dtype=torch.int64), _empty(1, dtype=torch.int64), _empty(batch, heads, frames)
    both = torch.bfloat16, torch.float32
    cases = [
        (64, torch.float16, 0.0),
        *itertools.product((64,), both, (0.0, 0.1)),
        *itertools.product((32, 128), both, (0.0,)),
    ]
    for width, dtype, dropout_p in cases:
        x = _empty(batch, frames, heads, width, dtype=dtype).transpose(1, 2)
        bias = _empty(heads, width, dtype=dtype)
        relative = (_empty(heads, 2 * frames - 1, width, dtype=dtype), bias, bias)
        rule = (0, -1, 0, True, 0.125, dropout_p, seed if dropout_p else None)
        case = f"{'' if width == 64 else ONLY_90}{dtype} {width}{' dropout' if dropout_p else ''}"
        kernels.relative_attention(x, x, x, *relative, lengths, *rule)
        kernels.relative_attention_backward(x, x, lse, x, x, x, *relative, lengths, *rule)
        yield f"{case} relative"
        kernels.attention(x, x, x, lengths, *rule)
        kernels.attention_backward(x, x, lse, x, x, x, lengths, *rule)
        yield case


def launch_norm() -> Iterator[str]:
    """Launch the kernels of norm: 256 and 1024 channels in the U-Net and DiT, 512 in the encoder."""
    from fastflow.kernels.norm import norm_backward, norm_forward

    cases = (
        (torch.bfloat16, 256, False),
        (torch.bfloat16, 512, False),
        (torch.bfloat16, 1024, True),
        (torch.float32, 256, False),
        (torch.float32, 1024, True),
        (torch.float16, 1024, True),
        (torch.float64, 256, False),
    )
    for dtype, channels, adaptive in cases:
        x = _empty(8, 500, channels, dtype=dtype)
        vector = None if adaptive and dtype == torch.float16 else _empty(*(8,) * adaptive, channels, dtype=dtype)
        stats = _empty(2, 8, 500, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        norm_forward(x, vector, vector, 1e-6 if adaptive else 1e-5)
        norm_backward(x, x, stats, vector, vector, None if channels == 512 else x)
        yield f"{dtype} {channels}{' adaptive' if adaptive else ''}"
    norm_forward(_empty(3, 15, 17, 2)[..., 0], _empty(17), None, 1e-5)
    yield "odd sizes and strides"
    for dtype in (torch.bfloat16, torch.float16):
        x, vector = _empty(8, 500, 256), _empty(256)
        norm_forward(x, vector, vector, 1e-5, dtype)
        norm_backward(x.to(dtype), x, _empty(2, 8, 500), vector, vector, x)
        yield f"autocast to {dtype}"


def launch_projection() -> Iterator[str]:
    """Launch the kernels of projection: the residual of the U-Net, and with a gate that of DiT."""
    from fastflow.kernels.projection import gate_backward, gated_residual

    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        x, gate = _empty(8, 500, 1024, dtype=dtype), _empty(8, 1024, dtype=dtype)
        gated_residual(x, x, gate)
        weight, sums = gate[0].expand(1024, 1024), _empty(8, 1024, dtype=sum_type(x))
        gate_backward(_empty(8, 1024, 1024, dtype=dtype), sums, weight, gate[0], gate)
        yield f"{dtype}"
    gated_residual(x.float(), x.float(), None)
    gated_residual(x.bfloat16(), x.float(), None)
    gate_backward(_empty(8, 1024, 2048), _empty(8, 1024), _empty(1024, 2048), None, _empty(8, 1024))
    yield "without gate or bias"


def launch_feed_forward() -> Iterator[str]:
    """Launch the kernels of feed_forward."""
    from fastflow.kernels.feed_forward import activation_backward, activation_forward

    for dtype, activation in [
        *itertools.product((torch.bfloat16, torch.float32), (1, 2, 3)),
        (torch.float16, 1),
        (torch.float64, 1),
    ]:
        x = _empty(8, 500, 1024, dtype=dtype)
        activation_forward(x, activation)
        activation_backward(x, x, activation)
        yield f"{dtype} {activation}"


def launch_conv_block() -> Iterator[str]:
    """Launch the kernels of conv_block: 320 -> 256 channels, with 8 groups in CosyVoice 1 and LayerNorm in 2.

    float16, whose code is that of bfloat16 with another type of product, is launched once, for one architecture.
    """
    from fastflow.kernels import conv_block as kernels

    batch, frames, channels, width = 4, 500, 320, 256
    lengths = _empty(batch, dtype=torch.int64)
    for dtype, groups in ((torch.float16, 8), *itertools.product((torch.bfloat16, torch.float32), (8, 0))):
        x, y = (_empty(batch, frames, size, dtype=dtype) for size in (channels, width))
        vector, time = _empty(width, dtype=dtype), _empty(batch, width, dtype=dtype)
        parameters = _empty(width, channels, 3, dtype=dtype), vector, vector, vector, lengths
        rule = groups, not groups, False, 1e-5
        statistics = _empty(batch, groups or frames)
        kernels.conv_block(x, *parameters, time, *rule, True)
        kernels.conv_block_backward(y, y, statistics, statistics, x, *parameters, *rule, 0b111111)
        only = ONLY_90 if dtype == torch.float16 else ""
        yield f"{only}{dtype} {f'{groups} groups' if groups else 'LayerNorm'}"


def launch_dropout() -> Iterator[str]:
    """Launch the kernel of dropout, of even and of odd size."""
    from fastflow.kernels.dropout import dropout

    for dtype in sorted(FLOATS, key=str):
        for size in (512 * 2048, 511 * 33):
            dropout(_empty(size, dtype=dtype), 0.1, _empty(1, dtype=torch.int64))
            yield f"{dtype} {size}"


def launch_euler_step() -> Iterator[str]:
    """Launch the kernel of euler_step for every pair of dtypes."""
    from fastflow.kernels.euler_step import euler_step

    mixed = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    for dtype, low in [*((dtype, dtype) for dtype in sorted(FLOATS, key=str)), *mixed]:
        x, velocity = _empty(1, 300, 80, dtype=dtype), _empty(2, 300, 80, dtype=low)
        euler_step(x, velocity, _empty(dtype=dtype), 0.7)
        yield f"{dtype} {low}"
    euler_step(_empty(1, 80, 301).transpose(1, 2), _empty(2, 80, 301).transpose(1, 2), _empty(), 0.7)
    yield "channels first, odd size"


LAUNCHES: dict[str, Callable[[], Iterator[str]]] = {  # by file in kernels/
    "interpolate": launch_interpolate,
    "attention": launch_attention,
    "norm": launch_norm,
    "projection": launch_projection,
    "feed_forward": launch_feed_forward,
    "conv_block": launch_conv_block,
    "dropout": launch_dropout,
    "euler_step": launch_euler_step,
}


@functools.cache
def _record() -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """(case, kernel, arguments, options) of everything that the launchers launch."""
    from triton.runtime.jit import JITFunction

    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    original = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **options: launched.append((self, args, options))
    records = []
    try:
        for launch in LAUNCHES.values():
            for case in launch():
                records += [(case, *entry) for entry in launched]
                launched.clear()
    finally:
        JITFunction.run = original
    return records


def _compile(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], architecture: int) -> Any:
    """What JITFunction.run does to compile, for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    import triton

    cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump shows no resource usage: {usage}")
    return int(found[1]), int(found[2])


def _measure(index: int, architecture: int) -> Use:
    case, kernel, args, options = _record()[index]
    compiled = _compile(kernel, args, dict(options), architecture)
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    return Use(
        kernel.__name__, case, architecture, registers, stack, compiled.metadata.shared, "enable_fp_fusion" in options
    )


def measure(*architectures: int) -> Iterator[Use]:
    """Compile every kernel for each sm_``architecture``, two at a time, and say what it uses, in no fixed order.

    A kernel that does not compile raises.
    """
    jobs = [
        (index, architecture)
        for index, (case, *_) in enumerate(_record())
        for architecture in architectures
        if architecture == 90 or not case.startswith(ONLY_90)
    ]
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for done in concurrent.futures.as_completed([pool.submit(_measure, *job) for job in jobs]):
            yield done.result()


if __name__ == "__main__":
    for use in measure(*map(int, sys.argv[1:])):
        print(json.dumps(use._asdict()), flush=True)
