"""CUDA graphs of whole solves: the host queues one graph where it would queue thousands of kernels.

A graph has fixed lengths, so a solve is padded to the next of a few (:func:`bucket`); the mask hides the tail, and the
numbers are the same.  Where padding would change them, in the U-Net of CosyVoice 1, whose GroupNorm counts it, a graph
serves its exact length alone: that helps a stream, whose chunks are of equal length.

The first solve of its kind runs without a graph, which also warms everything up; the second one captures, and from then
on the graph is replayed.  The last few are kept.  They share the memory of their intermediate results, as they run one
after the other and each result is copied before the next one runs.

A graph reads the weights where they lie, so it sees an optimizer's step and ``load_state_dict``.  Weights that lie
elsewhere (``.to()``, ``.half()``, other Parameter objects) or another backend, dtype, method or rate ask for another.

Under autocast a graph casts the weights at every use, since it cannot share autocast's cache of them.
"""

import functools
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastflow.backend import current_backend

ENABLED = os.environ.get("FASTFLOW_CUDA_GRAPHS", "1") != "0"
CAPACITY = 8  # graphs of a module
REMEMBERED = 64  # kinds of solves of which it is known that there has been one
SMALLEST = 32  # frames

_capturing = threading.Lock()  # PyTorch allows one capture at a time

Solve = Callable[..., Tensor]  # tensors by name -> [B, C, T]


class Graph(NamedTuple):
    """A captured solve or training step: write ``inputs``, replay, read ``output``."""

    inputs: dict[str, Tensor]
    output: Tensor
    replay: Callable[[], None]
    pool: Any = None  # where its memory comes from


