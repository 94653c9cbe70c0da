"""``GraphedStep`` trains as a step without graphs does; the capture itself is tested on a GPU.

Without a GPU a "graph" is a closure over its input and output buffers that computes again when it is replayed.
"""

import random

import pytest
import torch
from torch import Tensor, nn

from fastflow import from_preset, graphs
from fastflow.graphs import Graph, GraphCache
from fastflow.training import GraphedStep

TINY = ("tiny", "tiny2", "tiny3")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: CUDA graphs: this machine has no GPU")


class Captures:
    """Stands in for the capture, which computes nothing; counts.  A replay draws nothing from Python's generator."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, solve, inputs: dict[str, Tensor], pool: object) -> Graph:
        self.count += 1
        output = torch.full((), float("nan"))

        def replay() -> None:
            state = random.getstate()
            output.copy_(solve(**inputs))
            assert random.getstate() == state, "a graph repeats what Python's generator gave when it was captured"

        return Graph(inputs, output, replay)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Graphs on a CPU."""
    stand_in = Captures()
    monkeypatch.setattr(graphs, "possible", lambda x: True)
    monkeypatch.setattr("fastflow.training.graphed.graphs.GraphCache", lambda **rest: GraphCache(stand_in, **rest))
    return stand_in


def make_flow(name: str) -> nn.Module:
    torch.manual_seed(0)
    return from_preset(name)


