"""Costs that a noisy machine cannot blur: compute ops, host synchronisations, FLOPs, bytes saved for backward.

Used by tests (a promise such as "no host sync in the solver"), by benchmarks and by ``fastflow report``.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fastflow.ops  # noqa: F401  (defines the ops counted below)

# They touch no tensor data: allocation, and aliases that the dispatcher does not list as views.
_NO_COMPUTE = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::_unsafe_view",
        "aten::empty",
        "aten::empty_like",
        "aten::empty_permuted",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::resize_",
        "aten::set_",
        "prim::device",
        "profiler::_record_function_enter_new",
        "profiler::_record_function_exit",
    }
)
# Their result, or its shape, is needed on the host: on CUDA the host waits for the device.
_SYNCS = frozenset(
    {
        "aten::_local_scalar_dense",  # item(), int(), float(), bool(), is_nonzero()
        "aten::equal",
        "aten::masked_select",
        "aten::nonzero",
        "aten::_unique2",
        "aten::unique_consecutive",
        "aten::unique_dim",
    }
)
_HOST_METHODS = {Tensor.tolist: "Tensor.tolist", Tensor.numpy: "Tensor.numpy", Tensor.__array__: "Tensor.__array__"}


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _attention_backward_flops(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _self_attention_flops(
    qkv: Tensor,
    lengths: Tensor | None,
    sizes: list[int] | None,
    *_: Any,
    count: Callable[..., int] = sdpa_flop_count,
    tensors: int = 3,
    **__: Any,
) -> int:
    batch, frames, _three, heads, width = qkv.shape
    rows = [frames] * batch if sizes is None else sizes
    return sum(count(*[(1, heads, n, width)] * tensors) for n in rows)


def _transformer_block_flops(
    x: Tensor, weights: list[Tensor], biases: Any, norms: Any, eps_1: float, eps_2: float, gates: Any, heads: int,
    activation: int, lengths: Tensor | None, sizes: list[int] | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    batch, frames, _channels = x.shape
    inner, rows = weights[0].shape[0], [frames] * batch if sizes is None else sizes
    attention = sum(sdpa_flop_count(*[(1, heads, n, inner // heads)] * 3) for n in rows)
    return attention + 2 * batch * frames * sum(weight.numel() for weight in weights)


def _transformer_block_backward_flops(
    grad: Tensor, x: Tensor, kept: list[Tensor], weights: list[Tensor], biases: Any, norms: Any, eps_1: float,
    eps_2: float, gates: Any, heads: int, activation: int, lengths: Tensor | None, sizes: list[int] | None, *rest: Any,
    **__: Any,
) -> int:  # fmt: skip
    """Every product once for its input and, if wanted, once for its weights; and what was not kept."""
    batch, frames, _channels = x.shape
    inner, rows, wanted = weights[0].shape[0], [frames] * batch if sizes is None else sizes, rest[-1]
    shapes = [[(1, heads, n, inner // heads)] * 3 for n in rows]
    attention = sum(sdpa_backward_flop_count(shape[0], *shape) for shape in shapes)
    qkv, out, first, second = sum(w.numel() for w in weights[:3]), *(w.numel() for w in weights[3:])
    products = sum(n * (1 + (wanted >> bit & 1)) for bit, n in enumerate((qkv, out, first, second)))
    if not kept:
        attention += sum(sdpa_flop_count(*shape) for shape in shapes)
        products += out
    products += qkv * (not kept or not kept[1].numel()) + first * (not kept or not kept[6].numel())
    return attention + 2 * batch * frames * products


def _self_attention_backward_flops(grad: Tensor, out: Tensor, lse: Tensor, *args: Any, **__: Any) -> int:
    return _self_attention_flops(*args, count=sdpa_backward_flop_count, tensors=4)


def _distance_flops(q: Tensor, position: Tensor) -> int:
    """The product of the queries with every distance, as the reference forms it."""
    return 2 * q.numel() * position.shape[1]


def _relative_attention_flops(q: Tensor, k: Tensor, v: Tensor, position: Tensor, *_: Any, **__: Any) -> int:
    return _attention_flops(q, k, v) + _distance_flops(q, position)


def _relative_attention_backward_flops(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor, *_: Any, **__: Any
) -> int:
    """The scores by distance are formed again, and give two gradients."""
    return _attention_backward_flops(grad, out, lse, q, k, v) + 3 * _distance_flops(q, position)


def _projection_flops(x: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    return 2 * x.numel() * sum(weight.shape[0] for weight in weights)


def _feed_forward_flops(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[:2].numel() * (w1.numel() + w2.numel())


def _conv_block_flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[:2].numel() * weight.numel()


def _projection_backward_flops(grad: Tensor, scaled: Tensor, x: Tensor, *rest: Any, **__: Any) -> int:
    *_, normalises, _, wants_x, wants_weights, _ = rest
    return 2 * grad.shape[:2].numel() * grad.shape[2] * x.shape[2] * ((wants_x or normalises) + wants_weights)


def _feed_forward_backward_flops(grad: Tensor, scaled: Tensor, x: Tensor, *rest: Any, **__: Any) -> int:
    (_, _, w1, w2), (normalises, _, _, wants_x, wants_first, wants_second) = rest[:4], rest[-6:]
    products = ((wants_x or normalises) + wants_first) * w1.numel() + (1 + wants_second) * w2.numel()
    return 2 * x.shape[:2].numel() * products


def _conv_block_backward_flops(grad: Tensor, *rest: Any, **__: Any) -> int:
    weight, wanted = rest[4], rest[-1]
    return 2 * grad.shape[:2].numel() * weight.numel() * ((wanted & 1) + (wanted >> 1 & 1))


def _grouped_conv_backward_flops(
    grad: Tensor, y: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: int, **_: Any
) -> int:
    return _conv_block_flops(x, weight) * ((wanted & 1) + (wanted >> 1 & 1))


def _convolution_backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, **__: Any) -> int:
    """The forward pass once for each gradient of x and of the weight."""
    *_, transposed, _output_padding, _groups, wanted = rest
    places = (x if transposed else grad).shape[2:].numel()
    return 2 * x.shape[0] * places * weight.numel() * sum(wanted[:2])


# PyTorch's own table has the CUDA attention kernels only, and takes a convolution in groups for one without, backwards.
_FLOPS = {
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
    torch.ops.fastflow.attention: _attention_flops,
    torch.ops.fastflow.attention_backward: _attention_backward_flops,
    torch.ops.fastflow.relative_attention: _relative_attention_flops,
    torch.ops.fastflow.relative_attention_backward: _relative_attention_backward_flops,
    torch.ops.fastflow.attention_triton: _attention_flops,
    torch.ops.fastflow.attention_backward_triton: _attention_backward_flops,
    torch.ops.fastflow.relative_attention_triton: _relative_attention_flops,
    torch.ops.fastflow.relative_attention_backward_triton: _relative_attention_backward_flops,
    torch.ops.fastflow.self_attention: _self_attention_flops,
    torch.ops.fastflow.self_attention_backward: _self_attention_backward_flops,
    torch.ops.fastflow.transformer_block: _transformer_block_flops,
    torch.ops.fastflow.transformer_block_backward: _transformer_block_backward_flops,
    torch.ops.fastflow.projection: _projection_flops,
    torch.ops.fastflow.projection_triton: _projection_flops,
    torch.ops.fastflow.feed_forward: _feed_forward_flops,
    torch.ops.fastflow.feed_forward_triton: _feed_forward_flops,
    torch.ops.fastflow.projection_backward: _projection_backward_flops,
    torch.ops.fastflow.feed_forward_backward: _feed_forward_backward_flops,
    torch.ops.fastflow.conv_block_backward: _conv_block_backward_flops,
    torch.ops.fastflow.conv_block_backward_triton: _conv_block_backward_flops,
    torch.ops.fastflow.conv_block: _conv_block_flops,
    torch.ops.fastflow.conv_block_triton: _conv_block_flops,
    torch.ops.fastflow.grouped_conv: _conv_block_flops,
    torch.ops.fastflow.grouped_conv_backward: _grouped_conv_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}


class Counts(TorchDispatchMode):
    """Count compute ops, host synchronisations and FLOPs of everything that runs in the ``with`` block.

    ``ops`` counts, by name, the operators that reach the dispatcher below autograd, in forward and backward, and that
    read or write tensor data: each is one or more kernel launches on a GPU and one or more passes over memory.  A fused
    op counts once.  Not counted: views and other aliases (view, transpose, expand, detach, ...), allocation without
    filling (empty and its relatives), metadata.  Composite operators count as the parts they decompose into.  What a
    compiled kernel does inside is not seen, so counts of ``torch.compile``d code say nothing.

    ``syncs`` counts, by name, the operators that make the host wait on a GPU: item(), int(), bool() of a tensor,
    nonzero, masked_select, unique, equal, indexing by a boolean mask (but not ``x[mask] = number``), copies from
    another device to the CPU, and tolist(), numpy() called from Python.  It works without a GPU, where the same calls
    do not wait.  Synchronisations inside a kernel are invisible here; :func:`count_cuda_syncs` sees those on a GPU.

    ``bytes`` counts, by name, the bytes of the tensors that these operators read and write, each once per operator:
    what they move at least if no cache keeps anything from one operator to the next.

    ``flops`` counts the floating point operations of matrix products, convolutions and attention (two per
    multiply-add), by the formulas registered with :func:`torch.utils.flop_counter.register_flop_formula`.

    Args:
        where: called for each op; the name it returns is the key in ``flops``.

    Example:
        >>> with Counts() as counts:
        ...     _ = torch.ones(3).exp().sum().item()
        >>> counts.ops.total(), counts.syncs.total()
        (3, 1)
    """

    def __init__(self, where: Callable[[], str] = str) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._where = where
        self._host_calls = _HostCalls(self.syncs)

    def __enter__(self) -> "Counts":
        self._host_calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._host_calls.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula: Any = _FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is None and _is_composite(func):
            # Under inference_mode composite operators arrive whole.  _HostCalls must not see the inner call.
            with self, torch._C.DisableTorchFunction():
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func.name().split(".")[0]
        if not func.is_view and name not in _NO_COMPUTE:
            self.ops[name] += 1
            tensors = {
                id(x): x.numel() * x.element_size() for x in tree_iter((args, kwargs, out)) if isinstance(x, Tensor)
            }
            self.bytes[name] += sum(tensors.values())
        if name in _SYNCS or _indexes_with_mask(name, args) or _copies_to_host(name, args, out):
            self.syncs[name] += 1
        if formula is not None:
            self.flops[self._where()] += formula(*args, **kwargs, out_val=out)
        return out


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether the operator is only a name for a sequence of others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _indexes_with_mask(name: str, args: tuple[Any, ...]) -> bool:
    """``x[mask]`` looks for the true entries, whose number only the device knows; filling with a number does not."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    fills = name != "aten::index" and args[2].numel() == 1
    return not fills and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _copies_to_host(name: str, args: tuple[Any, ...], out: Any) -> bool:
    if name not in ("aten::_to_copy", "aten::copy_"):
        return False
    source = args[1] if name == "aten::copy_" else args[0]
    return out.device.type == "cpu" and source.device.type not in ("cpu", "meta")


