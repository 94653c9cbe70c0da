"""A function of tensors that is called again and again, in Python once: what CUDA graphs are on a GPU, for a CPU.

The solver calls the estimator with the same weights, lengths and shapes in every step.  The first call runs through the
modules as always while every op that it dispatches is recorded; from the second call on these ops alone are called, in
the same order and with the same arguments but for the tensors that depend on the inputs.  The numbers are the same.

A recording lives as long as a solve, so nothing can change under it: weights that an optimizer or ``load_state_dict``
changes are seen by the next.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

Function = Callable[..., Tensor]


class _Slot(int):
    """In the place of a tensor that depends on the inputs: its number."""


class _Call(NamedTuple):
    op: Any
    args: Sequence[Any]  # with None where ``slots`` tells more
    kwargs: dict[str, Any]
    slots: Sequence[tuple[int, Any]]  # of args: the place, and a slot or a list or tuple with slots
    results: Sequence[int | None]  # the slot of each result that is used again
    is_tuple: bool
    last_uses: Sequence[int]


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for part in x for t in _tensors(part)] if isinstance(x, (list, tuple)) else []


def _slots(template: Any) -> list[int]:
    if isinstance(template, _Slot):
        return [template]
    return [n for part in template for n in _slots(part)] if isinstance(template, (list, tuple)) else []


def _filled(template: Any, values: Sequence[Tensor | None]) -> Any:
    if isinstance(template, _Slot):
        return values[template]
    return (
        type(template)(_filled(part, values) for part in template) if isinstance(template, (list, tuple)) else template
    )


class _Recorder(TorchDispatchMode):
    """Runs every op, and writes it down.

    Attributes:
        calls: the ops so far, ``last_uses`` still empty.
        count: of slots; the inputs have the first.
        follows: whether the calls give what the function would, also from other values in the inputs.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._numbers = WeakIdKeyDictionary()  # those that are alive: a recording keeps no result
        self.calls: list[_Call] = []
        self.count = 0
        self.follows = len({id(x) for x in inputs}) == len(inputs)  # else it is not known which of two a call reads
        for x in inputs:
            self._number(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name() == "fastflow::pack_weights":  # of which a cache keeps the result
            return func(*args, **kwargs)
        templates = [self.template(x) for x in args]
        given = _tensors([*args, *kwargs.values()])
        out = func(*args, **kwargs)
        is_tuple = isinstance(out, (list, tuple))
        found = list(out) if is_tuple else [out]
        slots = [(i, template) for i, template in enumerate(templates) if _slots(template)]
        if all(x is None or isinstance(x, Tensor) for x in found) and not _slots(
            [*map(self.template, kwargs.values())]
        ):
            results = [self._result(x, given) for x in found]
            fixed = [None if _slots(template) else x for template, x in zip(templates, args, strict=True)]
            self.calls.append(_Call(func, fixed, kwargs, slots, results, is_tuple, ()))
        elif slots or not isinstance(out, (bool, int, float)):  # a number read from what never changes is no op
            self.follows = False
        return out

    def template(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._numbers.get(x, x)
        return type(x)(self.template(part) for part in x) if type(x) in (list, tuple) else x

    def _number(self, x: Tensor) -> int:
        self._numbers[x] = slot = _Slot(self.count)
        self.count += 1
        return slot

    def _result(self, x: Tensor | None, given: Sequence[Tensor]) -> int | None:
        """None for an argument that an op changed and gives back, as it has its slot, or is the same in every call."""
        return None if x is None or any(x is y for y in given) else self._number(x)


def _layout(inputs: Sequence[Tensor]) -> list[Any]:
    return [(x.shape, x.stride(), x.dtype) for x in inputs]


class _Recording:
    """The ops that a recorder saw in a call of a function with ``inputs`` and ``result``."""

    def __init__(self, recorder: _Recorder, inputs: Sequence[Tensor], result: Tensor) -> None:
        self.follows = recorder.follows
        self._layout, self._count = _layout(inputs), recorder.count
        self._result = recorder.template(result)
        self._calls: list[_Call] = []
        used = set(_slots(self._result))
        for call in reversed(recorder.calls):
            slots = {*_slots([template for _, template in call.slots]), *(n for n in call.results if n is not None)}
            self._calls.append(call._replace(last_uses=tuple(slots - used)))
            used |= slots
        self._calls.reverse()

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        return _layout(inputs) == self._layout

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        values: list[Tensor | None] = [*inputs, *[None] * (self._count - len(inputs))]
        for op, args, kwargs, slots, results, is_tuple, last_uses in self._calls:
            given = list(args)
            for i, template in slots:
                given[i] = values[template] if type(template) is _Slot else _filled(template, values)
            out = op(*given, **kwargs)
            for slot, x in zip(results, out if is_tuple else (out,), strict=True):
                if slot is not None:
                    values[slot] = x
            for slot in last_uses:
                values[slot] = None
            del given, out
        return _filled(self._result, values)


def replayed(function: Function) -> Function:
    """The function, of any number of tensors, which is called once; then its ops are.

    They depend on nothing but tensors and the shapes, strides and dtypes of the inputs.  It is called again for inputs
    of other ones, and where it reads a number from a tensor that depends on the inputs.
    """
    recording: _Recording | None = None

    @functools.wraps(function)
    def run(*inputs: Tensor) -> Tensor:
        nonlocal recording
        if recording is None:
            with _Recorder(inputs) as recorder:
                result = function(*inputs)
            recording = _Recording(recorder, inputs, result)
            return result
        return recording(inputs) if recording.follows and recording.fits(inputs) else function(*inputs)

    return run


def _is_plain(module: nn.Module) -> bool:
    """Whether a call does what fastflow's or torch's class does, and nobody listens to it."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    known = type(module).__module__.partition(".")[0] in ("fastflow", "torch")
    return known and not hooks and "forward" not in vars(module)


def may_replay(module: nn.Module, x: Tensor) -> bool:
    """Whether a call of ``module`` on x may be :func:`replayed`: what it calls are classes of which that is known."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _has_any_global_hook()
        and not module.training
        and all(map(_is_plain, module.modules()))
    )
