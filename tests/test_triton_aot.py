"""Every Triton kernel compiles for every architecture, without spilling and within its ceilings."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

from fastflow import backend as backends
from fastflow.testing import aot

KERNELS = pathlib.Path(__file__).parent.parent / "kernels"
SOURCES = sorted(path for path in KERNELS.glob("*.py") if path.name not in ("__init__.py", "half.py"))


def kernels_in(path):
    """Names of the kernels of a file, that is of its jitted functions called something_kernel."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if f.decorator_list and f.name.endswith("_kernel")}


def test_compiles_within_the_ceilings():
    """In processes without the interpreter; one test for all architectures, so that nothing is compiled twice."""
    if not backends.has_triton:
        pytest.skip("not run: triton is not installed")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastflow.testing.aot", *map(str, aot.SHARED_MEMORY)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    uses = [aot.Use(**json.loads(line)) for line in result.stdout.splitlines()]
    most_stack, registers = aot.slack()
    for architecture, most in aot.SHARED_MEMORY.items():
        assert {use.kernel for use in uses if use.architecture == architecture} == set(aot.CEILINGS)
        for use in (use for use in uses if use.architecture == architecture):
            ceiling = aot.CEILINGS[use.kernel]
            assert use.stack <= most_stack, use
            assert use.registers <= min(registers * ceiling.registers, 255), use
            assert use.shared <= min(ceiling.shared, most), use
            assert use.explicit_fusion, use


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_kernel_is_in_the_table(path):
    assert path.stem in aot.LAUNCHES
    assert kernels_in(path) <= set(aot.CEILINGS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["make_block_ptr", "advance", "autotune", "heuristics"])
def test_uses_nothing_that_cannot_be_shipped_compiled(path, name):
    used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert name not in used
