"""``keep_freed_memory``: what one step frees, the next one finds without a page fault."""

import os
import platform
import subprocess
import sys

import pytest

from fastflow.training import memory

STEPS = """
import resource
import torch
from fastflow.training import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return [torch.zeros(2**20, 4) for _ in range(20)]  # 16 MiB each

{call}
step()
before = faults()
step()
print(faults() - before)
"""


def faults_of_a_step(call: str) -> int:
    """Of a process whose allocator nothing in the environment has set."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", STEPS.format(call=call)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not run: the C library is not glibc")
def test_a_second_step_finds_its_memory():
    pages = 20 * 2**24 // 4096
    assert faults_of_a_step("pass") > pages // 2
    assert faults_of_a_step("assert keep_freed_memory()") < pages // 4  # a tensor or two find no place that fits


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # nothing may be called
    assert not memory.keep_freed_memory()
