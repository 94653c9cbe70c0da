"""What a case runs: one op, a training step or a synthesis, the same for every provider.

A job turns the name of a provider into a *step*: a callable without arguments that computes forward, and backward where
there is one, and returns every output and gradient by name.  The same step is checked, counted and timed.
"""

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import upstream
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastflow import backend, config, recompute, use_backend
from fastflow.testing.tolerances import assert_parity, golden_error, golden_limit
from fastflow.training import GraphedStep

Results = dict[str, Tensor]
Step = Callable[[], Results]

OURS = ("auto", "cpu", "cuda", "triton")
MEMORY_MODES = tuple(mode for mode in recompute.MODES if mode != "auto")  # each is "auto" but for flow.recompute
PROVIDERS = ("reference", "compile", *OURS, "graphed", *MEMORY_MODES, "cosyvoice")


class UnavailableError(Exception):
    """This provider cannot run here; the message says why."""


def seed(number: int) -> None:
    """Seed the generators that a flow draws from: Python's and torch's."""
    random.seed(number)
    torch.manual_seed(number)


def _require_backend(provider: str, device: torch.device) -> None:
    if provider == "auto":
        return
    every = dict.fromkeys(backend.BACKENDS, backend.FLOATS)
    try:
        backend.CAN_RUN[provider]("benchmark", torch.empty(0, device=device), every, raise_error=True)
    except RuntimeError as error:
        raise UnavailableError(str(error).removeprefix("benchmark: ")) from error


class OpJob:
    """Forward and backward of one op.

    Args:
        op: the public function, with ``backend=``.
        reference: its plain counterpart.
        tensors: floating point arguments, on the device to use; each gets a gradient.
        options: the other arguments.
        sums: lengths of the sums that the op forms, for the rounding band.
    """

    gate_seeds = (0,)
    without_dropout = contextlib.nullcontext

    def __init__(
        self,
        op: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        tensors: Mapping[str, Tensor],
        options: Mapping[str, Any],
        sums: tuple[int, ...],
    ) -> None:
        self.op = op
        self.reference = reference
        self.tensors = {name: x.requires_grad_() for name, x in tensors.items()}
        self.options = options
        self.sums = sums
        out = reference(**self.tensors, **options)
        self.cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)

    @property
    def given(self) -> list[Tensor]:
        """Tensors that exist anyway, so that saving them costs nothing."""
        return [*self.tensors.values(), self.cotangent]

    def _step(self, function: Callable[..., Tensor], tensors: Mapping[str, Tensor], cotangent: Tensor) -> Results:
        out = function(**tensors, **self.options)
        gradients = torch.autograd.grad(out, list(tensors.values()), cotangent)
        return {"out": out, **{f"grad {name}": g for name, g in zip(tensors, gradients, strict=True)}}

    def step(self, provider: str) -> Step:
        """The step of a provider.

        Raises:
            UnavailableError: with the reason.
        """
        if provider == "cosyvoice":
            raise UnavailableError("upstream has no such op; the reference does what its module does")
        if provider in MEMORY_MODES:
            raise UnavailableError("a memory mode is one of a flow's training step; an op has none")
        if provider == "graphed":
            raise UnavailableError("a CUDA graph is one of a flow's training step; an op has none")
        if provider in OURS:
            _require_backend(provider, self.cotangent.device)
            function: Callable[..., Tensor] = functools.partial(self.op, backend=provider)
        else:
            function = torch.compile(self.reference) if provider == "compile" else self.reference
        return functools.partial(self._step, function, self.tensors, self.cotangent)

    def truth(self) -> Step:
        """The reference in float64, from the same values."""
        tensors = {name: x.detach().double().requires_grad_() for name, x in self.tensors.items()}
        return functools.partial(self._step, self.reference, tensors, self.cotangent.double())

    def check(self, got: Results, eager: Results, truth: Results) -> None:
        """Assert the op-parity rule of fastflow.testing for the output and every gradient."""
        assert_parity(got, eager, truth, sums=self.sums)


