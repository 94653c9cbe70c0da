"""Without a GPU: the CUDA kernels compile for every architecture that a wheel serves, and fit into its registers."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pybind11 = pytest.importorskip("pybind11", reason="not run: building the module needs pybind11")

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MAX_REGISTERS = 64  # of 65536 per multiprocessor: 4 blocks of 256 threads at once
MAX_SHARED = 48 * 1024  # bytes: what a kernel gets without asking for more
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))

if NVCC is None:
    pytest.skip("not run: this machine has no nvcc", allow_module_level=True)
if not KERNELS:
    pytest.skip("not run: there is no source tree to compile", allow_module_level=True)


class Usage(NamedTuple):
    architecture: str
    kernel: str
    stack: int
    spills: int
    registers: int
    shared: int


REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def read_report(text: str) -> list[Usage]:
    """What ptxas -v says about each kernel."""
    return [
        Usage(
            found["architecture"],
            found["kernel"],
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
            int(found["registers"]),
            int(found["shared"] or 0),
        )
        for found in REPORT.finditer(text)
    ]


@pytest.fixture(scope="module", params=KERNELS, ids=lambda path: path.name)
def usages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    """Compile one .cu file as CMakeLists.txt does, for all architectures."""
    targets = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in ARCHITECTURES]
    options = ["-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", "-Xptxas=-v", *targets]
    out = tmp_path_factory.mktemp("cuda") / "kernel.o"
    process = subprocess.run([NVCC, *options, "-c", request.param, "-o", out], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return read_report(process.stderr)


def test_every_kernel_is_compiled_for_every_architecture(usages: list[Usage]):
    kernels = {usage.kernel for usage in usages}
    assert len(kernels) >= 4  # one per dtype
    assert {(usage.architecture, usage.kernel) for usage in usages} == {(a, k) for a in ARCHITECTURES for k in kernels}


def test_kernels_use_neither_stack_nor_spills(usages: list[Usage]):
    assert [usage for usage in usages if usage.stack or usage.spills] == []


def test_kernels_stay_below_the_ceilings(usages: list[Usage]):
    assert [usage for usage in usages if usage.registers > MAX_REGISTERS or usage.shared > MAX_SHARED] == []


def test_the_report_is_read_right():
    text = """
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 9248 bytes smem, 564 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert read_report(text) == [Usage("sm_90", "_Z1aPf", 16, 12, 40, 9248), Usage("sm_90", "_Z1bPf", 0, 0, 8, 0)]


LOAD = """
import torch
from fastflow import backend
from fastflow.ops.interpolate import interpolate

assert backend.extension is not None, backend.extension_error
info = backend.extension.build_info()
assert info["cuda"] and info["nvcc"], info
x = torch.ones(1, 4, 2)
assert interpolate(x, [(4, 6)], backend="cpu").eq(1).all()
try:
    interpolate(x, [(4, 6)], backend="cuda")
except RuntimeError as error:
    assert "it needs tensors on cuda" in str(error)
"""


def test_module_with_cuda_loads_with_any_torch(tmp_path: Path):
    """Here the installed torch, also one without CUDA: nothing but libtorch_cpu is linked."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
    if cmake is None:
        pytest.skip("not run: building the module needs cmake")
    folders = {"FASTFLOW_TORCH_DIR": Path(torch.__file__).parent, "pybind11_DIR": pybind11.get_cmake_dir()}
    options = [f"-D{name}={value}" for name, value in folders.items()] + [f"-DPython_EXECUTABLE={sys.executable}"]
    build, site = tmp_path / "build", tmp_path / "site"
    shutil.copytree(ROOT / "fastflow", site / "fastflow", ignore=shutil.ignore_patterns("*.so", "kernels"))
    for command in (
        [cmake, "-S", ROOT, "-B", build, *options],
        [cmake, "--build", build, "--parallel", str(os.cpu_count())],
        [cmake, "--install", build, "--prefix", site / "fastflow"],
        [sys.executable, "-c", LOAD],
    ):
        forced = {"FASTFLOW_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0", "PYTHONPATH": str(site)}
        process = subprocess.run(command, env={**os.environ, **forced}, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
