"""Where activations grow: which block would leave the range of float16 first."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.ops.half import HALF_MAX, computes_half
from fastflow.training.parts import parts, unwrapped


@dataclass(frozen=True)
class Activation:
    """Largest absolute values of one call of a block.

    Attributes:
        name: qualified name of the module.
        input, output: largest absolute value of its first floating-point input and of its output; NaN if they hold one,
            and if there is no such input.  Infinite from 65504 on where the flow computes in float16, whose results
            beyond become 65504 (:mod:`fastflow.ops.half`).
    """

    name: str
    input: float
    output: float


class OverflowMonitor:
    """Record the largest activation of every block while the ``with`` block runs.

    Forward hooks, in place only inside the ``with`` block: two reductions per module, and one read from the device when
    a figure is asked for.  In float32 it says how far the flow is from float16's 65504; in float16 or its autocast
    which block is the first whose output reaches it, and so is infinite here.  Modules whose arithmetic is part of a
    fused op have no output of their own and do not appear.  Padded frames count: they go through the same arithmetic.

    Example::

        with OverflowMonitor(flow) as overflow:
            flow(batch, device)
        print(overflow.table())

    Raises:
        TypeError: not a flow.
    """

    def __init__(self, flow: nn.Module) -> None:
        parts(flow)
        self._flow = unwrapped(flow)
        self._names: list[str] = []
        self._figures: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "OverflowMonitor":
        self._names, self._figures = [], []
        for name, module in self._flow.named_modules():
            if name and not isinstance(module, nn.Identity):
                self._handles.append(module.register_forward_hook(self._recorder(name), with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = _first_floats([*args, *kwargs.values()])
            made = _first_floats(output if isinstance(output, (tuple, list)) else [output])
            if made is not None:
                self._names.append(name)
                before = made.new_full((), math.nan, dtype=torch.float32) if given is None else _largest(given)
                figures = torch.stack([before, _largest(made)])
                self._figures.append(
                    figures.masked_fill(figures >= HALF_MAX, math.inf) if computes_half(made) else figures
                )

        return record

    @property
    def activations(self) -> list[Activation]:
        """One entry for each call, in the order in which the calls ended: an inner module before the one around it."""
        if not self._figures:
            return []
        rows = torch.stack(self._figures).tolist()
        return [Activation(name, *row) for name, row in zip(self._names, rows, strict=True)]

    def first_nonfinite(self) -> str | None:
        """The innermost module whose output was the first to hold NaN, infinity or, in float16, 65504; None if none."""
        for a in self.activations:
            if not math.isfinite(a.output):
                return a.name
        return None

    def largest(self) -> Activation:
        """The call with the largest finite output.

        Raises:
            ValueError: nothing was recorded.
        """
        finite = [a for a in self.activations if math.isfinite(a.output)]
        if not finite:
            raise ValueError("nothing finite was recorded: run the flow inside the `with` block first")
        return max(finite, key=lambda a: a.output)

    def grower(self) -> Activation:
        """The innermost module that raised the largest activation seen so far by the greatest factor.

        The first whose output is not finite, if there is one; :meth:`largest`, if none raised it.

        Raises:
            ValueError: nothing was recorded.
        """
        best, most, peak = None, 1.0, 0.0
        for a in self.activations:
            if not math.isfinite(a.output):
                return a
            if math.isnan(a.input):  # a table of vectors begins something, it does not make it grow
                peak = max(peak, a.output)
                continue
            before = max(peak, a.input)
            if before > 0 and a.output / before > most:
                best, most = a, a.output / before
            peak = max(before, a.output)
        return best or self.largest()

    def table(self, rows: int = 15) -> str:
        """The ``rows`` largest outputs, with their distance from float16's limit, as plain text."""
        shown = sorted(self.activations, key=lambda a: (math.isfinite(a.output), -a.output))[:rows]
        width = max([len(a.name) for a in shown], default=0)
        lines = [f"{'block':{width}}      input     output   of 65504"]
        lines += [f"{a.name:{width}} {a.input:10.3g} {a.output:10.3g} {a.output / HALF_MAX:10.2%}" for a in shown]
        first = self.first_nonfinite()
        lines.append(f"first not finite: {first}" if first else f"grows most in: {self.grower().name}")
        return "\n".join(lines)


def _first_floats(values: Any) -> Tensor | None:
    return next((x for x in values if isinstance(x, Tensor) and x.is_floating_point() and x.numel()), None)


def _largest(x: Tensor) -> Tensor:
    return x.detach().abs().amax().float()
