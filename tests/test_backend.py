"""The backend that was chosen is the one that runs, or an error says why it cannot."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from fastflow import backend as backends
from fastflow import use_backend
from fastflow.backend import current_backend, select
from fastflow.ops import interpolate

X = torch.randn(1, 4, 2)
ALL = dict.fromkeys(backends.BACKENDS, backends.FLOATS)


def python(code, **env):
    """Run code in a new process without this one's choices."""
    clean = {key: value for key, value in os.environ.items() if key not in ("FASTFLOW_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True)


def test_a_call_chooses_until_the_next():
    use_backend("reference")
    assert current_backend() == "reference"
    use_backend("auto")
    assert current_backend() == "auto"


def test_a_context_chooses_inside_only():
    with use_backend("reference"):
        assert current_backend() == "reference"
        with use_backend("triton"):
            assert current_backend() == "triton"
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_an_exception_restores_the_choice():
    def fail():
        with use_backend("reference"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert current_backend() == "auto"


def test_a_choice_holds_in_its_own_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_an_unknown_name_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, cuda, triton; got 'gpu'"):
        use_backend("gpu")
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'gpu'"):
        interpolate(X, [(4, 8)], backend="gpu")
    assert current_backend() == "auto"


def test_the_argument_outranks_the_context():
    with use_backend("cuda"):
        assert select("op", X, ALL, "reference") == "reference"
        interpolate(X, [(4, 8)], backend="reference")
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
            interpolate(X, [(4, 8)])


def test_the_argument_auto_outranks_the_context_too():
    with use_backend("cuda"):
        assert interpolate(X, [(4, 8)], backend="auto").shape == (1, 8, 2)


def test_the_environment_sets_the_default():
    code = "from fastflow.backend import current_backend; print(current_backend())"
    assert python(code).stdout.strip() == "auto"
    assert python(code, FASTFLOW_BACKEND="reference").stdout.strip() == "reference"


def test_the_environment_holds_in_every_thread_and_yields_to_a_call():
    code = """
import threading
from fastflow import use_backend
from fastflow.backend import current_backend
thread = threading.Thread(target=lambda: print(current_backend()))
thread.start(); thread.join()
use_backend("triton"); print(current_backend())
"""
    assert python(code, FASTFLOW_BACKEND="reference").stdout.split() == ["reference", "triton"]


def test_a_bad_environment_stops_the_import_with_its_name():
    result = python("import fastflow", FASTFLOW_BACKEND="gpu")
    assert result.returncode
    assert "ValueError: FASTFLOW_BACKEND must be one of auto, reference, cpu, cuda, triton; got 'gpu'" in result.stderr


def test_an_environment_that_cannot_run_raises_at_the_call():
    code = "import torch; from fastflow.ops import interpolate; interpolate(torch.ones(1, 4, 2), [(4, 8)])"
    result = python(code, FASTFLOW_BACKEND="cuda")
    assert "RuntimeError: interpolate: backend 'cuda' cannot run: " in result.stderr


def test_import_loads_no_triton():
    code = "import sys, fastflow, fastflow.ops; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_the_interpreter_must_be_asked_for():
    code = """
import torch
from fastflow.ops import interpolate
interpolate(torch.ones(1, 4, 2), [(4, 8)], backend="triton")
"""
    result = python(code)
    assert "'triton' cannot run: it needs tensors on cuda, or TRITON_INTERPRET=1 set before the start" in result.stderr
    assert python(code, TRITON_INTERPRET="1").returncode == 0


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_no_compiled_module(name, monkeypatch):
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", "it is not there")
    with pytest.raises(RuntimeError, match=f"interpolate: backend '{name}' cannot run: it is not there"):
        interpolate(X, [(4, 8)], backend=name)
    assert select("op", X, ALL) == "reference"
    assert torch.equal(interpolate(X, [(4, 8)]), interpolate(X, [(4, 8)], backend="reference"))


class Built:
    """A compiled module, with or without CUDA."""

    def __init__(self, cuda):
        self.cuda = cuda

    def build_info(self):
        return {"cuda": self.cuda}


def test_built_without_cuda(monkeypatch):
    monkeypatch.setattr(backends, "extension", Built(cuda=False))
    with pytest.raises(RuntimeError, match="op: backend 'cuda' cannot run: fastflow was built without CUDA"):
        select("op", X, ALL, "cuda")


def test_tensors_on_the_wrong_device(monkeypatch):
    monkeypatch.setattr(backends, "extension", Built(cuda=True))
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: it needs tensors on cuda, got cpu"):
        select("op", X, ALL, "cuda")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: it needs tensors on cpu, got meta"):
        select("op", X.to("meta"), ALL, "cpu")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run: it needs tensors on cuda, .*; got meta"):
        select("op", X.to("meta"), ALL, "triton")


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_an_unsupported_dtype(name, monkeypatch):
    monkeypatch.setattr(backends, "extension", Built(cuda=False))
    monkeypatch.setattr(backends, "triton_interprets", True)
    only_float = {name: {torch.float32}}
    assert select("op", X, only_float, name) == name
    with pytest.raises(RuntimeError, match=f"op: backend '{name}' cannot run: it does not support torch.float64"):
        select("op", X.double(), only_float, name)


def test_no_triton(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", False)
    with pytest.raises(RuntimeError, match="op: backend 'triton' cannot run: triton is not installed"):
        select("op", X, ALL, "triton")


def test_auto_takes_the_first_that_can_run(monkeypatch):
    monkeypatch.setattr(backends, "extension", Built(cuda=False))
    assert select("op", X, ALL) == "cpu"
    assert select("op", X, {}) == "reference"
    assert select("op", X.to("meta"), ALL) == "reference"


def test_auto_prefers_triton_to_cuda_to_the_reference_on_a_gpu(monkeypatch):
    class OnGpu:
        device = torch.device("cuda")
        dtype = torch.float32

    monkeypatch.setattr(backends, "extension", Built(cuda=True))
    monkeypatch.setattr(backends, "has_triton", True)
    assert select("op", OnGpu(), ALL) == "triton"
    assert select("op", OnGpu(), {"cuda": backends.FLOATS}) == "cuda"
    assert select("op", OnGpu(), {"cpu": backends.FLOATS}) == "reference"


def test_every_chosen_backend_is_the_one_that_runs(backend, device):
    """The registered ops of the others are never reached."""
    x = X.to(device)
    with torch.profiler.profile() as profile, use_backend(backend):
        interpolate(x, [(4, 8)])
    calls = {event.name for event in profile.events() if event.name.startswith("fastflow::")}
    assert (
        calls
        == {
            "reference": set(),
            "cpu": {"fastflow::interpolate"},
            "cuda": {"fastflow::interpolate"},
            "triton": {"fastflow::interpolate_triton"},
        }[backend]
    )
