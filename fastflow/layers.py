"""What the encoders and estimators share."""

import torch.nn as nn
from torch import Tensor

from fastflow.ops.projection import projection


def active(dropout: nn.Module) -> bool:
    """Whether a dropout drops anything."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def project_residual(x: Tensor, y: Tensor, linear: nn.Linear, dropout: nn.Module, gate: Tensor | None = None) -> Tensor:
    """``x + gate * dropout(linear(y))``, with a gate ``[B, C]`` or without."""
    if not active(dropout):
        return projection(y, [linear.weight], [linear.bias], residual=x, gate=gate)
    y = dropout(linear(y))
    return x + (y if gate is None else gate[:, None] * y)
