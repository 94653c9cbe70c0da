"""``fastflow doctor``: what is installed, which backends can run and which not and why, and whether they are right."""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastflow
from fastflow import backend as _backend
from fastflow.ops import (
    Norm,
    RelativePosition,
    attention,
    attention_ref,
    conv_block,
    conv_block_ref,
    dropout,
    dropout_ref,
    euler_step,
    euler_step_ref,
    feed_forward,
    feed_forward_ref,
    grouped_conv,
    grouped_conv_ref,
    interpolate,
    interpolate_ref,
    projection,
    projection_ref,
    self_attention,
    transformer_block,
    transformer_block_ref,
)
from fastflow.ops.attention import DTYPES as ATTENTION_DTYPES
from fastflow.ops.conv_block import DTYPES as CONV_BLOCK_DTYPES
from fastflow.ops.dropout import DTYPES as DROPOUT_DTYPES
from fastflow.ops.euler_step import DTYPES as EULER_STEP_DTYPES
from fastflow.ops.feed_forward import DTYPES as FEED_FORWARD_DTYPES
from fastflow.ops.grouped_conv import DTYPES as GROUPED_CONV_DTYPES
from fastflow.ops.interpolate import DTYPES as INTERPOLATE_DTYPES
from fastflow.ops.projection import DTYPES as PROJECTION_DTYPES
from fastflow.ops.transformer_block import DTYPES as TRANSFORMER_BLOCK_DTYPES
from fastflow.testing import interpreter
from fastflow.testing.tolerances import assert_parity

PACKAGES = ("numpy", "triton", "hyperpyyaml", "safetensors", "soundfile", "scipy", "matplotlib", "tqdm", "rich")
TESTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_capability() -> str | None:
    """The instruction set that the C++ kernels use, or why there is none."""
    if _backend.extension is None:
        return None
    try:
        return _backend.extension.cpu_capability()
    except ValueError as error:  # FASTFLOW_CPU_CAPABILITY names one that this CPU lacks
        return str(error)


def _gpus() -> list[str]:
    names = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        names.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return names


def _device(backend: str) -> str:
    """Where to try a backend: CUDA and Triton on the GPU if there is one, Triton else in its interpreter."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def _why_not(op: str, backend: str) -> str | None:
    """Why an op cannot run on a backend on this machine; None if it can."""
    dtypes = OPS[op].dtypes
    probe = torch.empty(1, device=_device(backend))
    try:
        _backend.CAN_RUN[backend](op, probe, {backend: _backend.FLOATS}, raise_error=True)
    except RuntimeError as error:
        reason = str(error).removeprefix(f"{op}: backend {backend!r} cannot run: ")
        return reason.removesuffix(" (see `fastflow doctor`)")
    return None if backend == "reference" or backend in dtypes else f"{op} has no kernel for it"


Call = Callable[..., Tensor]


def _check(run: Call, reference: Call, tensors: dict[str, Tensor], case: str, sums: tuple[int, ...]) -> None:
    """Forward and backward against float64 by the op-parity rule, which allows twice the reference's own error."""

    def results(function: Call, dtype: torch.dtype, rounded: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.to(rounded).to(dtype).requires_grad_() for x in tensors.values()]
        out = function(*leaves)
        grad = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(rounded).to(dtype)
        grads = torch.autograd.grad(out, leaves, grad)
        return {"out": out.detach(), **{f"gradient of {n}": g for n, g in zip(tensors, grads, strict=True)}}

    for dtype in TESTED_DTYPES:
        got, eager = (results(function, dtype, dtype) for function in (run, reference))
        truth = results(reference, torch.float64, dtype)
        assert_parity(got, eager, truth, case=f"{case} {str(dtype).removeprefix('torch.')}", sums=sums)