class _DrawsInFloat32(TorchFunctionMode):
    """Random numbers of a float64 run are those of a float32 run, which would otherwise be others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.randn_like:
            return func(*args, **{**kwargs, "dtype": torch.float32}).to(args[0].dtype)
        if func is torch.rand:
            dtype = kwargs.pop("dtype", None) or torch.float32
            return func(*args, **kwargs, dtype=torch.float32).to(dtype)
        return func(*args, **kwargs)


class FlowJob:
    """A whole flow: a training step (loss and all gradients), or the synthesis of one utterance.

    The weights are freshly initialised, the same for every provider.  The check runs in eval mode, because dropout is
    random; a training step is counted and timed in train mode.

    Args:
        spec: as :func:`fastflow.config.preset` gives it.
        inputs: the batch of a training step, or the arguments of ``inference``, on the device to use.
        train: which of the two.
    """

    def __init__(self, spec: config.Spec, inputs: Mapping[str, Any], train: bool, device: torch.device) -> None:
        self.spec, self.inputs, self.train, self.device = spec, inputs, train, device
        seed(0)
        self.flow = config.build(spec).to(device).train(train)
        self.modules = [self.flow]
        # CosyVoice 2 and 3 train with full attention or in streaming mode; the first draw of these seeds has one each.
        self.gate_seeds = (0, 1) if train and "token_mel_ratio" in spec else (0,)

    @property
    def given(self) -> list[Tensor]:
        """Tensors that exist anyway, so that saving them costs nothing."""
        return [parameter for module in self.modules for parameter in module.parameters()]

    def _module(self, provider: str) -> nn.Module:
        if provider == "cosyvoice":
            if reason := upstream.missing():
                raise UnavailableError(reason)
            encoder = self.spec.get("encoder", {})
            if encoder.get("class") == "UpsampleConformerEncoder" and encoder["output_size"] != 512:
                raise UnavailableError("upstream's encoder of CosyVoice 2 exists in width 512 only")
            theirs = upstream.build(self.spec)
            theirs.load_state_dict(self.flow.state_dict())
            return theirs.to(self.device).train(self.train)
        if provider in MEMORY_MODES:
            return self._in_mode(provider)
        if provider in OURS:
            _require_backend(provider, self.device)
        if provider != "compile":
            return self.flow
        flow: Any = copy.deepcopy(self.flow)
        flow.decoder.estimator.compile()
        for name in ("encoder", "length_regulator", "pre_lookahead_layer"):
            if hasattr(flow, name):
                getattr(flow, name).compile()
        return flow

    def _in_mode(self, mode: str) -> nn.Module:
        if not self.train:
            raise UnavailableError("a memory mode is one of a training step; synthesis keeps nothing for backward")
        flow = self._with_the_same_weights()
        flow.recompute = mode
        return flow

    def _with_the_same_weights(self) -> Any:
        """A copy of the flow, but for the weights, which are up to 1.3 GB."""
        return copy.deepcopy(self.flow, {id(parameter): parameter for parameter in self.flow.parameters()})

    def _graphed(self) -> Step:
        if not self.train:
            raise UnavailableError("GraphedStep is for training; auto's synthesis uses CUDA graphs by itself")
        if self.device.type != "cuda":
            raise UnavailableError("CUDA graphs need a GPU")
        flow = self._with_the_same_weights()
        self.modules.append(flow)
        graphed = GraphedStep(flow)

        def step() -> Results:
            flow.zero_grad()
            with use_backend("auto"):
                loss = graphed(self.inputs)
            return {"loss": loss, **{f"grad {name}": p.grad for name, p in flow.named_parameters()}}

        return step

    def _step(self, flow: Any, provider: str, inputs: Mapping[str, Any]) -> Results:
        ours = "auto" if provider in MEMORY_MODES else provider
        with use_backend(ours if ours in OURS else "reference"):
            if not self.train:
                return {"mel": flow.inference(**inputs)[0]}
            loss = flow(inputs, self.device)["loss"]
            parameters = dict(flow.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return {"loss": loss, **{f"grad {name}": g for name, g in zip(parameters, gradients, strict=True)}}

    def step(self, provider: str) -> Step:
        """The step of a provider.

        Raises:
            UnavailableError: with the reason.
        """
        if provider == "graphed":
            return self._graphed()
        flow = self._module(provider)
        self.modules.append(flow)
        return functools.partial(self._step, flow, provider, self.inputs)

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Put every module of this job into eval mode."""
        for module in self.modules:
            module.eval()
        try:
            yield
        finally:
            for module in self.modules:
                module.train(self.train)

    def truth(self) -> Step:
        """The reference in float64, from the same weights, inputs and random numbers."""
        flow = copy.deepcopy(self.flow).double().eval()
        inputs = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in self.inputs.items()
        }

        def step() -> Results:
            with _DrawsInFloat32():
                return self._step(flow, "reference", inputs)

        return step

    def check(self, got: Results, eager: Results, truth: Results) -> None:
        """Assert the golden rule of fastflow.testing against the float64 run for the output and every gradient."""
        for name in truth:
            noise = golden_error(eager[name], truth[name])
            limit = golden_limit(torch.float32, noise, gradient=name.startswith("grad"))
            error = golden_error(got[name], truth[name])
            assert error <= limit, f"{name}: error {error:.3g} of the largest value, allowed {limit:.3g}"
