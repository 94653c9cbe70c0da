"""The loss by timestep, without touching the loss.

The gradient of the flow-matching loss with respect to the predicted velocity is proportional to the masked error,
``2 * s * (prediction - u) * mask / N`` with N valid numbers and a scale s (accumulation, loss scaling) that only the
caller knows.  So the squares of that gradient, which the backward pass has anyway, tell how the loss divides among the
rows; the loss itself settles the scale.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class TimestepLoss:
    """Sum, for each of ``buckets`` equal parts of 0 <= t <= 1, the losses of the rows that fell in.

    Forward hook on the estimator; no read from the device.

    Attributes:
        sums: ``[2 * buckets + 1]`` float32, losses in an unknown unit, numbers of rows, and the unit's inverse; None
            before the first backward pass.
        batches: backward passes in it.
    """

    def __init__(self, flow: nn.Module, buckets: int) -> None:
        self.buckets = buckets
        self.sums: Tensor | None = None
        self.batches = 0
        estimator: Any = flow.get_submodule("decoder.estimator")
        self._signature = inspect.signature(estimator.forward)
        self._handle = estimator.register_forward_hook(self._watch, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()

    def reset(self) -> None:
        self.sums, self.batches = None, 0

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], velocity: Tensor) -> None:
        if module.training and velocity.requires_grad:
            given = self._signature.bind(*args, **kwargs).arguments
            t, mask = given["t"].detach(), given["mask"].detach()
            velocity.register_hook(lambda grad: self._add(grad, t, mask))

    @torch.no_grad()
    def _add(self, grad: Tensor, t: Tensor, mask: Tensor) -> None:
        squares = grad.float().square().sum((1, 2))  # [B]
        valid = mask.float().sum((1, 2)) * grad.shape[1]
        total = valid.sum()
        losses = squares * total.square() / valid.clamp(min=1)
        bucket = (t.float().expand(len(squares)) * self.buckets).long().clamp(0, self.buckets - 1)
        sums = grad.new_zeros(2 * self.buckets + 1, dtype=torch.float32)
        sums.index_add_(0, bucket, losses)
        sums.index_add_(0, bucket + self.buckets, (valid > 0).float())
        sums[-1] = squares.sum() * total
        self.sums = sums if self.sums is None else self.sums + sums
        self.batches += 1

    def losses(self, sums: list[float], loss: float) -> list[float]:
        """Mean loss of the rows in each bucket from the values of :attr:`sums`; NaN for an empty bucket."""
        losses, rows, inverse = sums[: self.buckets], sums[self.buckets : -1], sums[-1]
        unit = loss * max(self.batches, 1) / inverse if inverse else float("nan")
        return [x * unit / n if n else float("nan") for x, n in zip(losses, rows, strict=True)]
