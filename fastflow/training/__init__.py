"""What a training run needs around the flow: diagnosis, parameter groups, monitoring, batches, checkpoints.

The flow itself trains like any module; nothing here is needed for that.

A moving average of the weights needs nothing of ours either; it synthesises, saves and loads as the flow does::

    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    ...
    average.update_parameters(flow)  # after each step
    torch.save(average.module.state_dict(), "flow.pt")
"""

from fastflow.training.gradients import Gradient, GradientFlow, gradient_flow
from fastflow.training.graphed import GraphedStep
from fastflow.training.groups import freeze, parameter_groups, unfreeze
from fastflow.training.memory import keep_freed_memory
from fastflow.training.monitor import NonFiniteError, StabilityMonitor, StepRecord
from fastflow.training.overflow import Activation, OverflowMonitor
from fastflow.training.spikes import SpikeDetector

__all__ = [
    "Activation",
    "Gradient",
    "GradientFlow",
    "GraphedStep",
    "NonFiniteError",
    "OverflowMonitor",
    "SpikeDetector",
    "StabilityMonitor",
    "StepRecord",
    "freeze",
    "gradient_flow",
    "keep_freed_memory",
    "parameter_groups",
    "unfreeze",
]