def _randn(device: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


def _test_interpolate(backend: str, device: str) -> None:
    x = _randn(device, x=(2, 29, 24))
    for segments in ([(5, 9), (23, 39)], torch.tensor([[[5, 9], [23, 39]], [[4, 7], [11, 19]]], device=device)):
        _check(
            lambda x, s=segments: interpolate(x, s, 50, backend=backend),
            lambda x, s=segments: interpolate_ref(x, s, 50),
            x,
            "interpolate",
            sums=(2, 4),
        )


def _test_attention(backend: str, device: str) -> None:
    queries, width = 19, 16
    shape = (2, 2, queries, width)
    plain = _randn(device, q=shape, k=shape, v=shape)
    relative = plain | _randn(device, position=(2, 2 * queries - 1, width), bias_u=(2, width), bias_v=(2, width))
    rule: dict[str, Any] = {"lengths": torch.tensor([11, queries], device=device), "chunk_size": 7}
    for tensors in (plain, relative):

        def call(function: Call, *given: Tensor, **where: str) -> Tensor:
            rel_pos = RelativePosition(*given[3:]) if len(given) > 3 else None
            return function(*given[:3], rel_pos=rel_pos, **rule, **where)

        _check(
            lambda *given, call=call: call(attention, *given, backend=backend),
            lambda *given, call=call: call(attention_ref, *given),
            tensors,
            "attention",
            sums=(width, queries, 2 * queries),
        )


def _test_self_attention(backend: str, device: str) -> None:
    width = 16
    angle = _randn(device, angle=(19, width // 2))["angle"]
    rule: dict[str, Any] = {"chunk_size": 7, "rotary": torch.stack([angle.cos(), angle.sin()])}
    for batch, rows in ((2, {"lengths": torch.tensor([11, 19], device=device)}), (1, {"sizes": [11, 8]})):
        run = functools.partial(self_attention, **rows, **rule)
        qkv = _randn(device, qkv=(batch, 19, 3, 2, width))
        on = functools.partial(run, backend=backend)
        _check(on, functools.partial(run, backend="reference"), qkv, "self_attention", sums=(width, 19))


def _test_projection(backend: str, device: str) -> None:
    tensors = _randn(device, x=(2, 19, 24), weight=(40, 24), bias=(40,), residual=(2, 19, 40), scale=(24,), shift=(24,))

    def call(function: Call, x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor, **where: str) -> Tensor:
        residual, scale, shift = rest
        return function(x, [weight], [bias], norm=Norm(scale, shift, 1e-5), residual=residual, **where)

    run = functools.partial(call, projection, backend=backend)
    _check(run, functools.partial(call, projection_ref), tensors, "projection", sums=(24, 40, 38))


def _test_feed_forward(backend: str, device: str) -> None:
    tensors = _randn(device, x=(2, 19, 24), w1=(48, 24), b1=(48,), w2=(24, 48), b2=(24,))
    run = functools.partial(feed_forward, activation="gelu", backend=backend)
    reference = functools.partial(feed_forward_ref, activation="gelu")
    _check(run, reference, tensors, "feed_forward", sums=(24, 48, 38))


def _test_conv_block(backend: str, device: str) -> None:
    tensors = _randn(device, x=(2, 19, 24), weight=(32, 24, 3), bias=(32,), norm_weight=(32,), norm_bias=(32,))
    for rule in ({"groups": 8}, {"causal": True}):
        options: dict[str, Any] = {"lengths": torch.tensor([11, 19], device=device), **rule}
        run = functools.partial(conv_block, **options, backend=backend)
        reference = functools.partial(conv_block_ref, **options)
        _check(run, reference, tensors, "conv_block", sums=(72, 32, 38, 152))


def _test_grouped_conv(backend: str, device: str) -> None:
    tensors = _randn(device, x=(2, 19, 24), weight=(36, 6, 5), bias=(36,))
    run = functools.partial(grouped_conv, groups=4, backend=backend)
    _check(run, functools.partial(grouped_conv_ref, groups=4), tensors, "grouped_conv", sums=(30, 45, 38))


def _test_transformer_block(backend: str, device: str) -> None:
    """Forward only, as the backward pass is that of the ops that it is made of."""
    matrices = {"q": (32, 24), "k": (32, 24), "v": (32, 24), "out": (24, 32), "w1": (48, 24), "w2": (24, 48)}
    given = [*_randn(device, x=(2, 19, 24), scale=(24,), shift=(24,)).values()]
    given += [weight / weight.shape[1] ** 0.5 for weight in _randn(device, **matrices).values()]
    rule: dict[str, Any] = {"heads": 2, "activation": "gelu", "lengths": torch.tensor([11, 19], device=device)}
    rule["gates"] = None, None

    @torch.no_grad()
    def result(function: Call, dtype: torch.dtype, rounded: torch.dtype) -> dict[str, Tensor]:
        x, scale, shift, *weights = (t.to(rounded).to(dtype) for t in given)
        norm = Norm(scale, shift, 1e-5)
        out = function(x, [torch.nn.Parameter(weight) for weight in weights], [None] * 6, norms=(norm, norm), **rule)
        return {"out": torch.cat([out[0, :11], out[1]])}  # the padding holds arbitrary values

    run = functools.partial(transformer_block, backend=backend)
    for dtype in TESTED_DTYPES:
        got, eager = (result(function, dtype, dtype) for function in (run, transformer_block_ref))
        truth = result(transformer_block_ref, torch.float64, dtype)
        name = f"transformer_block {str(dtype).removeprefix('torch.')}"
        assert_parity(got, eager, truth, case=name, sums=(24, 48, 19))


def _test_euler_step(backend: str, device: str) -> None:
    """Forward only, as there is no backward pass."""
    given = _randn(device, x=(1, 19, 24), velocity=(2, 19, 24), dt=())
    for dtype in TESTED_DTYPES:
        x, velocity, dt = (t.to(dtype) for t in given.values())
        got = {"x": euler_step(x, velocity, dt, 0.7, backend=backend)[0]}
        eager = {"x": euler_step_ref(x, velocity, dt, 0.7)[0]}
        truth = {"x": euler_step_ref(x.double(), velocity.double(), dt.double(), 0.7)[0]}
        assert_parity(got, eager, truth, case=f"euler_step {str(dtype).removeprefix('torch.')}", sums=(2,))


def _test_dropout(backend: str, device: str) -> None:
    seed = torch.tensor([7], device=device)
    run = functools.partial(dropout, p=0.3, seed=seed, backend=backend)
    _check(run, functools.partial(dropout_ref, p=0.3, seed=seed), _randn(device, x=(2, 19, 24)), "dropout", sums=())


class Op(NamedTuple):
    """The dtypes of an op's kernels by backend, and its self-test on a backend and a device."""

    dtypes: _backend.Dtypes
    test: Callable[[str, str], None]


# Only the C++ backend has kernels of its own for these: elsewhere a block is the ops above, the convolution PyTorch's.
_BLOCK_DTYPES, _CONV_DTYPES = ({"cpu": dtypes["cpu"]} for dtypes in (TRANSFORMER_BLOCK_DTYPES, GROUPED_CONV_DTYPES))
OPS = {
    "interpolate": Op(INTERPOLATE_DTYPES, _test_interpolate),
    "attention": Op(ATTENTION_DTYPES, _test_attention),
    "self_attention": Op(ATTENTION_DTYPES, _test_self_attention),
    "projection": Op(PROJECTION_DTYPES, _test_projection),
    "feed_forward": Op(FEED_FORWARD_DTYPES, _test_feed_forward),
    "transformer_block": Op(_BLOCK_DTYPES, _test_transformer_block),
    "conv_block": Op(CONV_BLOCK_DTYPES, _test_conv_block),
    "grouped_conv": Op(_CONV_DTYPES, _test_grouped_conv),
    "euler_step": Op(EULER_STEP_DTYPES, _test_euler_step),
    "dropout": Op(DROPOUT_DTYPES, _test_dropout),
}


def _self_test(op: str, backend: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        OPS[op].test(backend, _device(backend))
        failure = None
    except Exception as error:  # whatever a broken installation raises is a finding, not a crash of the doctor
        failure = f"{type(error).__name__}: {error}"
    return {"passed": failure is None, "failure": failure, "seconds": round(time.perf_counter() - start, 2)}


def _examine_backend(backend: str) -> dict[str, Any]:
    why_not = {op: _why_not(op, backend) for op in OPS}
    runs = [op for op, reason in why_not.items() if reason is None]
    if runs and backend == "triton" and _device(backend) == "cpu":
        interpreter.repair()
    return {
        "runs": bool(runs),
        "device": _device(backend),
        "why_not": {op: reason for op, reason in why_not.items() if reason is not None},
        "self_test": {op: _self_test(op, backend) for op in runs},
    }


def examine() -> dict[str, Any]:
    """Everything that ``fastflow doctor`` finds, ready for JSON; ``ok`` says whether all that can run is right."""
    backends = {name: _examine_backend(name) for name in _backend.BACKENDS}
    return {
        "ok": all(test["passed"] for found in backends.values() for test in found["self_test"].values()),
        "versions": {
            "fastflow": fastflow.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{package: _version(package) for package in PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_kernels": _cpu_capability(),
            "gpus": _gpus(),
        },
        "build": _backend.extension.build_info() if _backend.extension else None,
        "build_error": _backend.extension_error or None,
        "backends": backends,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FASTFLOW_") or name == "TRITON_INTERPRET"
        },
    }


def _say(heading: str, facts: dict[str, Any], empty: str = "") -> None:
    print(heading)
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"  {name:<{width}}  {'-' if value in (None, '', []) else value}")
    if not facts:
        print(f"  {empty}")


def _sentences(facts: dict[str, Any]) -> Iterator[str]:
    """What was found about a backend, in words."""
    if not facts["runs"]:
        yield from dict.fromkeys(f"cannot run: {reason}" for reason in facts["why_not"].values())
        return
    right = [op for op, test in facts["self_test"].items() if test["passed"]]
    seconds = sum(test["seconds"] for test in facts["self_test"].values())
    if right:
        yield f"runs on {facts['device']}, self-test passed in {seconds:.1f} s: {', '.join(right)}"
    for op, test in facts["self_test"].items():
        if not test["passed"]:
            yield f"BROKEN on {facts['device']}: {op}: {test['failure']}"
    yield from facts["why_not"].values()


def show(found: dict[str, Any]) -> None:
    """Print the findings of :func:`examine` as plain text."""
    machine = {**found["machine"], "gpus": "; ".join(found["machine"]["gpus"]) or "none that torch can use"}
    _say("versions", found["versions"])
    _say("machine", machine)
    _say("compiled module", found["build"] or {}, empty=f"none: {found['build_error']}")
    _say("environment", found["environment"], empty="no FASTFLOW_* variable is set")
    backends = {name: "; ".join(_sentences(facts)) for name, facts in found["backends"].items()}
    _say("backends", backends)
    print("all that can run is right" if found["ok"] else "a backend that can run is broken")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fastflow doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """``fastflow doctor``: 0 if every backend that can run passes its self-test, else 1."""
    found = examine()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 0 if found["ok"] else 1
