"""``StabilityMonitor`` and ``OverflowMonitor``: true figures, policies, files, and their price in host syncs."""

import builtins
import copy
import csv
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastflow.testing.cases import fresh_flow, training_batch
from fastflow.testing.counters import Counts
from fastflow.training import NonFiniteError, OverflowMonitor, SpikeDetector, StabilityMonitor, freeze
from fastflow.training.attention_logits import AttentionLogits, attention_modules
from fastflow.training.parts import named_part_parameters

TINY = ["tiny", "tiny2", "tiny3"]


class Run:
    """A flow, its optimizer and its monitor; ``scale`` multiplies the gradient of a step to make a spike."""

    def __init__(self, name: str = "tiny3", lr: float = 1e-3, **options) -> None:
        self.flow, self.batch = fresh_flow(name), training_batch(name)
        self.optimizer = torch.optim.AdamW(self.flow.parameters(), lr)
        self.monitor = StabilityMonitor(self.flow, self.optimizer, **options)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.flow.parameters()]

    def step(self, scale: float = 1.0):
        loss = self.flow(self.batch, "cpu")["loss"]
        loss.backward()
        for p in self.flow.parameters():
            p.grad *= scale
        record = self.monitor.step(loss)
        self.optimizer.zero_grad()
        return record


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ figures
@pytest.mark.parametrize("name", TINY)
def test_gradient_and_update_figures_are_true(name: str) -> None:
    run = Run(name, sample_every=1)
    loss = run.flow(run.batch, "cpu")["loss"]
    loss.backward()
    old = {key: p.detach().clone() for key, p in run.flow.named_parameters()}
    first = run.monitor.step(loss)
    expected = {}
    for part, named in named_part_parameters(run.flow).items():
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in named.values()))
        assert first.figures[f"gradient/{part}"] == pytest.approx(norm, rel=1e-5)
        change = math.sqrt(sum((p - old[key]).double().square().sum().item() for key, p in named.items()))
        weight = math.sqrt(sum(old[key].double().square().sum().item() for key in named))
        expected[part] = change / weight
    assert first.figures["loss"] == loss.item()
    assert first.figures["gradient"] == pytest.approx(
        math.sqrt(sum(first.figures[f"gradient/{part}"] ** 2 for part in expected))
    )
    run.optimizer.zero_grad()
    second = run.step()  # updates are read with the step after them
    assert {part: second.figures[f"update/{part}"] for part in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_loss_by_timestep_is_that_of_the_rows(name: str, accumulated: int) -> None:
    run = Run(name)
    run.flow.decoder.training_cfg_rate = 0.0
    sums, rows, calls = [0.0] * 5, [0] * 5, []
    estimator = run.flow.decoder.estimator
    estimator.register_forward_hook(lambda module, args, out: calls.append((args, out.detach())))
    noise = []
    randn_like, total = torch.randn_like, 0.0
    torch.randn_like = lambda x: noise.append(randn_like(x)) or noise[-1]
    try:
        for _ in range(accumulated):
            loss = run.flow(run.batch, "cpu")["loss"]
            (loss / accumulated).backward()
            total += loss.detach() / accumulated
    finally:
        torch.randn_like = randn_like
    record = run.monitor.step(total)
    x1 = run.batch["speech_feat"].transpose(1, 2)
    for (args, velocity), z in zip(calls, noise, strict=True):
        mask, t = args[1], args[3].flatten()
        u = x1 - (1 - run.flow.decoder.sigma_min) * z
        errors = ((velocity - u) * mask).square().sum((1, 2)) / (mask.sum((1, 2)) * 80)
        for error, time in zip(errors.tolist(), t.tolist(), strict=True):
            sums[int(time * 5)] += error
            rows[int(time * 5)] += 1
    figures = [value for key, value in record.figures.items() if key.startswith("loss/t")]
    for figure, error, count in zip(figures, sums, rows, strict=True):
        assert math.isnan(figure) if not count else figure == pytest.approx(error / count, rel=1e-4)


def test_largest_attention_logit_is_that_of_a_plain_computation() -> None:
    flow, batch = fresh_flow("tiny2"), training_batch("tiny2")
    logits = AttentionLogits(flow)
    logits.active = True
    seen = {}
    module = flow.decoder.estimator.mid_blocks[0][1][0].attn1
    module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], norm=args[1], lengths=args[2]))
    flow(batch, "cpu")
    x = F.layer_norm(seen["x"][0, : seen["lengths"][0]], (64,), seen["norm"].scale, seen["norm"].shift)
    q, k = (w(x).unflatten(-1, (4, -1)).transpose(0, 1) for w in (module.to_q, module.to_k))
    largest = (q @ k.transpose(1, 2) / 32**0.5).max()
    assert logits.largest["decoder.estimator.mid_blocks.0.1.0.attn1"] == pytest.approx(largest.item(), rel=1e-5)
    assert sum(name.startswith("encoder") for name in logits.largest) == 6
    logits.remove()


