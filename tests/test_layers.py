"""Fused ops read the parameters of layers: one that computes something else with them is refused or called."""

import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastflow.testing.cases import fresh_flow, training_batch


class WithLora(nn.Module):
    """As LoRA libraries wrap a layer: its ``weight`` is the old one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias, self.in_features = layer, layer.weight, layer.bias, layer.in_features
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def _linear_layers(flow: nn.Module) -> list[str]:
    return [name for name, layer in flow.named_modules() if type(layer) is nn.Linear]


def _loss(flow: nn.Module, name: str) -> torch.Tensor:
    torch.manual_seed(0)
    random.seed(0)
    return flow(training_batch(name), "cpu")["loss"]


@pytest.mark.parametrize("name", ["tiny", "tiny2", "tiny3"])
def test_a_wrapped_layer_is_called_or_refused_but_never_passed_over(name):
    flow = fresh_flow(name)
    refused = 0
    for path in _linear_layers(flow):
        parent, _, child = path.rpartition(".")
        layer = flow.get_submodule(path)
        wrapped = WithLora(layer)
        setattr(flow.get_submodule(parent), child, wrapped)
        try:
            loss = _loss(flow, name)
        except TypeError:
            refused += 1
        else:
            loss.backward()
            assert wrapped.up.weight.grad is not None, path
        setattr(flow.get_submodule(parent), child, layer)
    assert refused > 0


@pytest.mark.parametrize("name", ["tiny", "tiny2", "tiny3"])
def test_a_parametrised_layer_is_seen(name):
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    flow = fresh_flow(name).eval()
    path = next(path for path in _linear_layers(flow) if path.endswith("to_q"))
    layer = flow.get_submodule(path)
    with torch.no_grad():
        layer.weight.mul_(2)
        expected = _loss(flow, name)
        layer.weight.mul_(0.5)
        parametrize.register_parametrization(layer, "weight", Doubled())
        torch.testing.assert_close(_loss(flow, name), expected)


def test_the_refusal_names_the_layer_and_the_way_out():
    name = "tiny"
    flow = fresh_flow(name)
    block = flow.decoder.estimator.mid_blocks[0][1][0]
    block.attn1.to_q = WithLora(block.attn1.to_q)
    with pytest.raises(TypeError, match=r"WithLora.*merge LoRA weights"):
        _loss(flow, name)
