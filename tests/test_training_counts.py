"""What a training step of the published depths asks of the dispatcher and of the host, next to upstream's."""

import pytest
import torch
from torch import Tensor, nn

from fastflow import checks, config
from fastflow.testing.counters import Counts

# Compute ops of upstream's step, forward and backward.
UPSTREAM = {"cosyvoice": 4048, "cosyvoice2": 4164, "cosyvoice3": 2742}


def narrow(name: str) -> nn.Module:
    """A preset with all its layers, each a few channels wide: counts do not depend on widths."""
    spec = config.preset(name)
    estimator = spec["decoder"]["estimator"]
    if name == "cosyvoice3":
        estimator |= {"dim": 64, "heads": 2, "dim_head": 32}
    else:
        spec["input_size"] = 64
        spec["encoder"] |= {"input_size": 64, "output_size": 64, "linear_units": 64, "attention_heads": 2}
        estimator |= {"channels": [64] * len(estimator["channels"]), "attention_head_dim": 16, "num_heads": 2}
    return config.build(spec)


def batch_for(flow: nn.Module) -> dict[str, Tensor]:
    token_len = torch.tensor([16, 14])
    feat_len = (token_len * getattr(flow, "token_mel_ratio", 1.72)).int()
    return {
        "speech_token": torch.randint(flow.vocab_size, (2, 16)),
        "speech_token_len": token_len,
        "speech_feat": torch.randn(2, int(feat_len[0]), 80),
        "speech_feat_len": feat_len,
        "embedding": torch.randn(2, 192),
    }


@pytest.fixture(scope="module", params=UPSTREAM)
def step(request: pytest.FixtureRequest) -> tuple[str, Counts]:
    """Name and counts of one training step, in train mode, on the default backend."""
    flow = narrow(request.param)
    flow.randomness = "device"
    batch = batch_for(flow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "readable", lambda x: False)  # as for tensors that are not on the CPU
        with Counts() as counts:
            flow(batch, "cpu")["loss"].backward()
    return request.param, counts


def test_a_step_never_waits_for_the_device(step: tuple[str, Counts]) -> None:
    assert step[1].syncs.total() == 0


def test_a_step_dispatches_a_third_of_upstreams_ops(step: tuple[str, Counts]) -> None:
    name, counts = step
    assert counts.ops.total() <= UPSTREAM[name] / 3, counts.ops.most_common()