@pytest.mark.parametrize("name", TINY)
def test_attention_logits_follow_the_weights_and_ignore_padding(name: str) -> None:
    run = Run(name, lr=0.0, sample_every=1)
    run.batch = {key: value.flip(0) for key, value in run.batch.items()}  # the sampled row is the shortest

    def logit() -> float:
        random.seed(0)
        torch.manual_seed(0)
        return run.step().figures["logit/estimator"]

    small = logit()
    tokens, frames = int(run.batch["speech_token_len"][0]), int(run.batch["speech_feat_len"][0])
    run.batch["speech_feat"][0, frames:] = 1e4
    run.batch["speech_token"][0, tokens:] = 7
    assert logit() == pytest.approx(small, rel=1e-3)
    for key, p in run.flow.named_parameters():
        if "to_q.weight" in key or "to_q.bias" in key:
            p.data *= 100
    assert logit() > 50 * small


def test_unsampled_steps_have_no_logits() -> None:
    run = Run(sample_every=3)
    found = [not math.isnan(run.step().figures["logit/estimator"]) for _ in range(7)]
    assert found == [True, False, False, True, False, False, True]


def test_nothing_listens_to_attention_in_unsampled_steps() -> None:
    """So that a transformer block is one op in them, as without a monitor."""
    run = Run(sample_every=2)
    hooks = []
    for _ in range(4):
        hooks.append(any(module._forward_pre_hooks for module in attention_modules(run.flow).values()))
        run.step()
    assert hooks == [True, False, True, False]


def test_frozen_parts_have_no_gradient_figures() -> None:
    flow = fresh_flow("tiny")
    freeze(flow, "encoder")
    with StabilityMonitor(flow, torch.optim.SGD(flow.parameters(), 1e-3)) as monitor:
        loss = flow(training_batch("tiny"), "cpu")["loss"]
        loss.backward()
        figures = monitor.step(loss).figures
    assert "gradient/encoder" not in figures
    assert figures["activation/encoder"] > 0


def test_one_read_from_the_device_a_step() -> None:
    """Of the monitor alone: SGD reads nothing."""
    run = Run("tiny", clip_norm=1e9, sample_every=2)
    run.monitor.optimizer = torch.optim.SGD(run.flow.parameters(), 1e-3)
    for _ in range(4):
        loss = run.flow(run.batch, "cpu")["loss"]
        loss.backward()
        with Counts() as counts:
            run.monitor.step(loss)
        assert counts.syncs.total() == 1


def test_close_removes_every_hook() -> None:
    flow = fresh_flow("tiny")
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in flow.modules())  # noqa: E731
    monitor = StabilityMonitor(flow, torch.optim.SGD(flow.parameters(), 1e-3))
    assert hooks() > 0
    monitor.close()
    assert hooks() == 0


