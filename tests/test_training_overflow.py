"""Mixed precision under stress: inputs or the weights of one block up to 10,000 times too large."""

import math
import random

import pytest
import torch

from fastflow import use_backend
from fastflow.testing.cases import fresh_flow, training_batch
from fastflow.training import OverflowMonitor

TINY = ["tiny", "tiny2", "tiny3"]
SCALES = [1e2, 1e3, 1e4]
BLOCKS = {
    "tiny": ["encoder.encoders.1", "length_regulator.model.3", "decoder.estimator.mid_blocks.1"],
    "tiny2": ["encoder.up_layer", "encoder.up_encoders.2", "decoder.estimator.mid_blocks.1"],
    "tiny3": ["pre_lookahead_layer", "decoder.estimator.time_embed", "decoder.estimator.transformer_blocks.2"],
}
BLOCKS_OF = [(name, block) for name in TINY for block in BLOCKS[name]]


def forward(
    name: str,
    dtype: torch.dtype,
    backend: str,
    *,
    inputs: float = 1.0,
    block: str = "",
    weights: float = 1.0,
    autocast: bool = True,
) -> tuple[float, OverflowMonitor]:
    """The loss, and what the monitor saw, after multiplying the inputs or the weights of a block."""
    flow, batch = fresh_flow(name), training_batch(name)
    batch["speech_feat"] *= inputs
    batch["embedding"] *= inputs
    flow.input_embedding.weight.data *= inputs
    for parameter in flow.get_submodule(block).parameters() if block else ():
        parameter.data *= weights
    if not autocast:
        flow.to(dtype)
        batch |= {name: batch[name].to(dtype) for name in ("speech_feat", "embedding")}
    random.seed(0)
    torch.manual_seed(0)
    rule = torch.autocast("cpu", dtype, enabled=autocast)
    with OverflowMonitor(flow) as seen, torch.no_grad(), use_backend(backend), rule:
        return flow(batch, "cpu")["loss"].item(), seen


def nan_in(seen: OverflowMonitor) -> list[str]:
    return [a.name for a in seen.activations if math.isnan(a.output)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", TINY)
def test_large_inputs_give_no_nan_in_bfloat16(name: str, backend: str, scale: float) -> None:
    loss, seen = forward(name, torch.bfloat16, backend, inputs=scale)
    assert math.isfinite(loss)
    assert not nan_in(seen)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("name", "block"), BLOCKS_OF)
def test_large_weights_give_no_nan_in_bfloat16(name: str, block: str, backend: str, scale: float) -> None:
    loss, seen = forward(name, torch.bfloat16, backend, block=block, weights=scale)
    assert math.isfinite(loss)
    assert not nan_in(seen)


AUTOCAST = pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half"])


@AUTOCAST
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", TINY)
def test_large_inputs_give_no_nan_in_float16(name: str, backend: str, scale: float, autocast: bool) -> None:
    """The loss itself is a float32 number of the size of the squared mel."""
    loss, seen = forward(name, torch.float16, backend, inputs=scale, autocast=autocast)
    assert math.isfinite(loss)
    assert not nan_in(seen)


@AUTOCAST
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("name", "block"), BLOCKS_OF)
def test_large_weights_give_no_nan_in_float16(
    name: str, block: str, backend: str, scale: float, autocast: bool
) -> None:
    loss, seen = forward(name, torch.float16, backend, block=block, weights=scale, autocast=autocast)
    assert math.isfinite(loss)
    assert not nan_in(seen)


@AUTOCAST
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", TINY)
def test_all_weights_large_give_no_nan_in_float16(name: str, backend: str, autocast: bool) -> None:
    """Also those of the convolutions that resample, and of every norm."""
    loss, seen = forward(name, torch.float16, backend, block="decoder", weights=1e4, autocast=autocast)
    assert math.isfinite(loss)
    assert not nan_in(seen)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", TINY)
def test_a_scaler_sees_gradients_that_overflow(name: str, backend: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name)
    optimizer, scaler = torch.optim.SGD(flow.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [p.detach().clone() for p in flow.parameters()]
    with use_backend(backend):
        with torch.autocast("cpu", torch.float16):
            loss = flow(batch, "cpu")["loss"]
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert loss.isfinite()
    assert scaler.get_scale() < 2.0**60
    assert all(torch.equal(old, p) for old, p in zip(before, flow.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("tiny", "encoder.encoders.1"),
        ("tiny", "decoder.estimator.mid_blocks.1"),
        ("tiny2", "encoder.up_encoders.2"),
        ("tiny2", "decoder.estimator.mid_blocks.1"),
        ("tiny3", "decoder.estimator.transformer_blocks.2"),
    ],
)
def test_the_block_that_leaves_the_range_of_float16_is_named(name: str, block: str, backend: str) -> None:
    loss, seen = forward(name, torch.float16, backend, block=block, weights=1e3)
    assert math.isfinite(loss)
    assert seen.first_nonfinite().startswith(block)
    assert seen.grower().name == seen.first_nonfinite()
    assert f"first not finite: {seen.first_nonfinite()}" in seen.table()
