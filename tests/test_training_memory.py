"""``keep_freed_memory``: what one step frees, the next one finds without a page fault."""

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
IS_GLIBC = "not run: this system has no glibc"


def faults_of_a_step(call: str) -> int:
    found = subprocess.run([sys.executable, "-c", STEPS.format(call=call)], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason=IS_GLIBC)
def test_a_second_step_finds_its_memory():
    assert memory.keep_freed_memory(), IS_GLIBC
    pages = 20 * 2**24 // 4096
    assert faults_of_a_step("pass") > pages // 2
    assert faults_of_a_step("assert keep_freed_memory()") < pages // 10


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_it_says_that_it_cannot(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert not memory.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
