"""Inference keeps packed weights, and never computes with ones that no longer hold."""

import copy
import gc

import pytest
import torch
from torch import nn

from fastflow import backend
from fastflow.ops import packed
from fastflow.ops.feed_forward import feed_forward
from fastflow.ops.projection import projection

CHANGES = {
    "an optimizer step": lambda linear: _step(linear),
    "load_state_dict": lambda linear: linear.load_state_dict(nn.Linear(40, 33).state_dict()),
    "a new parameter": lambda linear: setattr(linear, "weight", nn.Parameter(torch.randn(33, 40))),
    "a new bias": lambda linear: setattr(linear, "bias", nn.Parameter(torch.randn(33))),
    "what .data alone sees": lambda linear: linear.weight.data.mul_(2),
    "a bias that .data alone sees": lambda linear: linear.bias.data.add_(1),
    "another dtype and back": lambda linear: linear.half().float(),
}


def _step(linear: nn.Linear) -> None:
    linear(torch.randn(3, 40)).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=0.1).step()


@pytest.fixture
def linear() -> nn.Linear:
    if not torch.ops.fastflow.pack_weights.default.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU):
        pytest.skip("not run: fastflow was built without its compiled module")
    return nn.Linear(40, 33)


def _run(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return projection(x, [linear.weight], [linear.bias], backend="cpu")


@pytest.mark.parametrize("change", CHANGES)
def test_the_result_follows(linear, change):
    x = torch.randn(2, 9, 40)
    _run(linear, x)
    CHANGES[change](linear)
    for _ in range(2):
        torch.testing.assert_close(_run(linear, x), linear(x).detach())


def test_feed_forward_follows_both_weights(linear):
    inner, outer, x = nn.Linear(40, 50), nn.Linear(50, 40), torch.randn(2, 9, 40)
    for layer in (inner, outer, inner):
        with torch.no_grad():
            parameters = inner.weight, inner.bias, outer.weight, outer.bias
            got, expected = (
                feed_forward(x, *parameters, activation="silu", backend=backend) for backend in ("cpu", "reference")
            )
            torch.testing.assert_close(got, expected)
            layer.weight.mul_(1.5)


def test_packs_once_and_keeps_it_no_longer_than_the_weight(linear, monkeypatch):
    layer = copy.deepcopy(linear)
    calls, pack = [], torch.ops.fastflow.pack_weights
    monkeypatch.setattr(packed.torch.ops.fastflow, "pack_weights", lambda *args: calls.append(args) or pack(*args))
    before, x = len(packed._cache), torch.randn(2, 9, 40)
    for _ in range(3):
        _run(layer, x)
    assert len(calls) == 1
    assert len(packed._cache) == before + 1
    calls.clear()
    del layer
    gc.collect()
    assert len(packed._cache) == before


def test_another_instruction_set_packs_anew(linear):
    x, native = torch.randn(2, 9, 40), backend.extension
    chosen = native.cpu_capability()
    try:
        for name in (*native.cpu_capabilities(), "baseline"):
            native.set_cpu_capability(name)
            torch.testing.assert_close(_run(linear, x), linear(x).detach())
    finally:
        native.set_cpu_capability(chosen)


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        linear, x = nn.Linear(40, 33), torch.randn(2, 9, 40)
        for _ in range(2):
            torch.testing.assert_close(projection(x, [linear.weight], [linear.bias], backend="cpu"), linear(x))
            linear.weight.mul_(2)


def test_training_keeps_nothing(linear):
    before = len(packed._cache)
    projection(torch.randn(2, 9, 40), [linear.weight], [linear.bias], backend="cpu").sum().backward()
    assert len(packed._cache) == before


def test_a_copy_of_a_layer_packs_its_own(linear):
    x = torch.randn(2, 9, 40)
    _run(linear, x)
    other = copy.deepcopy(linear)
    with torch.no_grad():
        other.weight.mul_(3)
    torch.testing.assert_close(_run(other, x), other(x).detach())
    torch.testing.assert_close(_run(linear, x), linear(x).detach())


def test_weights_of_another_size_are_refused(linear):
    kept = torch.ops.fastflow.pack_weights([linear.weight], [linear.bias])
    with pytest.raises(RuntimeError, match="packed must have shape"):
        torch.ops.fastflow.projection(
            torch.randn(2, 9, 40), [linear.weight[:8]], [None], None, None, None, None, None, kept
        )
