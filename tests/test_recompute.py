"""The memory modes keep less for the backward pass and change nothing else."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastflow import config, recompute, use_backend
from fastflow.encoder import ConformerEncoder
from fastflow.recompute import MODES
from fastflow.testing.counters import Counts, SavedTensors
from fastflow.unet import TransformerBlock

FLOWS = ("tiny", "tiny2", "tiny3")
LESS = [mode for mode in MODES if mode != "none"]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ``auto`` keeps less in these small flows, too."""
    monkeypatch.setattr(recompute, "LARGE", 0)


def build(name: str, dropout: float = 0.1) -> nn.Module:
    """A small flow whose encoder and DiT drop, and which keeps everything."""
    spec = config.preset(name)
    if "encoder" in spec:
        rates = ("dropout_rate", "positional_dropout_rate", "attention_dropout_rate")
        spec["encoder"] |= dict.fromkeys(rates, dropout)
    spec["decoder"]["estimator"]["dropout"] = dropout
    torch.manual_seed(0)
    flow = config.build(spec)
    flow.recompute = "none"
    return flow


def training_batch(rows: int = 2, frames: int = 30) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = frames // 2
    return {
        "speech_token": torch.randint(0, 100, (rows, tokens), generator=generator),
        "speech_token_len": torch.tensor([tokens, *[tokens - 4] * (rows - 1)]),
        "speech_feat": torch.randn(rows, frames, 80, generator=generator),
        "speech_feat_len": torch.tensor([frames, *[frames - 8] * (rows - 1)]),
        "embedding": torch.randn(rows, 192, generator=generator),
    }


def loss(flow: nn.Module, seed: int = 2) -> Tensor:
    random.seed(seed)
    torch.manual_seed(seed)
    return flow(training_batch(), "cpu")["loss"]


def gradients(flow: nn.Module, run: Callable[[nn.Module], Tensor] = loss) -> dict[str, Tensor | None]:
    flow.zero_grad()
    run(flow).backward()
    return {name: parameter.grad for name, parameter in flow.named_parameters()}


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    different = [
        name
        for name, grad in want.items()
        if (got[name] is None) != (grad is None) or (grad is not None and not torch.equal(got[name], grad))
    ]
    assert not different


@pytest.fixture(params=["auto", "reference"])
def either_backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("seed", [2, 3])  # with streaming masks and without
@pytest.mark.parametrize("mode", LESS)
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_are_the_same_to_the_bit(name: str, mode: str, seed: int, either_backend: str) -> None:
    flow = build(name)
    want = gradients(flow, lambda flow: loss(flow, seed))
    draws = torch.get_rng_state()
    flow.recompute = mode
    assert_same(gradients(flow, lambda flow: loss(flow, seed)), want)
    assert torch.equal(torch.get_rng_state(), draws), "what is drawn after the step must not depend on the mode"


