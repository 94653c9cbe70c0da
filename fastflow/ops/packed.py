"""Weights kept in the order in which the CPU's products read them, so that inference does not pack them in every call.

A packed weight lives as long as the parameter that it is made of, and takes as much memory again (twice as much for
float16 and bfloat16, as the products are float32).  One that no longer belongs to the parameters is made anew: their
versions say so, which the optimizer and ``load_state_dict`` raise; and what only ``.data`` changed, and so left its
version alone, the kernel finds by comparing a sample.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastflow import backend as _backend

torch.library.define("fastflow::pack_weights", "(Tensor[] weights, Tensor?[] biases) -> Tensor")

_cache = WeakTensorKeyDictionary()  # the first weight -> what all were when packed, and packed


def packed_weights(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The weights ``[N_i, C]`` with their biases in one packed tensor.

    None where a product with x is traced; where the weights are no parameters, which no other call may bring again; and
    where they were made in inference mode, which counts no versions.
    """
    given = [t for t in (*weights, *biases) if t is not None]
    real = type(x) is Tensor and all(type(weight) is nn.Parameter for weight in weights)
    if torch.compiler.is_compiling() or not real or any(t.is_inference() for t in given):
        return None
    assert _backend.extension is not None
    # The width of a panel is that of the instruction set in force.
    state = _backend.extension.cpu_capability(), [(id(t), t.data_ptr(), t._version) for t in given]
    known, packed = _cache.get(weights[0], (None, None))
    if known != state:
        packed = torch.ops.fastflow.pack_weights(weights, biases)
        _cache[weights[0]] = state, packed
    return packed
