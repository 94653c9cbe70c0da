"""The generators on which a flow draws: Python's ``random`` and torch's, on the CPU and on the flow's GPU."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of all generators that training on ``device`` uses; holds what ``torch.load(weights_only=True)`` reads."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`rng_state` gave.

    Raises:
        ValueError: the state was taken on a CPU and ``device`` is a GPU.
    """
    if device.type == "cuda" and "cuda" not in state:
        raise ValueError(f"the generator states were saved on a CPU; they cannot continue a run on {device}")
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the generators go on as if it had not been."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
