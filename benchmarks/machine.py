"""What a result depends on besides the code: machine, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastflow
from fastflow import backend

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "triton", "diffusers", "einops", "x-transformers")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit, for the result file."""
    changes = _git("status", "--porcelain")
    return {
        "machine": {
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
            "cpu": _cpu(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": os.getloadavg()[0],
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "fastflow": fastflow.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in PACKAGES},
        },
        "build": backend.extension.build_info() if backend.extension else backend.extension_error,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
