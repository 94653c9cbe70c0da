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

torch.library.define("fastflow::pack_weights", "(Tensor[] weights, Tensor?[] biases) -> Tensor")


@torch.library.register_fake("fastflow::pack_weights")
def _(weights, biases):  # type: ignore[no-untyped-def]
    size = torch.library.get_ctx().new_dynamic_size()
    return weights[0].new_empty(size, dtype=torch.promote_types(weights[0].dtype, torch.float32))


_cache = WeakTensorKeyDictionary()  # the first weight -> what all were when packed, and packed


def packed_weights(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The weights ``[N_i, C]`` with their biases in one packed tensor, or None where they are not parameters."""
    if torch.compiler.is_compiling() or not all(isinstance(weight, nn.Parameter) for weight in weights):
        return None
    given = [t for t in (*weights, *biases) if t is not None]
    state = [(id(t), t.data_ptr(), t._version) for t in given]
    known, packed = _cache.get(weights[0], (None, None))
    if known != state:
        packed = torch.ops.fastflow.pack_weights(weights, biases)
        _cache[weights[0]] = state, packed
    return packed
