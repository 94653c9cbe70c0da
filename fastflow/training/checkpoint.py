"""Checkpoints that a killed run can trust: whole or not there, and loadable with ``weights_only=True``."""

import os
from pathlib import Path
from typing import Any

import torch

KEPT = 2


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-<step>.pt`` and drop all but the latest two.

    The file is written under another name, flushed to the disk and renamed, so a run that is killed at any moment
    leaves the checkpoint before it.

    Args:
        state: tensors, numbers, strings, and lists, tuples and dicts of them.

    Raises:
        TypeError: the state holds something that ``torch.load(weights_only=True)`` would refuse.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check(state, "state")
    path = folder / f"step-{step:08d}.pt"
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in ``folder``, the latest last."""
    return sorted(Path(folder).glob("step-*.pt"))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`save_checkpoint` was given, tensors on ``device``.

    Raises:
        FileNotFoundError: no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    return torch.load(path, map_location=device, weights_only=True)


def _check(value: Any, name: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(inner, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            _check(inner, f"{name}[{number}]")
    elif not isinstance(value, (torch.Tensor, int, float, str, bool, type(None))):
        raise TypeError(f"{name} is a {type(value).__name__}: only tensors, numbers and strings can be stored")
