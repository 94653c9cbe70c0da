"""The memory modes of a flow: what a training step keeps for its backward pass, and what it computes again there.

* ``auto``, the default: ``none``, but where the input of attention has more than 2048 frames, all rows together, its q,
  k and v are computed again.  Of 8 x 1000 frames CosyVoice 1 keeps a third less, for one product more.  The same holds
  for what is cheap before the blocks: a DiT's input embedding, and the layer in which tokens look ahead.
* ``none``: the input of every product and the result of every product that something else needs.  Norms and activations
  are computed again, as the ops always do.
* ``selective``: the input of every sub-layer, attention's output and its softmax sums, and of at most 2048 frames what
  the gates of a DiT scale.  What one product restores is computed again: q, k and v, hidden layers, convolutions.
  Attention itself is not.
* ``block``: the input of every block, which is a conformer layer, a resnet block, a transformer block or a DiT block.
  The block is computed again.

The result is the same in every mode, dropout included, whose draws are replayed without disturbing those that follow.
The mode acts wherever gradients are recorded, in training and in eval mode, and costs nothing elsewhere.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastflow.ops.transformer_block import Part

Mode = Literal["auto", "none", "selective", "block"]
MODES: tuple[str, ...] = get_args(Mode)
LARGE = 2048  # frames of a part's input, beyond which ``auto`` keeps less


def check_mode(mode: str) -> None:
    """Raises ValueError: not one of :data:`MODES`."""
    if mode not in MODES:
        raise ValueError(f"recompute must be one of {', '.join(MODES)}; got {mode!r}")


class Recomputing(nn.Module):
    """A module with a memory mode; setting it sets that of every part too, and a part can be set by itself."""

    _recompute: Mode = "auto"

    @property
    def recompute(self) -> Mode:
        """The memory mode, ``"auto"``, ``"none"``, ``"selective"`` or ``"block"``: see :mod:`fastflow.recompute`."""
        return self._recompute

    @recompute.setter
    def recompute(self, mode: Mode) -> None:
        check_mode(mode)
        for part in self.modules():
            if isinstance(part, Recomputing):
                part._recompute = mode

    @property
    def keeps_products(self) -> bool:
        """Whether results that one product restores are kept."""
        return self._recompute != "selective"

    def keeps_heads(self, x: Tensor) -> bool:
        """Whether q, k and v of x ``[B, T, C]`` are kept."""
        return self.keeps_products and (self._recompute != "auto" or x.shape[0] * x.shape[1] <= LARGE)


def records(module: nn.Module, *tensors: Tensor | None) -> bool:
    """Whether autograd records what ``module`` does with ``tensors``."""
    return torch.is_grad_enabled() and (
        any(x is not None and x.requires_grad for x in tensors) or any(p.requires_grad for p in module.parameters())
    )


def replayed(function: Any, *args: Any, draws: bool) -> Any:
    """``function(*args)``, of which only ``args`` are kept; the backward pass calls it again.

    Args:
        draws: whether it draws from torch's generators, whose state is then put back for the second call and restored
            after it, without a host synchronisation.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws, determinism_check="none")


class Block(Recomputing):
    """A module of which the mode ``"block"`` keeps nothing but the inputs."""

    @property
    def draws(self) -> bool:
        """Whether a call draws from torch's generators: a dropout does."""
        return False

    def is_one_op(self, x: Tensor) -> bool:
        """Whether ``_compute`` is one op on x, :func:`transformer_block`, which restores by itself what is not kept."""
        return False

    def kept_parts(self, attention: Recomputing, feed_forward: Recomputing, x: Tensor) -> list[Part]:
        """What that op is to keep."""
        if self.recompute == "block":
            return []
        parts: dict[Part, bool] = {
            "inputs": True,
            "qkv": attention.keeps_heads(x),
            "hidden": feed_forward.keeps_products,
        }
        return [part for part, is_kept in parts.items() if is_kept]

    def _compute(self, x: Tensor, *args: Any) -> Tensor:
        raise NotImplementedError

    def is_replayed(self, x: Tensor) -> bool:
        """Whether the backward pass calls ``_compute`` on x again."""
        return self.recompute == "block" and not self.is_one_op(x)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.is_replayed(x) and records(self, *(arg for arg in (x, *args) if isinstance(arg, Tensor))):
            return replayed(self._compute, x, *args, draws=self.draws)
        return self._compute(x, *args)


class CheapBlock(Block):
    """A block that takes little of a step's time: computed again in the modes in which q, k and v are."""

    def is_replayed(self, x: Tensor) -> bool:
        return super().is_replayed(x) or not self.keeps_heads(x)
