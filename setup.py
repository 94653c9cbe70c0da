"""Thin: says where torch is and calls CMake, which decides everything else (CMakeLists.txt)."""

import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_torch() -> Path | None:
    """The installed torch package, without importing it.

    Build isolation hides it from the import system, so the site-packages of this Python and of the activated virtual
    environment are searched as well: no second torch is downloaded for a build.
    """
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    prefixes = [os.environ.get("VIRTUAL_ENV", sys.prefix), sys.prefix, sys.base_prefix]
    folders = [Path(folder, "torch") for folder in [*site.getsitepackages(prefixes), site.getusersitepackages()]]
    return next((folder for folder in folders if (folder / "version.py").exists()), None)


def find_compiler() -> str | None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def find_tool(name: str) -> str | None:
    """cmake or ninja, first where pip puts them, also when the environment is not activated."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))


def missing_for_extension() -> str:
    """Why the compiled module cannot be built; empty if it can."""
    if find_torch() is None:
        return (
            "no installed torch was found; install torch first, then build with --no-build-isolation "
            "(python -m build: --no-isolation) or in an activated virtual environment"
        )
    if find_compiler() is None:
        return "no C++ compiler was found (looked for CXX, c++, g++ and clang++)"
    return ""


class CMakeBuild(build_ext):
    """Builds the extension with CMake in a folder that stays, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if cmake is None:
            raise RuntimeError("building fastflow needs cmake: pip install cmake ninja pybind11")
        build = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-{'ninja' if ninja else 'make'}"
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options: dict[str, object] = {
            "Python_EXECUTABLE": sys.executable,
            "FASTFLOW_TORCH_DIR": find_torch(),
            "FASTFLOW_VERSION": self.distribution.get_version(),
        }
        if (spec := importlib.util.find_spec("pybind11")) and spec.origin:
            options["pybind11_DIR"] = Path(spec.origin).parent / "share" / "cmake" / "pybind11"
        if ninja:  # given every time, as build isolation puts it in another place every time
            options["CMAKE_MAKE_PROGRAM"] = ninja
        defines = [f"-D{name}={value}" for name, value in options.items()]
        generator = "Ninja" if ninja else "Unix Makefiles"
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", generator, *defines], check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        subprocess.run([cmake, "--install", build, "--prefix", destination], check=True)


if missing := missing_for_extension():
    line = "*" * 100
    print(
        f"\n{line}\nfastflow: building WITHOUT the compiled module: {missing}.\n"
        f"fastflow: the reference path and Triton will work; the cpu and cuda backends will not.\n{line}\n",
        file=sys.stderr,
    )

setup(
    packages=["fastflow.kernels", *find_packages(include=["fastflow", "fastflow.*"])],
    package_dir={"fastflow": "fastflow", "fastflow.kernels": "kernels"},
    ext_modules=[] if missing else [Extension("fastflow._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