def bucket(frames: int) -> int:
    """The length to which ``frames`` are padded: at most 1/8 more, or the next multiple of 32."""
    step = max(SMALLEST, 2 ** (frames.bit_length() - 1) // 8)
    return -(-frames // step) * step


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers; ``nn.Module.parameters`` takes ten times as long."""
    modules = [module]
    while modules:
        inner = modules.pop()
        modules.extend(child for child in inner._modules.values() if child is not None)
        yield from (x for x in chain(inner._parameters.values(), inner._buffers.values()) if x is not None)


def weights_key(module: nn.Module) -> Hashable:
    """Where the weights lie, and as what."""
    return tuple((x.data_ptr(), x.dtype) for x in _tensors(module))


def _autocast_key() -> Hashable:
    on = torch.is_autocast_enabled("cuda")
    return on, torch.get_autocast_dtype("cuda") if on else None


def precision_key() -> tuple[Hashable, ...]:
    """How a product is computed, beside the dtypes of what it multiplies."""
    return _autocast_key(), torch.get_float32_matmul_precision()


def _capture(solve: Solve, inputs: dict[str, Tensor], pool: Any) -> Graph:
    """Record ``solve`` on a stream of its own, with memory from the pool of another graph, or from a new one."""
    device = next(iter(inputs.values())).device
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # A graph must not keep what it finds in autocast's cache of weights, which lives shorter.
    autocast, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with (
        _capturing,
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),  # comes back even where the capture fails
        torch.autocast("cuda", dtype=dtype, enabled=autocast, cache_enabled=False),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        output = solve(**inputs)
    return Graph(inputs, output, graph.replay, graph.pool())


class GraphCache:
    """The graphs of one module.  A lock orders the host's work, and an event that of the device's streams.

    Args:
        capture: makes a graph of a solve and its inputs, which stay where they are, in the memory of a pool.
        capacity: graphs to keep; the one not used for longest goes first.
        what: is captured, for the warning where that fails.
    """

    def __init__(
        self,
        capture: Callable[[Solve, dict[str, Tensor], Any], Graph] = _capture,
        capacity: int = CAPACITY,
        what: str = "the solver",
    ):
        self._capture, self._capacity, self._what = capture, capacity, what
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()  # None: the capture failed
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._weights: Hashable = None
        self._replayed: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, weights: Hashable, solve: Solve, inputs: dict[str, Tensor]) -> Tensor:
        """``solve(**inputs)``, by a graph if there is one or is to be one.

        Args:
            key: what a graph depends on besides the shapes, dtypes and device of ``inputs``.
            weights: where the weights lie; graphs of others are dropped.
        """
        key = key, tuple((name, x.shape, x.dtype, x.device) for name, x in inputs.items())
        with self._lock:
            if weights != self._weights:
                self._drop(self._graphs)
                self._seen.clear()
                self._weights = weights
            graph = self._find(key, solve, inputs)
            if graph is not None:
                return self._replay(graph, inputs)
        return solve(**inputs)

    def _find(self, key: Hashable, solve: Solve, inputs: dict[str, Tensor]) -> Graph | None:
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            return None
        if len(self._graphs) >= self._capacity:
            self._drop([next(iter(self._graphs))])
        pool = next((graph.pool for graph in self._graphs.values() if graph is not None), None)
        try:
            self._graphs[key] = self._capture(solve, {name: x.clone() for name, x in inputs.items()}, pool)
        except Exception as error:
            warnings.warn(f"no CUDA graph of {self._what}, which runs without: {error}", RuntimeWarning, stacklevel=2)
            self._graphs[key] = None
        return self._graphs[key]

    def _drop(self, keys: Any) -> None:
        if self._replayed is not None:
            self._replayed.synchronize()  # a graph that still runs needs its memory
        for key in list(keys):
            del self._graphs[key]

    def _replay(self, graph: Graph, inputs: dict[str, Tensor]) -> Tensor:
        stream = torch.cuda.current_stream(graph.output.device) if graph.output.is_cuda else None
        if stream is not None and self._replayed is not None:
            self._replayed.wait(stream)  # another stream may still replay, or read the output
        for name, x in inputs.items():
            graph.inputs[name].copy_(x)
        graph.replay()
        output = graph.output.clone()
        if stream is not None:
            self._replayed = torch.cuda.Event()
            self._replayed.record(stream)
        return output


_caches: "weakref.WeakKeyDictionary[nn.Module, GraphCache]" = weakref.WeakKeyDictionary()  # so a module stays copyable
_caches_lock = threading.Lock()


def cache_of(module: nn.Module) -> GraphCache:
    with _caches_lock:
        return _caches.setdefault(module, GraphCache())


def possible(x: Tensor) -> bool:
    """Whether what is computed of ``x`` may be a graph: on a GPU, unless something looks at single operations, such as
    torch.compile, a capture around this one, or a dispatch mode."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and not is_in_torch_dispatch_mode()
    )


def wanted(estimator: Any, x: Tensor) -> bool:
    """Whether a solve on ``x`` may use a graph: if one is possible, by fastflow's estimators, outside of training."""
    return hasattr(estimator, "ignores_padding") and not estimator.training and possible(x)


def run(
    cache: GraphCache, estimator: Any, solve: Solve, inputs: dict[str, Tensor | None], options: dict[str, Hashable]
) -> Tensor:
    """``solve(**inputs, **options)`` through the graphs of ``cache``.

    Args:
        estimator: its weights are read, and where ``ignores_padding`` is true, the length may be padded.
        inputs: tensors whose last dimension, where they have three, is that of frames; None is left out.

    Returns:
        ``[B, C, T]``.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    frames = next(x.shape[2] for x in given.values() if x.dim() == 3)
    if estimator.ignores_padding:
        extra = bucket(frames) - frames
        given = {name: F.pad(x, (0, extra)) if x.dim() == 3 else x for name, x in given.items()}
    key = (
        tuple(options.items()),
        current_backend(),
        *precision_key(),
        estimator.static_chunk_size,
        estimator.padding,
    )
    output = cache.run(key, weights_key(estimator), functools.partial(solve, **options), given)
    return output[:, :, :frames]