class _HostCalls(TorchFunctionMode):
    """Reads of a tensor by Python that pass the dispatcher by."""

    def __init__(self, syncs: Counter[str]) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HOST_METHODS:
            self.syncs[_HOST_METHODS[func]] += 1
        return func(*args, **(kwargs or {}))


def count_cuda_syncs(run: Callable[[], Any]) -> int:
    """Number of synchronising CUDA calls that PyTorch itself reports while ``run()`` works, forward and backward.

    Source: :func:`torch.cuda.set_sync_debug_mode`.  An explicit ``torch.cuda.synchronize()`` is not among them.

    Raises:
        RuntimeError: no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("count_cuda_syncs needs a CUDA device; Counts counts host syncs without one")
    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(previous)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


class SavedTensors:
    """Bytes that autograd keeps from forward to backward, for everything that runs in the ``with`` block.

    A storage counts once, with its full size, however many tensors or views of it are saved: that is what stays
    allocated.  What the backward pass saves while it computes a part again does not count.  Tensors stored on an
    autograd function's ``ctx`` without ``save_for_backward`` are not seen.

    Args:
        exclude: tensors whose storage is not counted; pass ``module.parameters()``, which live anyway.
        where: called for each new storage; the name it returns is the key in ``by_name``.

    Attributes:
        by_name: saved bytes by name, under "" when no ``where`` is given.
    """

    def __init__(self, exclude: Iterable[Tensor] = (), where: Callable[[], str] = str) -> None:
        self.by_name: Counter[str] = Counter()
        self._where = where
        # The storages themselves are kept, so that no address is used twice while counting.
        self._seen = {storage._cdata: storage for storage in (t.untyped_storage() for t in exclude)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Bytes saved so far."""
        return self.by_name.total()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        in_backward = torch._C._current_graph_task_id() >= 0
        if not in_backward and storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.by_name[self._where()] += storage.nbytes()
        return tensor

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._seen.clear()


@contextmanager
def current_module(
    root: nn.Module, without: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> Iterator[Callable[[], str]]:
    """Yield a function that names the innermost submodule of ``root`` whose forward is running, "" outside of all.

    Args:
        without: classes whose modules count as a part of what calls them: a hook would change how that computes.
    """
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in root.named_modules():
        if isinstance(module, without):
            continue
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: running[-1] if running else ""
    finally:
        for handle in handles:
            handle.remove()
