"""``fastflow doctor``: what is installed, which backends can run and which not and why, and whether they are right."""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastflow
from fastflow import backend as _backend
from fastflow.ops import interpolate, interpolate_ref
from fastflow.ops.interpolate import DTYPES
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


def _why_not(backend: str) -> str | None:
    """Why a backend cannot run on this machine; None if it can."""
    probe = torch.empty(1, device=_device(backend))
    try:
        _backend.CAN_RUN[backend]("doctor", probe, DTYPES, raise_error=True)
    except RuntimeError as error:
        reason = str(error).removeprefix(f"doctor: backend {backend!r} cannot run: ")
        return reason.removesuffix(" (see `fastflow doctor`)")
    return None


def _forward_backward(x: Tensor, grad: Tensor, segments: Any, backend: str | None) -> dict[str, Tensor]:
    """Output and input gradient of interpolate; ``backend`` None is the reference itself."""
    x = x.detach().requires_grad_()
    frames = grad.shape[1]
    out = interpolate_ref(x, segments, frames) if backend is None else interpolate(x, segments, frames, backend=backend)
    return {"out": out.detach(), "grad": torch.autograd.grad(out, x, grad)[0]}


def _test_interpolate(backend: str, device: str) -> None:
    """Forward and backward against float64 by the op-parity rule, which allows twice the reference's own error."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, t, 24, generator=generator).to(device) for t in (29, 50))
    shared = [(5, 9), (23, 39)]
    per_row = torch.tensor([[[5, 9], [23, 39]], [[4, 7], [11, 19]]], device=device)
    for dtype in TESTED_DTYPES:
        for segments in (shared, per_row):
            call = x.to(dtype), grad.to(dtype)
            assert_parity(
                _forward_backward(*call, segments, backend),
                _forward_backward(*call, segments, None),
                _forward_backward(call[0].double(), call[1].double(), segments, None),
                case=f"interpolate {str(dtype).removeprefix('torch.')}",
                sums=(2, 4),
            )


def _self_test(backend: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        if backend == "triton" and _device(backend) == "cpu":
            interpreter.repair()
        _test_interpolate(backend, _device(backend))
        failure = None
    except Exception as error:  # whatever a broken installation raises is a finding, not a crash of the doctor
        failure = f"{type(error).__name__}: {error}"
    return {"passed": failure is None, "failure": failure, "seconds": round(time.perf_counter() - start, 2)}


def examine() -> dict[str, Any]:
    """Everything that ``fastflow doctor`` finds, ready for JSON; ``ok`` says whether all that can run is right."""
    backends: dict[str, Any] = {}
    for name in _backend.BACKENDS:
        why_not = _why_not(name)
        backends[name] = {
            "runs": why_not is None,
            "why_not": why_not,
            "device": _device(name),
            "self_test": _self_test(name) if why_not is None else None,
        }
    return {
        "ok": all(found["self_test"]["passed"] for found in backends.values() if found["runs"]),
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


def show(found: dict[str, Any]) -> None:
    """Print the findings of :func:`examine` as plain text."""
    machine = {**found["machine"], "gpus": "; ".join(found["machine"]["gpus"]) or "none that torch can use"}
    _say("versions", found["versions"])
    _say("machine", machine)
    _say("compiled module", found["build"] or {}, empty=f"none: {found['build_error']}")
    _say("environment", found["environment"], empty="no FASTFLOW_* variable is set")
    backends = {}
    for name, facts in found["backends"].items():
        if not facts["runs"]:
            backends[name] = f"cannot run: {facts['why_not']}"
        elif facts["self_test"]["passed"]:
            backends[name] = f"runs on {facts['device']}; self-test passed in {facts['self_test']['seconds']} s"
        else:
            backends[name] = f"BROKEN on {facts['device']}: {facts['self_test']['failure']}"
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