# ------------------------------------------------------------------------------------------------ steps
def test_steps_are_those_of_the_optimizer() -> None:
    """With the monitor and without it a run is the same, bit for bit."""
    run = Run("tiny")
    plain = copy.deepcopy(fresh_flow("tiny"))
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-3)
    for _ in range(3):
        state = random.getstate(), torch.get_rng_state()
        run.step()
        random.setstate(state[0])
        torch.set_rng_state(state[1])
        plain(run.batch, "cpu")["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(run.weights(), [p.detach() for p in plain.parameters()])


def test_clipping_is_torchs() -> None:
    run = Run("tiny", clip_norm=0.1)
    loss = run.flow(run.batch, "cpu")["loss"]
    loss.backward()
    clipped = [p.grad.clone() for p in run.flow.parameters()]
    for p, grad in zip(run.flow.parameters(), clipped, strict=True):
        p.grad = grad.clone()
    nn.utils.clip_grad_norm_(run.flow.parameters(), 0.1)
    expected = [p.grad.clone() for p in run.flow.parameters()]
    for p, grad in zip(run.flow.parameters(), clipped, strict=True):
        p.grad = grad
    record = run.monitor.step(loss)
    assert record.figures["gradient"] > 0.1
    for p, grad in zip(run.flow.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------ spikes
def test_detector_finds_spikes_and_nothing_else() -> None:
    generator = random.Random(0)
    detector = SpikeDetector(window=100)
    ordinary = [math.exp(generator.gauss(0, 0.3)) for _ in range(2000)]
    assert sum(detector(x) for x in ordinary) == 0
    assert [detector(x) for x in (50.0, 1.0, 80.0)] == [True, False, True]
    assert not detector(float("nan"))
    assert not detector(0.0)


def test_detector_is_not_blinded_by_earlier_spikes_and_gets_used_to_a_new_level() -> None:
    detector = SpikeDetector(window=40)
    for _ in range(40):
        detector(1.0)
    assert all(detector(100.0) for _ in range(10))
    answers = [detector(100.0) for _ in range(40)]
    assert answers[0]
    assert not answers[-1]


def test_detector_needs_a_factor_of_two_where_nothing_varies() -> None:
    detector = SpikeDetector(window=40)
    for _ in range(40):
        detector(1.0)
    assert not detector(1.9)
    assert detector(2.1)


@pytest.mark.parametrize(("options", "match"), [({"window": 5}, "window"), ({"threshold": 0}, "threshold")])
def test_detector_refuses_numbers_out_of_range(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SpikeDetector(**options)


@pytest.mark.parametrize("policy", ["record", "skip", "lower-lr", "roll-back"])
def test_policies_for_a_spike(policy: str, caplog) -> None:
    run = Run(on_spike=policy, snapshot_every=4, lr=1e-4)
    history = [run.weights()]
    for _ in range(22):
        assert run.step().action == "step"
        history.append(run.weights())
    record = run.step(scale=1000.0)
    assert record.action == policy
    assert "spike, gradient" in caplog.text
    assert "largest gradient in estimator" in caplog.text
    after = run.weights()
    if policy == "record":
        assert not same(after, history[22])
    elif policy == "skip":
        assert same(after, history[22])
    elif policy == "lower-lr":
        assert run.monitor.lr_scale == 0.5
        assert run.optimizer.param_groups[0]["lr"] == 1e-4  # schedulers see their own
        assert not same(after, history[22])
    else:
        assert same(after, history[16])  # snapshots were taken after steps 16 and 20
    assert run.step().action == "step"


def test_roll_back_restores_the_optimizer_too() -> None:
    run = Run(on_spike="roll-back", snapshot_every=100)
    before = copy.deepcopy(run.optimizer.state_dict())
    for _ in range(22):
        run.step()
    run.step(scale=1000.0)
    assert run.optimizer.state_dict()["state"] == before["state"] == {}


def test_a_lowered_rate_halves_the_update() -> None:
    run = Run(lr=0.0)
    run.optimizer = run.monitor.optimizer = torch.optim.SGD(run.flow.parameters(), 1e-3)
    weights = run.weights()
    run.monitor.lr_scale = 0.5
    loss = run.flow(run.batch, "cpu")["loss"]
    loss.backward()
    grads = [p.grad.clone() for p in run.flow.parameters()]
    run.monitor.step(loss)
    for p, old, grad in zip(run.flow.parameters(), weights, grads, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5e-3 * grad, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------ not finite
@pytest.mark.parametrize(
    ("poison", "part"),
    [
        ("encoder.encoders.1.norm_ff.bias", "encoder"),
        ("length_regulator.model.3.bias", "length_regulator"),
        ("decoder.estimator.mid_blocks.0.0.block1.block.0.bias", "estimator"),
    ],
)
def test_an_output_that_is_not_finite_names_its_part(poison: str, part: str) -> None:
    run = Run("tiny", on_nonfinite="raise")
    module = run.flow.get_submodule(poison.rpartition(".")[0])
    value = module.bias.data.clone()
    module.bias.data.fill_(float("inf"))
    loss = run.flow(run.batch, "cpu")["loss"]
    loss.backward()
    module.bias.data.copy_(value)  # the weights are not to blame
    with pytest.raises(NonFiniteError, match=f"step 0: the first output that is not finite is that of part {part}"):
        run.monitor.step(loss)


def test_a_gradient_that_is_not_finite_names_the_block_where_it_began() -> None:
    run = Run("tiny", on_nonfinite="raise")
    block = run.flow.decoder.estimator.mid_blocks[0]
    block.register_full_backward_pre_hook(lambda module, grads: (grads[0] * float("nan"),))
    with pytest.raises(
        NonFiniteError, match=r"forward is finite.* decoder\.estimator\.mid_blocks\.0 of part estimator"
    ):
        run.step()


def test_weights_that_are_not_finite_always_raise() -> None:
    run = Run("tiny", on_nonfinite="skip")
    run.flow.encoder_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the weight encoder_proj\.weight of part encoder is not finite"):
        run.step()


def test_a_step_that_is_not_finite_is_skipped_and_forgotten(caplog) -> None:
    run = Run("tiny")
    before = run.weights()
    run.step(scale=float("inf"))
    assert same(before, run.weights())
    assert run.monitor.actions == {"skip": 1}
    assert "step 0 skipped" in caplog.text
    assert run.step().action == "step"
    assert math.isfinite(run.step().figures["gradient"])


def test_a_scaler_lowers_its_scale_after_an_overflow() -> None:
    flow, batch = fresh_flow("tiny3"), training_batch("tiny3")
    optimizer = torch.optim.AdamW(flow.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    batch["speech_feat"] *= 100
    before = [p.detach().clone() for p in flow.parameters()]
    monitor = StabilityMonitor(flow, optimizer, scaler=scaler)
    actions = []
    for _ in range(40):
        loss = flow(batch, "cpu")["loss"]
        scaler.scale(loss).backward()
        actions.append(monitor.step(loss).action)
        optimizer.zero_grad()
    assert actions[0] == "skip"
    assert "step" in actions  # whether the last one is, the draws decide
    assert not same(before, [p.detach() for p in flow.parameters()])


# ------------------------------------------------------------------------------------------------ files, state
def test_csv_holds_every_step_and_a_resumed_run_goes_on_in_it(tmp_path: Path) -> None:
    run = Run(log_dir=tmp_path)
    for _ in range(4):
        run.step()
    state = run.monitor.state_dict()
    run.step()  # past the checkpoint: dropped on resuming
    run.monitor.close()
    again = Run(log_dir=tmp_path)
    again.monitor.load_state_dict(state)
    records = [again.step() for _ in range(2)]
    with open(tmp_path / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert float(rows[5]["loss"]) == records[1].figures["loss"]
    assert rows[5]["action"] == "step"
    with pytest.raises(ValueError, match="holds other figures"):
        Run("tiny", log_dir=tmp_path).step()


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(log_dir=tmp_path, tensorboard=True)
    losses = [run.step().figures["loss"] for _ in range(3)]
    run.monitor.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_without_tensorboard_the_message_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if "tensorboard" in name:
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'fastflow\[train\]'"):
        Run(log_dir=tmp_path, tensorboard=True)


def test_state_restores_the_judgement() -> None:
    run = Run()
    for _ in range(22):
        run.step()
    again = Run()
    again.monitor.load_state_dict(run.monitor.state_dict())
    assert again.monitor.steps == 22
    assert again.step(scale=1000.0).action == "record"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"on_spike": "panic"}, "on_spike must be one of record, skip, lower-lr, roll-back; got 'panic'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of skip, raise; got 'ignore'"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0"),
        ({"sample_every": -1}, "sample_every must be >= 0"),
        ({"snapshot_every": 0}, "snapshot_every >= 1"),
        ({"tensorboard": True}, "needs a log_dir"),
    ],
)
def test_bad_options_are_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Run(**options)


# ------------------------------------------------------------------------------------------------ overflow
@pytest.mark.parametrize("name", TINY)
def test_the_block_where_activations_grow_is_named(name: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name)
    block = {
        "tiny": "decoder.estimator.mid_blocks.1.1.0.ff",
        "tiny2": "encoder.up_layer",
        "tiny3": "decoder.estimator.transformer_blocks.2.ff",
    }[name]
    for p in flow.get_submodule(block).parameters():
        p.data *= 300
    with OverflowMonitor(flow) as overflow, torch.no_grad():
        flow(batch, "cpu")
    assert overflow.grower().name.startswith(block)
    assert overflow.grower().name in overflow.table()
    assert overflow.first_nonfinite() is None
    assert overflow.largest().output == max(a.output for a in overflow.activations)


def test_a_table_of_vectors_does_not_grow_anything() -> None:
    flow, batch = fresh_flow("tiny"), training_batch("tiny")
    with OverflowMonitor(flow) as overflow, torch.no_grad():
        flow(batch, "cpu")
    assert overflow.grower().name != "input_embedding"


def test_the_first_block_that_overflows_is_named() -> None:
    flow, batch = fresh_flow("tiny3"), training_batch("tiny3")
    flow.get_submodule("decoder.estimator.transformer_blocks.1.ff").ff[2].bias.data.fill_(float("inf"))
    with OverflowMonitor(flow) as overflow, torch.no_grad():
        flow(batch, "cpu")
    assert overflow.first_nonfinite() == "decoder.estimator.transformer_blocks.1.ff"
    assert overflow.grower().name == "decoder.estimator.transformer_blocks.1.ff"
    assert "first not finite: decoder.estimator.transformer_blocks.1.ff" in overflow.table()


def test_overflow_monitor_leaves_no_hooks_and_does_not_change_the_loss() -> None:
    flow, batch = fresh_flow("tiny"), training_batch("tiny")
    losses = []
    for watched in (True, False):
        random.seed(0)
        torch.manual_seed(0)
        with OverflowMonitor(flow) if watched else torch.enable_grad():
            losses.append(flow(batch, "cpu")["loss"].item())
    assert losses[0] == losses[1]
    assert not any(m._forward_hooks for m in flow.modules())


def test_overflow_monitor_without_a_run_says_so() -> None:
    with pytest.raises(ValueError, match="run the flow inside"):
        OverflowMonitor(fresh_flow("tiny3")).grower()


# ------------------------------------------------------------------------------------------------ torch's own EMA
@pytest.mark.parametrize("name", TINY)
def test_torchs_averaged_model_works_with_a_flow(name: str) -> None:
    """``AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.999))``: its average synthesises, saves and loads."""
    flow, batch = fresh_flow(name), training_batch(name)
    average = torch.optim.swa_utils.AveragedModel(
        flow, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    optimizer = torch.optim.SGD(flow.parameters(), 1e-2)
    expected = {key: p.detach().clone() for key, p in flow.named_parameters()}
    for step in range(3):
        flow(batch, "cpu")["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(flow)
        for key, p in flow.named_parameters():  # the first update copies
            expected[key] = p.detach().clone() if step == 0 else torch.lerp(p.detach(), expected[key], 0.9)
    for key, p in average.module.named_parameters():
        torch.testing.assert_close(p, expected[key], rtol=1e-5, atol=1e-6)
    fresh = fresh_flow(name)
    fresh.load_state_dict(average.module.state_dict())
    assert torch.isfinite(average.module(batch, "cpu")["loss"])
    assert next(average.module.parameters()) is not next(flow.parameters())
