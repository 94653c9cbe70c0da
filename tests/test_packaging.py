"""The wheel: what is in it, that it works away from the sources, and what happens where it cannot be compiled."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from fastflow import backend

for tool in ("setuptools", "pybind11", "pip"):
    pytest.importorskip(tool, reason=f"not run: building a wheel needs {tool}")
import pybind11  # noqa: E402

CMAKE = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
if CMAKE is None:
    pytest.skip("not run: building a wheel needs cmake", allow_module_level=True)

ROOT = Path(__file__).parent.parent
SOURCES = ("CMakeLists.txt", "LICENSE", "README.md", "csrc", "fastflow", "kernels", "pyproject.toml", "setup.py")
if not (ROOT / "setup.py").exists():
    pytest.skip("not run: there is no source tree to build from", allow_module_level=True)


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output and error; an exit status other than 0 fails the test."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build in a copy of the sources; the wheel and the build's output."""
    tree = folder / "tree"
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(source, tree)
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, tree)
    output = run(*command, cwd=folder, **environment)
    return next(folder.glob("*.whl")), output


def install(wheel: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=wheel.parent)
    return folder


def run_installed(code: str, folder: Path, **environment: str) -> str:
    """Run code in an empty folder, where fastflow comes from ``folder`` and all else from the environment.

    Without ``site`` (-S), or an editable installation of fastflow would join in through its import hook.
    """
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    empty = folder.parent / "empty"
    empty.mkdir()
    path = os.pathsep.join([str(folder), *packages])
    return run(sys.executable, "-S", "-c", code, cwd=empty, PYTHONPATH=path, **environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return build_wheel(tmp_path_factory.mktemp("wheel"), FASTFLOW_SKIP_CUDA="1")


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, str]) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def module(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module of the wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (found,) = (folder / "fastflow").glob("_C.*.so")
    return found


def symbols(path: Path, *options: str) -> list[str]:
    return run("nm", "-C", *options, path, cwd=path.parent).splitlines()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fastflow", f"fastflow-{wheel.name.split('-')[1]}.dist-info"}
    expected = {
        str(path.relative_to(ROOT)) for path in (ROOT / "fastflow").rglob("*.py") if "kernels" not in path.parts
    }
    expected |= {f"fastflow/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert expected <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert any(name.endswith("licenses/LICENSE") for name in names)


SMOKE = """
import pathlib, torch, fastflow, fastflow.kernels
from fastflow import backend
from fastflow.ops.interpolate import interpolate

home = pathlib.Path(fastflow.__file__).parent
assert home.parent == pathlib.Path({folder!r}), home
x = torch.arange(60.0).view(2, 10, 3)
want = interpolate(x, [(10, 17)], backend="reference")
for capability in backend.extension.cpu_capabilities():
    backend.extension.set_cpu_capability(capability)
    got = interpolate(x, [(10, 17)], backend="cpu")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    print("ran", capability)
if backend.has_triton:
    torch.testing.assert_close(interpolate(x, [(10, 17)], backend="triton"), want, rtol=1e-6, atol=1e-6)
print(backend.extension.build_info())
"""


def test_installed_wheel_runs_away_from_the_sources(wheel: Path, tmp_path: Path):
    folder = install(wheel, tmp_path / "site")
    output = run_installed(SMOKE.format(folder=str(folder)), folder, TRITON_INTERPRET="1")
    assert "ran baseline" in output


def test_module_needs_no_cpp_symbol_of_torch(module: Path):
    """Only the C functions of the stable ABI, which every torch from 2.11 on has."""
    torch_cpp = [line for line in symbols(module, "-D") if re.search(r"\b(c10|at|torch)::", line)]
    assert torch_cpp == []
    assert any("aoti_torch_" in line for line in symbols(module, "-D")), "the check reads the right file"


def test_module_finds_torch_beside_itself(module: Path):
    dynamic = run("readelf", "-d", module, cwd=module.parent)
    assert "[$ORIGIN/../torch/lib]" in dynamic
    assert set(re.findall(r"Shared library: \[(lib(?:torch|c10|cuda)[^\]]*)\]", dynamic)) == {"libtorch_cpu.so"}


def test_instruction_sets_share_no_code(built: tuple[Path, str]):
    """A weak symbol in one of these could replace the baseline's copy, and crash older CPUs."""
    objects = [path for path in built[0].parent.rglob("*.o") if "cpu_" in path.parent.as_posix()]
    assert objects
    for path in objects:
        defined = [line.split(maxsplit=2) for line in symbols(path, "--defined-only")]
        assert {kind for _, kind, _ in defined if kind.isupper()} <= {"T", "R"}, path
        assert all("fastflow::cpu::" in name for _, kind, name in defined if kind == "T"), path


def test_build_prints_one_summary(built: tuple[Path, str]):
    summary = re.findall(r"--   (torch|python|compiler|CPU kernels|CUDA) ", built[1])
    assert summary == ["torch", "python", "compiler", "CPU kernels", "CUDA"]
    assert "CUDA         OFF (FASTFLOW_SKIP_CUDA=1)" in built[1]


PURE = """
import torch
from fastflow import backend
from fastflow.ops.interpolate import interpolate

assert backend.extension is None
x = torch.ones(1, 4, 2)
assert interpolate(x, [(4, 6)]).shape == (1, 6, 2)
try:
    interpolate(x, [(4, 6)], backend="cpu")
except RuntimeError as error:
    print(error)
"""


def test_without_a_compiler_the_reference_path_is_installed(tmp_path: Path):
    wheel, output = build_wheel(tmp_path, CXX="no-such-compiler")
    assert "building WITHOUT the compiled module: no C++ compiler was found" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    folder = install(wheel, tmp_path / "site")
    assert "installed without its compiled module" in run_installed(PURE, folder)


def test_forcing_cuda_without_nvcc_names_both_versions(tmp_path: Path):
    folders = {"FASTFLOW_TORCH_DIR": Path(torch.__file__).parent, "pybind11_DIR": pybind11.get_cmake_dir()}
    options = [f"-D{name}={value}" for name, value in {**folders, "NVCC": "OFF"}.items()]
    process = subprocess.run(
        [CMAKE, "-S", ROOT, "-B", tmp_path, *options],
        env={**os.environ, "FASTFLOW_FORCE_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode != 0
    message = " ".join(process.stderr.split())
    assert re.search(r"FASTFLOW_FORCE_CUDA=1, but no nvcc in PATH.* \(torch's CUDA: '.*', nvcc: ''\)", message)


@pytest.mark.skipif(backend.extension is None, reason="not run: no compiled module")
def test_build_info_states_the_facts():
    info = backend.extension.build_info()
    assert {"version", "git", "torch", "compiler", "cuda", "nvcc", "cuda_archs"} <= set(info)
    assert isinstance(info["cuda"], bool)
    assert info["cuda"] == bool(info["nvcc"])
