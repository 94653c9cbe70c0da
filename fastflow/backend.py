"""Which implementation of an op runs.

Four backends exist: ``reference`` (plain PyTorch, any device), ``cpu`` (C++, csrc/cpu), ``cuda`` (csrc/cuda) and
``triton`` (kernels/).  ``auto`` takes the first one that can run for each op.  Any other choice, by argument, by
:func:`use_backend` or by the environment variable ``FASTFLOW_BACKEND``, runs or raises with the reason.
"""

import contextlib
import importlib.util
import os
import threading
from collections.abc import Collection, Mapping
from types import ModuleType, TracebackType

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "cuda", "triton")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})

Dtypes = Mapping[str, Collection[torch.dtype]]


def _load_extension() -> tuple[ModuleType | None, str]:
    """Import the compiled module, which registers the C++ and CUDA ops; without it, say why."""
    try:
        from fastflow import _C  # type: ignore[attr-defined]
    except ImportError as error:
        if importlib.util.find_spec("fastflow._C") is None:
            return None, "fastflow was installed without its compiled module (no C++ compiler, or torch was missing)"
        return None, f"the compiled module does not load with torch {torch.__version__}: {error}"
    return _C, ""


extension, extension_error = _load_extension()
has_triton = importlib.util.find_spec("triton") is not None
# Triton reads this when the kernels are first imported, so later changes have no effect here either.
triton_interprets = os.environ.get("TRITON_INTERPRET") == "1"


def _check_name(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


_default = _check_name(os.environ.get("FASTFLOW_BACKEND", "auto"), "FASTFLOW_BACKEND")
_thread = threading.local()


def current_backend() -> str:
    """The backend in force in this thread: ``auto`` unless chosen otherwise."""
    return getattr(_thread, "backend", _default)


class use_backend:  # noqa: N801  (used like a function, as torch.no_grad is)
    """Choose the backend of every op, as a call or as a context manager.

    Like :func:`torch.set_grad_enabled` it holds for the current thread; for a whole process set ``FASTFLOW_BACKEND``.
    A backward pass runs on the backend of its forward pass.

    Args:
        name: ``auto``, ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Raises:
        ValueError: the name is none of these.  An op that cannot run on the backend raises RuntimeError when called.
    """

    def __init__(self, name: str) -> None:
        self._previous = current_backend()
        _thread.backend = _check_name(name, "backend")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.backend = self._previous


def _refuse(reason: str, raise_error: bool) -> bool:
    if raise_error:
        raise RuntimeError(reason)
    return False


def can_run_reference(op: str, x: Tensor, dtypes: Dtypes, raise_error: bool = False) -> bool:
    """Plain PyTorch runs whatever PyTorch runs."""
    return True


def _can_run_compiled(backend: str, device: str, op: str, x: Tensor, dtypes: Dtypes, raise_error: bool) -> bool:
    reason = f"{op}: backend {backend!r} cannot run: "
    if extension is None:
        return _refuse(reason + extension_error, raise_error)
    if backend == "cuda" and not extension.build_info()["cuda"]:
        return _refuse(reason + "fastflow was built without CUDA (see `fastflow doctor`)", raise_error)
    if x.device.type != device:
        return _refuse(reason + f"it needs tensors on {device}, got {x.device}", raise_error)
    if x.dtype not in dtypes.get(backend, ()):
        return _refuse(reason + f"it does not support {x.dtype}", raise_error)
    return True


def can_run_cpu(op: str, x: Tensor, dtypes: Dtypes, raise_error: bool = False) -> bool:
    """Whether the C++ kernel of ``op`` can run on ``x``; with ``raise_error`` a RuntimeError says why not."""
    return _can_run_compiled("cpu", "cpu", op, x, dtypes, raise_error)


def can_run_cuda(op: str, x: Tensor, dtypes: Dtypes, raise_error: bool = False) -> bool:
    """Whether the CUDA C++ kernel of ``op`` can run on ``x``; with ``raise_error`` a RuntimeError says why not."""
    return _can_run_compiled("cuda", "cuda", op, x, dtypes, raise_error)


def can_run_triton(op: str, x: Tensor, dtypes: Dtypes, raise_error: bool = False) -> bool:
    """Whether the Triton kernel of ``op`` can run on ``x``; with ``raise_error`` a RuntimeError says why not."""
    reason = f"{op}: backend 'triton' cannot run: "
    if not has_triton:
        return _refuse(reason + "triton is not installed", raise_error)
    if x.device.type != "cuda" and not (x.device.type == "cpu" and triton_interprets):
        needed = "it needs tensors on cuda, or TRITON_INTERPRET=1 set before the start for its interpreter on cpu"
        return _refuse(reason + f"{needed}; got {x.device}", raise_error)
    if x.dtype not in dtypes.get("triton", ()):
        return _refuse(reason + f"it does not support {x.dtype}", raise_error)
    return True


# Asked once, as torch.compile of torch 2.11 cannot trace the question.
_AUTOCASTS = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """What a reference computes in keeps its dtype, as in the kernels, even where autocast would change it."""
    if x.device.type in _AUTOCASTS:
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


CAN_RUN = {
    "reference": can_run_reference,
    "cpu": can_run_cpu,
    "cuda": can_run_cuda,
    "triton": can_run_triton,
}


def select(op: str, x: Tensor, dtypes: Dtypes, backend: str | None = None) -> str:
    """The backend that runs ``op`` on ``x``.

    Args:
        op: name of the op, for messages.
        x: the tensor whose device and dtype decide.
        dtypes: the dtypes that each compiled backend of this op supports.
        backend: an explicit choice; None takes :func:`current_backend`.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the chosen backend cannot run, with the reason.
    """
    name = current_backend() if backend is None else _check_name(backend, "backend")
    if name != "auto":
        CAN_RUN[name](op, x, dtypes, raise_error=True)
        return name
    for candidate in PREFERENCE.get(x.device.type, ()):
        if CAN_RUN[candidate](op, x, dtypes):
            return candidate
    return "reference"
