"""Replayed functions: the same numbers from ops alone, and no replay where it could differ from the function."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from fastflow.flow_matching import METHODS
from fastflow.replay import may_replay, replayed
from fastflow.testing.cases import fresh_flow
from fastflow.testing.counters import Counts

TINY = ["tiny", "tiny2", "tiny3"]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        self.function, self.calls = function, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.function(*inputs)


@torch.no_grad()
def check(function, *shapes: tuple[int, ...], called: int = 1) -> None:  # type: ignore[no-untyped-def]
    """Replays give what the function gives, after ``called`` calls of it in four rounds."""
    counted = Counted(function)
    run = replayed(counted)
    for _ in range(4):
        inputs = [torch.randn(shape) for shape in shapes]
        torch.testing.assert_close(run(*map(torch.clone, inputs)), function(*inputs), rtol=0, atol=0)
    assert counted.calls == called


WEIGHT, LIMIT = torch.arange(12.0).view(3, 4) / 7, torch.tensor(1.5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ WEIGHT + 1,
        lambda x: torch.cat([x, WEIGHT.T, x * 2]),  # lists with and without what depends on the input
        lambda x: sum(x.unbind(1)),  # several results
        lambda x: x.chunk(3, 1)[1],  # several results, most of them never used
        lambda x: x,
        lambda x: x.T.contiguous().T + x.view(-1).view(4, 3),
        lambda x: WEIGHT.sum(),  # depends on nothing
        lambda x: torch.zeros(4, 3).add_(x),
        lambda x: x.clone().mul_(2)[1:].add_(x[1:]),
        lambda x: torch.where(x > 0, x, torch.tensor(-1.0)),
        lambda x: x * LIMIT.item(),  # a number, but the same in every call
        lambda x: x.reshape(2, 6).relu().mean(0, keepdim=True),
    ],
)
def test_a_replay_gives_what_the_function_gives(function) -> None:  # type: ignore[no-untyped-def]
    check(function, (4, 3))


def test_several_inputs_are_told_apart() -> None:
    check(lambda x, y, z: x - y * z + x[:1] - z, (2, 3), (2, 3), (2, 3))


def test_one_tensor_as_two_inputs_is_not_replayed() -> None:
    counted = Counted(lambda x, y: x - 2 * y)
    run = replayed(counted)
    with torch.no_grad():
        x, y = torch.randn(2, 3)
        run(x, x)
        assert torch.equal(run(x, y), x - 2 * y)


def test_what_an_op_changes_in_place_is_changed_in_every_replay() -> None:
    seen = torch.zeros(3)

    def function(x: Tensor) -> Tensor:
        seen.add_(x)
        return seen.clone()

    run = replayed(function)
    with torch.no_grad():
        results = [run(torch.ones(3))[0].item() for _ in range(4)]
    assert results == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if x[0, 0].item() > 0 else x * 3,
        lambda x: torch.full((2,), fill_value=float(x.sum())),
    ],
)
def test_a_function_that_looks_at_values_is_called_every_time(function) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    run = replayed(function)
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(4, 3)
            assert torch.equal(run(x), function(x))


def test_inputs_of_another_shape_stride_or_dtype_are_not_replayed() -> None:
    counted = Counted(lambda x: x.contiguous().view(-1) * 2)
    run = replayed(counted)
    with torch.no_grad():
        for x in (torch.randn(4, 3), torch.randn(3, 4), torch.randn(3, 4).T, torch.randn(4, 3).double()):
            assert torch.equal(run(x), counted.function(x))
        assert counted.calls == 4
        run(torch.randn(4, 3))
        assert counted.calls == 4


def test_nothing_of_a_call_stays_in_memory() -> None:
    alive: list[weakref.ref] = []

    def function(x: Tensor) -> Tensor:
        y = x + 1
        alive.append(weakref.ref(y))
        return (y * 2).sum(0)

    run = replayed(function)
    with torch.no_grad():
        results = [weakref.ref(run(torch.randn(2, 3))) for _ in range(3)]
    gc.collect()
    assert [ref() for ref in (*alive, *results)] == [None] * 4


# ------------------------------------------------------------------------------------------------ the solver
def solve(flow: nn.Module, replays: bool, method: str = "euler", frames: int = 21) -> Tensor:
    torch.manual_seed(3)
    decoder = flow.decoder
    decoder.replays = replays
    mask = torch.ones(2, 1, frames)
    mask[1, :, frames - 6 :] = 0
    conditions = torch.randn(2, 80, frames), mask, torch.randn(2, 80), torch.randn(2, 80, frames)
    with torch.inference_mode():
        return decoder.solve(torch.randn(2, 80, frames), torch.linspace(0, 1, 5), *conditions, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TINY)
def test_a_solve_has_the_same_bits_with_replays(name: str, method: str) -> None:
    flow = fresh_flow(name).eval()
    assert torch.equal(solve(flow, True, method), solve(flow, False, method))


@pytest.mark.parametrize("name", TINY)
def test_a_solve_goes_through_the_modules_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, calls = fresh_flow(name).eval(), []
    kind = type(flow.decoder.estimator)
    forward = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs)
    )
    solve(flow, True)
    assert len(calls) == 1
    solve(flow, False)
    assert len(calls) == 1 + 4


def test_weights_changed_between_solves_are_seen() -> None:
    flow = fresh_flow("tiny2").eval()
    before = solve(flow, True)
    with torch.no_grad():
        for parameter in flow.decoder.parameters():
            parameter.mul_(1.5)
    after = solve(flow, True)
    assert not torch.allclose(before, after)
    assert torch.equal(after, solve(flow, False))


def test_a_replay_dispatches_the_ops_of_a_call() -> None:
    counts = []
    for replays in (True, False):
        with Counts() as counted:
            solve(fresh_flow("tiny").eval(), replays)
        counts.append(counted.ops)
    assert counts[0] == counts[1]


class Logged(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def patch(flow: nn.Module) -> None:
    flow.decoder.estimator.forward = flow.decoder.estimator.forward


@pytest.mark.parametrize(
    "change",
    [
        lambda flow: flow.decoder.estimator.register_forward_hook(lambda *args: None),
        lambda flow: next(flow.decoder.estimator.children()).register_forward_pre_hook(lambda *args: None),
        lambda flow: flow.train(),
        lambda flow: flow.decoder.estimator.add_module("log", Logged(2, 2)),
        patch,
    ],
    ids=["hook", "pre-hook of a part", "training", "class of the user", "forward replaced"],
)
def test_no_replay_where_a_call_may_do_more_than_its_ops(change) -> None:  # type: ignore[no-untyped-def]
    flow, x = fresh_flow("tiny").eval(), torch.zeros(1)
    with torch.no_grad():
        assert may_replay(flow.decoder, x)
        change(flow)
        assert not may_replay(flow.decoder, x)


def test_no_replay_where_gradients_are_recorded_or_under_autocast() -> None:
    flow, x = fresh_flow("tiny").eval(), torch.zeros(1)
    assert not may_replay(flow.decoder, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not may_replay(flow.decoder, x)
