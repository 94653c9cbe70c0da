"""The largest attention logit of every attention module, from a small sample of frames.

Logits that grow without limit make the softmax a hard choice with vanishing gradient: an early sign of an unstable
run (Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023, section 3.1).
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

SAMPLE = 64  # frames


def attention_modules(flow: nn.Module) -> dict[str, nn.Module]:
    """fastflow's attention modules of the encoder (``linear_q``) and of the estimator (``to_q``), by qualified name."""

    def known(module: nn.Module) -> bool:
        projects = hasattr(module, "linear_q") or hasattr(module, "to_q")
        return projects and {"x", "norm", "lengths"} <= inspect.signature(module.forward).parameters.keys()

    return {name: module for name, module in flow.named_modules() if known(module)}


class AttentionLogits:
    """Collect, while it is active, the largest logit of each attention module as 0-dimensional tensors.

    Recomputed in plain PyTorch from the module's own input for up to 64 frames of the first row, evenly spread: q of
    all of them against k of all of them.  So it is a lower bound of the true maximum, without the relative-position
    term of the encoder and the rotation of head 0 in the DiT.  No read from the device.

    Attributes:
        largest: by module name, of the latest forward pass.
    """

    def __init__(self, flow: nn.Module) -> None:
        self.largest: dict[str, Tensor] = {}
        self._modules = attention_modules(flow)
        self._handles: list[RemovableHandle] = []

    @property
    def active(self) -> bool:
        return bool(self._handles)

    @active.setter
    def active(self, active: bool) -> None:
        # no hooks while it rests: a transformer block that is listened to is not computed as one op
        if active and not self._handles:
            self._handles = [
                module.register_forward_pre_hook(self._recorder(name), with_kwargs=True)
                for name, module in self._modules.items()
            ]
        elif not active:
            self.remove()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            with torch.no_grad():
                self.largest[name] = _largest_logit(module, given["x"], given["norm"], given["lengths"])

        return record


def _largest_logit(module: Any, x: Tensor, norm: Any, lengths: Tensor) -> Tensor:
    step = -(-x.shape[1] // SAMPLE)
    x = x[:1, ::step]
    if norm is not None:
        scale, shift, eps = norm
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
        # a modulation has one entry for each row
        x = x if scale is None else x * (scale[:1, None] if scale.dim() == 2 else scale)
        x = x if shift is None else x + (shift[:1, None] if shift.dim() == 2 else shift)
    conformer = hasattr(module, "linear_q")
    q, k = (module.linear_q(x), module.linear_k(x)) if conformer else (module.to_q(x), module.to_k(x))
    heads = module.h if conformer else module.heads
    q, k = (y.float().unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k))
    if conformer:
        q = q + module.pos_bias_u.float()[:, None]
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    # padded frames hold arbitrary values
    valid = torch.arange(0, step * x.shape[1], step, device=x.device) < lengths[0]
    return logits.masked_fill(~(valid & valid[:, None]), float("-inf")).amax()