@pytest.mark.parametrize("mode", LESS)
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_are_the_same_under_autocast(name: str, mode: str) -> None:
    def half(flow: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(flow)

    flow = build(name)
    want = gradients(flow, half)
    flow.recompute = mode
    assert_same(gradients(flow, half), want)


def saved_bytes(flow: nn.Module) -> int:
    with SavedTensors(flow.parameters()) as saved:
        loss(flow)
    return saved.bytes


@pytest.mark.parametrize("name", FLOWS)
def test_every_mode_keeps_less_than_the_one_before(name: str, either_backend: str) -> None:
    flow, kept = build(name), {}
    for mode in MODES:
        flow.recompute = mode
        kept[mode] = saved_bytes(flow)
    assert kept["auto"] < 0.85 * kept["none"]
    assert kept["selective"] < 0.7 * kept["none"]
    assert kept["block"] < 0.7 * kept["selective"]


@pytest.mark.parametrize("name", FLOWS)
def test_auto_keeps_everything_of_a_small_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, frames = build(name), training_batch()["speech_feat"].shape[:2].numel()
    everything = saved_bytes(flow)
    flow.recompute = "auto"
    monkeypatch.setattr(recompute, "LARGE", frames)
    assert saved_bytes(flow) == everything


def block_bytes(mode: str, rows: int, frames: int) -> int:
    """Bytes kept by a transformer block of the published U-Net, its input included."""
    fake = FakeTensorMode()
    with fake, use_backend("cpu"):
        block = TransformerBlock(256, 8, 64, 0.0)
        block.recompute = mode
        x, lengths = torch.randn(rows, frames, 256, requires_grad=True), torch.full((rows,), frames)
        with SavedTensors(block.parameters()) as saved:
            block(x, lengths, 0)
        return saved.bytes


def test_a_unet_block_keeps_the_documented_tensors() -> None:
    """Floats of a frame, beside the mean and deviation of its norms and the softmax sums of 8 heads."""
    x, qkv, out, hidden, lse, norm = 256, 3 * 512, 512, 1024, 8, 2
    kept = {
        "auto": x + norm + out + lse + x + norm + hidden,
        "none": x + norm + qkv + out + lse + x + norm + hidden,
        "selective": x + norm + out + lse + x + norm,
        "block": x,
    }
    for mode, floats in kept.items():
        assert block_bytes(mode, 3, 40) == 4 * 3 * 40 * floats, mode


def test_attention_of_a_unet_block_keeps_a_twentieth_of_the_mask_path() -> None:
    """8 x 1000 frames in float32: upstream keeps 306.9 MiB, of which 244.1 are the mask as a bias for every head."""
    upstream, mib = 306.9, 2**20
    kept = block_bytes("block", 8, 1000) / mib
    assert kept <= upstream / 20
    assert kept == pytest.approx(8 * 1000 * 256 * 4 / mib), "the block's input"


@pytest.mark.parametrize("mode", LESS)
def test_a_frozen_encoder_keeps_nothing(mode: str) -> None:
    flow = build("tiny")
    for part in (flow.input_embedding, flow.encoder):
        part.requires_grad_(False)
    want = gradients(flow)
    flow.recompute = mode
    assert_same(gradients(flow), want)
    x, lengths = torch.randn(2, 15, 64), torch.tensor([15, 11])
    with SavedTensors(flow.parameters()) as saved:
        flow.encoder(x, lengths)
    assert saved.bytes == 0


@pytest.mark.parametrize("mode", LESS)
def test_parameters_learn_behind_a_frozen_input(mode: str) -> None:
    """The input of the encoder needs no gradient, its parameters do."""
    flow = build("tiny")
    flow.input_embedding.requires_grad_(False)
    want = gradients(flow)
    flow.recompute = mode
    assert_same(gradients(flow), want)


@pytest.mark.parametrize("name", FLOWS)
def test_inference_does_the_same_in_every_mode(name: str) -> None:
    flow, ops = build(name), []
    for mode in MODES:
        flow.recompute = mode
        with torch.no_grad():
            loss(flow)  # packs the weights, once
            with Counts() as counts:
                loss(flow)
        ops.append(counts.ops)
    assert ops[1:] == ops[:-1]


@pytest.mark.parametrize("mode", LESS)
def test_hooks_on_parameters_see_each_gradient_once(mode: str) -> None:
    flow = build("tiny3")
    want = {name: None if grad is None else 2 * grad for name, grad in gradients(flow).items()}
    for parameter in flow.parameters():
        parameter.register_hook(lambda grad: 2 * grad)
    flow.recompute = mode
    assert_same(gradients(flow), want)


@pytest.mark.parametrize("mode", LESS)
def test_a_second_backward_pass_gives_the_same(mode: str) -> None:
    flow = build("tiny")
    flow.recompute = mode
    value, parameters = loss(flow), list(flow.parameters())
    first = torch.autograd.grad(value, parameters, retain_graph=True)
    second = torch.autograd.grad(value, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", LESS)
def test_inside_another_checkpoint(mode: str) -> None:
    flow = build("tiny2")
    want = gradients(flow)
    flow.recompute = mode
    assert_same(gradients(flow, lambda flow: checkpoint(loss, flow, use_reentrant=False)), want)


@pytest.mark.parametrize("mode", LESS)
def test_inside_ddp(mode: str, tmp_path) -> None:
    flow = build("tiny")
    want = gradients(flow)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        twin = copy.deepcopy(flow)
        twin.recompute = mode
        got = gradients(DistributedDataParallel(twin))
    finally:
        dist.destroy_process_group()
    assert_same({name.removeprefix("module."): grad for name, grad in got.items()}, want)


def test_a_mode_reaches_every_part_and_a_part_may_differ() -> None:
    flow = config.build(config.preset("tiny"))
    assert flow.recompute == flow.decoder.estimator.recompute == "auto"
    flow.recompute = "block"
    assert flow.encoder.encoders[0].recompute == flow.decoder.estimator.mid_blocks[0][0].recompute == "block"
    flow.encoder.recompute = "selective"
    assert (flow.encoder.encoders[0].recompute, flow.decoder.estimator.recompute) == ("selective", "block")


def test_gradient_checkpointing_is_block_mode_of_the_encoder() -> None:
    spec = {key: value for key, value in config.preset("tiny")["encoder"].items() if key != "class"}
    encoder = ConformerEncoder(**spec, gradient_checkpointing=True)
    assert encoder.recompute == encoder.encoders[0].recompute == "block"
    encoder.gradient_checkpointing = False
    assert encoder.recompute == "auto"


def test_another_mode_is_named() -> None:
    with pytest.raises(ValueError, match="recompute must be one of auto, none, selective, block; got 'all'"):
        build("tiny").recompute = "all"
