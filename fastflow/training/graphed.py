"""A training step as one CUDA graph: the host queues one graph where it would queue thousands of kernels."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflow import graphs
from fastflow.backend import current_backend, no_autocast
from fastflow.flow import Batch, CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec, MaskedDiffWithXvec

Flow = MaskedDiffWithXvec | CausalMaskedDiffWithXvec | CausalMaskedDiffWithDiT
NAMES = ("speech_token", "speech_token_len", "speech_feat", "speech_feat_len", "embedding")


class GraphedStep:
    """``step(batch)`` for ``flow(batch, device)["loss"].backward()``, by a CUDA graph for each shape of a batch::

        step = GraphedStep(flow)
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = step(batch)
            optimizer.step()
            optimizer.zero_grad()

    The first step of a shape runs without a graph, the second one captures it, and later ones replay it; CosyVoice 2
    and 3 have two graphs, one of them with streaming masks.  So shapes must come back: batches of as many rows, with
    ``flow.padding = "exact"``, whose widths are then rounded up to those of a few graphs, or of equal widths.  On a CPU
    every step is computed as it comes.

    The gradients are added to those in ``.grad``, in memory that this object keeps.  A graph reads weights where they
    lie; moved ones, others that are frozen, another backend or precision, and ``train()``, ``eval()``,
    ``flow.recompute`` and ``flow.padding`` ask for another graph.  Other settings of the flow are those of the capture.

    Args:
        flow: of CosyVoice 1, 2 or 3, not wrapped, without hooks, such as those of a :class:`StabilityMonitor`, which a
            graph would not call.
        scaler: of the loss, for float16.
        capacity: graphs to keep; the one not used for longest goes first.

    Raises:
        TypeError: flow is none of these.
    """

    def __init__(
        self, flow: Flow, *, scaler: torch.amp.GradScaler | None = None, capacity: int = graphs.CAPACITY
    ) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a flow of fastflow's, not wrapped; got a {type(flow).__qualname__}")
        self._flow: Any = flow
        self._scaler = scaler
        self._cache = graphs.GraphCache(capacity=capacity, what="the training step")
        self._weights: object = None
        self._parameters: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def __call__(self, batch: Batch, weight: float = 1.0) -> Tensor:
        """Add the gradients of ``weight * loss`` to ``.grad``.

        Args:
            batch: as for the flow.
            weight: 1 / n where the gradients of n batches are added up.

        Returns:
            The loss, a scalar without history.

        Raises:
            ValueError: a tensor that does not fit, by name; the flow has a hook, or no parameter to train.
        """
        weights = self._attach()
        device = self._parameters[0].device
        inputs, choices = self._inputs(batch, device)
        inputs["weight"] = torch.full((), weight, device=device)
        compute = functools.partial(self._compute, **choices)
        if not graphs.possible(self._parameters[0]):
            return compute(**inputs)
        flow = self._flow
        settings = flow.training, flow.recompute, flow.padding, current_backend(), *graphs.precision_key()
        return self._cache.run((tuple(choices.items()), settings), weights, compute, inputs)

    def _attach(self) -> object:
        """Make our memory that of ``.grad``; where the weights lie and which of them are trained."""
        if any(
            part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
            for part in self._flow.modules()
        ):
            raise ValueError("flow has a hook, which a graph would not call: remove it, or do without GraphedStep")
        trained = tuple(parameter.requires_grad for parameter in self._flow.parameters())
        weights = graphs.weights_key(self._flow), trained
        if weights != self._weights:
            self._parameters = [parameter for parameter in self._flow.parameters() if parameter.requires_grad]
            if not self._parameters:
                raise ValueError("flow has no parameter that requires a gradient")
            self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
            self._weights = weights
        pairs = zip(self._parameters, self._gradients, strict=True)
        foreign = [(parameter, ours) for parameter, ours in pairs if parameter.grad is not ours]
        if cleared := [ours for parameter, ours in foreign if parameter.grad is None]:
            torch._foreach_zero_(cleared)  # at once, as there are a thousand
        for parameter, ours in foreign:
            if parameter.grad is not None:
                ours.copy_(parameter.grad)
            parameter.grad = ours
        return weights

    def _inputs(self, batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a step on the device, and the choices by which it is another graph."""
        flow = self._flow
        ready = flow.prepared(batch, device)
        choices = flow.draw_streaming()
        if flow.randomness == "upstream":  # from Python's generator, which a graph does not call
            ready["prefix"] = flow.draw_prefixes(ready["speech_feat_len"])
        if flow.exact:  # padding then changes nothing
            tokens, frames = ready["speech_token"].shape[1], ready["speech_feat"].shape[1]
            more = graphs.bucket(tokens) - tokens
            ready["speech_token"] = F.pad(ready["speech_token"], (0, more))
            ratio = getattr(flow, "token_mel_ratio", None)
            more = graphs.bucket(frames) - frames if ratio is None else ratio * more
            ready["speech_feat"] = F.pad(ready["speech_feat"], (0, 0, 0, more))
        names = [name for name in (*NAMES, "prefix") if name in ready]
        return {name: ready[name].to(device, non_blocking=True) for name in names}, choices

    def _compute(self, weight: Tensor, prefix: Tensor | None = None, **batch_and_choices: Any) -> Tensor:
        batch = {name: batch_and_choices.pop(name) for name in NAMES}
        loss = self._flow.prepared_loss(batch, weight.device, None, prefix, **batch_and_choices)
        with no_autocast(loss):
            weighted = weight * loss
            if self._scaler is not None:
                weighted = self._scaler.scale(weighted)
            found = torch.autograd.grad(weighted, self._parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_add_(self._gradients, found)
        return loss.detach()
