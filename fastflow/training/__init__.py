"""What a training run needs around the flow: diagnosis, parameter groups, monitoring, batches, checkpoints.

The flow itself trains like any module; nothing here is needed for that.
"""

from fastflow.training.gradients import Gradient, GradientFlow, gradient_flow
from fastflow.training.groups import freeze, parameter_groups, unfreeze
from fastflow.training.monitor import NonFiniteError, StabilityMonitor, StepRecord
from fastflow.training.overflow import Activation, OverflowMonitor
from fastflow.training.spikes import SpikeDetector

__all__ = [
    "Activation",
    "Gradient",
    "GradientFlow",
    "NonFiniteError",
    "OverflowMonitor",
    "SpikeDetector",
    "StabilityMonitor",
    "StepRecord",
    "freeze",
    "gradient_flow",
    "parameter_groups",
    "unfreeze",
]