def make_batch(flow: nn.Module, seed: int, lengths: tuple[int, ...] = (12, 9)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token_len = torch.tensor(lengths)
    feat_len = (token_len * getattr(flow, "token_mel_ratio", 1.72)).int()
    return {
        "speech_token": torch.randint(flow.vocab_size, (len(lengths), max(lengths)), generator=generator),
        "speech_token_len": token_len,
        "speech_feat": torch.randn(len(lengths), int(feat_len.max()), 80, generator=generator),
        "speech_feat_len": feat_len,
        "embedding": torch.randn(len(lengths), 192, generator=generator),
    }


def seed(number: int) -> None:
    random.seed(number)
    torch.manual_seed(number)


def gradients(flow: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in flow.parameters()]


def plain(flow: nn.Module, batch: dict[str, Tensor], number: int) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a step without graphs."""
    flow.zero_grad()
    seed(number)
    loss = flow(batch, next(flow.parameters()).device)["loss"]
    loss.backward()
    return loss.detach(), gradients(flow)


def assert_same(flow: nn.Module, step: GraphedStep, batch: dict[str, Tensor], number: int) -> None:
    want_loss, want = plain(flow, batch, number)
    flow.zero_grad()
    seed(number)
    torch.testing.assert_close(step(batch), want_loss)
    for got, gradient in zip(gradients(flow), want, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("randomness", ["upstream", "device"])
@pytest.mark.parametrize("name", TINY)
def test_every_step_has_the_loss_and_gradients_of_one_without_graphs(name, randomness, captures) -> None:
    flow = make_flow(name)
    flow.randomness = randomness
    step = GraphedStep(flow)
    for number in range(8):
        assert_same(flow, step, make_batch(flow, number), number)
    assert captures.count == (1 if name == "tiny" else 2), "with and without streaming masks"


@pytest.mark.parametrize("name", TINY)
def test_on_a_cpu_a_step_is_computed_as_it_comes(name: str) -> None:
    flow = make_flow(name)
    step = GraphedStep(flow)
    for number in range(2):
        assert_same(flow, step, make_batch(flow, number), number)


def test_gradients_add_up_until_they_are_cleared(captures: Captures) -> None:
    flow = make_flow("tiny3")
    step = GraphedStep(flow)
    wanted = [plain(flow, make_batch(flow, number), number)[1] for number in range(4)]
    for clear_to_none in (True, False):
        flow.zero_grad(set_to_none=clear_to_none)
        for number in range(4):
            seed(number)
            step(make_batch(flow, number), weight=0.25)
        for got, *parts in zip(gradients(flow), *wanted, strict=True):
            torch.testing.assert_close(got, sum(parts) / 4)


def test_gradients_that_are_there_already_stay(captures: Captures) -> None:
    flow = make_flow("tiny")
    batch = make_batch(flow, 0)
    _, want = plain(flow, batch, 0)
    seed(0)
    GraphedStep(flow)(batch)
    for got, gradient in zip(gradients(flow), want, strict=True):
        torch.testing.assert_close(got, 2 * gradient)


@pytest.mark.parametrize("name", TINY)
def test_with_exact_padding_rows_of_other_lengths_share_a_graph(name: str, captures: Captures) -> None:
    """And what rounding the width up adds to a batch changes nothing but the draws, which are for more frames."""
    flow = make_flow(name)
    flow.padding = "exact"
    flow.draw_streaming = lambda: {} if name == "tiny" else {"streaming": False}
    step = GraphedStep(flow)
    for number, lengths in enumerate([(12, 9), (13, 10), (20, 3), (18, 18)]):
        assert step(make_batch(flow, number, lengths)).isfinite()
    assert captures.count == 1


def test_moved_and_frozen_weights_and_other_modes_ask_for_another_graph(captures: Captures) -> None:
    flow = make_flow("tiny")
    batch, step = make_batch(flow, 0), GraphedStep(flow)
    for change in (
        lambda: None,
        lambda: flow.eval(),
        lambda: setattr(flow, "recompute", "block"),
        lambda: flow.encoder.requires_grad_(False),
        lambda: flow.encoder_proj.weight.set_(flow.encoder_proj.weight.detach().clone()),
    ):
        with torch.no_grad():
            change()
        before = captures.count
        for _ in range(3):
            step(batch)
        assert captures.count == before + 1


def test_frozen_parts_get_no_gradient(captures: Captures) -> None:
    flow = make_flow("tiny")
    flow.encoder.requires_grad_(False)
    step = GraphedStep(flow)
    for number in range(3):
        step(make_batch(flow, number))
    assert all(parameter.grad is None for parameter in flow.encoder.parameters())
    assert all(parameter.grad.any() for parameter in flow.decoder.parameters())


def test_an_optimizer_trains_with_it(captures: Captures) -> None:
    flow = make_flow("tiny")
    flow.decoder.training_cfg_rate = 0.0
    optimizer, step, losses = torch.optim.Adam(flow.parameters(), 2e-3), GraphedStep(flow), []
    for _ in range(12):
        seed(0)
        losses.append(step(make_batch(flow, 0)).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_autocast_is_that_of_the_call(captures: Captures) -> None:
    flow = make_flow("tiny")
    batch, step = make_batch(flow, 0), GraphedStep(flow)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            seed(0)
            loss = step(batch)
    with torch.autocast("cpu", torch.bfloat16):
        seed(0)
        torch.testing.assert_close(loss, flow(batch, "cpu")["loss"].detach())
    assert all(parameter.grad.dtype == torch.float32 for parameter in flow.parameters())


def test_a_scaler_scales_the_gradients_and_not_the_loss(captures: Captures) -> None:
    flow = make_flow("tiny")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    batch, step = make_batch(flow, 0), GraphedStep(flow, scaler=scaler)
    want_loss, want = plain(flow, batch, 0)
    for _ in range(3):
        flow.zero_grad()
        seed(0)
        torch.testing.assert_close(step(batch), want_loss)
        for got, gradient in zip(gradients(flow), want, strict=True):
            torch.testing.assert_close(got, 8 * gradient)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda flow: flow.encoder.register_forward_hook(print), ValueError, "flow has a hook"),
        (lambda flow: flow.requires_grad_(False), ValueError, "no parameter that requires a gradient"),
        (
            lambda flow: nn.Sequential(flow),
            TypeError,
            "flow must be a flow of fastflow's, not wrapped; got a Sequential",
        ),
    ],
    ids=["hook", "all frozen", "wrapped"],
)
def test_what_a_graph_cannot_do_is_refused(change, error, message) -> None:
    flow = make_flow("tiny")
    changed = change(flow)
    with pytest.raises(error, match=message):
        GraphedStep(changed if isinstance(changed, nn.Module) else flow)(make_batch(flow, 0))


def test_bad_batches_are_named_before_a_graph_sees_them(captures: Captures) -> None:
    flow = make_flow("tiny")
    step, batch = GraphedStep(flow), make_batch(flow, 0)
    for _ in range(3):
        step(batch)
    with pytest.raises(ValueError, match="speech_token"):
        step(batch | {"speech_token": batch["speech_token"] + flow.vocab_size})


# ------------------------------------------------------------------------------------------------ on a GPU
@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_captured_steps_train_as_those_without_graphs(name: str, dtype: torch.dtype | None) -> None:
    flow = make_flow(name).cuda()
    flow.randomness = "device"
    step = GraphedStep(flow)
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        for number in range(8):
            batch = {key: x.cuda() for key, x in make_batch(flow, number).items()}
            assert_same(flow, step, batch, number)
    assert len(step._cache) == (1 if name == "tiny" else 2)
    assert all(graph is not None for graph in step._cache._graphs.values()), "a capture failed"
