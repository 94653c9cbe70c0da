"""Argument checks of the flow modules: every message names the argument, what was given and what is allowed.

Shapes, dtypes and devices are always checked.  Values are checked for tensors on the CPU only, since reading device
memory would stall the device; and not while torch.compile traces.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Whether looking at the values of ``x`` costs no synchronisation."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_shape(name: str, x: object, shape: Sequence[int | None], smallest: int = 1) -> None:
    """``shape`` holds a number, or None for any size of at least ``smallest``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    given = tuple(x.shape)
    fits = len(given) == len(shape) and all(
        size >= smallest if want is None else size == want for size, want in zip(given, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(f">= {smallest}" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(given)}")


def check_row(name: str, x: object, *shape: int | None) -> None:
    """A tensor of one utterance, ``[1, ...]``; sizes given as None may be 0."""
    check_shape(name, x, (1, *shape), smallest=0)


def check_tokens(name: str, x: Tensor, vocab_size: int) -> None:
    """Integer ids below ``vocab_size``; negative ids are allowed and mean 0, as upstream."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if readable(x) and x.numel() and (largest := int(x.max())) >= vocab_size:
        raise ValueError(f"{name} holds id {largest}; allowed are ids below vocab_size {vocab_size}")


def check_lengths(name: str, x: Tensor, batch: int, width: int, what: str, fill: bool = True) -> None:
    """``[B]`` integers from 1 to ``width``; with ``fill`` the largest must be ``width``, as nothing trims the batch."""
    check_shape(name, x, (batch,))
    if x.is_floating_point() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {x.dtype}")
    if not readable(x):
        return
    if int(x.min()) < 1 or int(x.max()) > width:
        raise ValueError(f"{name} must lie in 1..{width}, the width of {what}; got {x.tolist()}")
    if fill and int(x.max()) != width:
        raise ValueError(f"the largest of {name} must be {width}, the width of {what}; got {x.tolist()}")


def check_floats(name: str, x: Tensor, like: Tensor) -> None:
    """Floating point of the module's dtype (any under autocast), and finite."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise TypeError(f"{name} is {x.dtype} but the module is {like.dtype}: convert one, or use autocast")
    if readable(x) and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} holds NaN or infinity; only finite values are allowed")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the module is on {device}")
