"""The backends a test runs on, and a report of those that this machine could not run."""
# ruff: noqa: E402  (TRITON_INTERPRET must be set before the imports)

import collections
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before fastflow.backend and triton read it
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastflow import backend as _backend
from fastflow.testing import interpreter, tolerances

if _backend.has_triton and _backend.triton_interprets:
    interpreter.repair()

NOT_RUN = "not run: "
ALL_FLOATS = dict.fromkeys(_backend.BACKENDS, _backend.FLOATS)


def device_of(backend: str) -> str:
    """Where a backend's tensors live: the GPU for cuda and triton where there is one."""
    return "cuda" if HAS_GPU and backend in ("cuda", "triton") else "cpu"


def skip_unless_it_runs(backend: str) -> str:
    """Skip the test, with the reason, where the backend cannot run on this machine."""
    if backend == "cuda" and not HAS_GPU:
        pytest.skip(NOT_RUN + "backend cuda: this machine has no GPU")
    try:
        _backend.CAN_RUN[backend]("tests", torch.empty(1, device=device_of(backend)), ALL_FLOATS, raise_error=True)
    except RuntimeError as error:
        pytest.skip(NOT_RUN + str(error).removeprefix("tests: "))
    return backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", help="folder of recorded upstream cases (default tests/golden)")


@pytest.fixture(params=_backend.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each of the four backends."""
    return skip_unless_it_runs(request.param)


@pytest.fixture(params=[name for name in _backend.BACKENDS if name != "reference"])
def kernel_backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels of its own."""
    return skip_unless_it_runs(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the test's backend."""
    name = "backend" if "backend" in request.fixturenames else "kernel_backend"
    return torch.device(device_of(request.getfixturevalue(name)))


@pytest.fixture
def modules_on(monkeypatch: pytest.MonkeyPatch):
    """A context in which modules run on a backend, and on the next best where it lacks a kernel.

    ``use_backend`` would refuse the ops that it lacks.
    """

    def choose(backend: str) -> _backend.use_backend:
        if backend == "reference":
            return _backend.use_backend(backend)
        device = device_of(backend)
        rest = [name for name in _backend.PREFERENCE[device] if name != backend]
        monkeypatch.setitem(_backend.PREFERENCE, device, (backend, *rest))
        return _backend.use_backend("auto")

    return choose


@pytest.fixture
def full_size(request: pytest.FixtureRequest) -> None:
    """For tests of real sizes, which take minutes in Triton's interpreter."""
    name = "backend" if "backend" in request.fixturenames else "kernel_backend"
    if request.getfixturevalue(name) == "triton" and not HAS_GPU:
        pytest.skip(NOT_RUN + "full size on triton: this machine has no GPU")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_backend():
    """No test leaves a chosen backend behind."""
    previous = _backend.current_backend()
    yield
    _backend.use_backend(previous)


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, which is never a pass, and how near the kernels are to the references."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in skipped if isinstance(report.longrepr, tuple)]
    for reason, count in collections.Counter(r for r in reasons if r.startswith(NOT_RUN)).items():
        terminalreporter.write_line(f"{count} tests {reason}")
    if tolerances.history:
        worst = max(tolerances.history, key=lambda parity: max(parity.max_ratio, parity.rms_ratio))
        above = sum(max(p.max_ratio, p.rms_ratio) > tolerances.TARGET for p in tolerances.history)
        terminalreporter.write_line(
            f"op parity: {len(tolerances.history)} comparisons, {above} above the target of {tolerances.TARGET}; worst "
            f"{worst.name}: {worst.max_ratio:.2f} (max), {worst.rms_ratio:.2f} (rms); the gate is {tolerances.GATE}"
        )
