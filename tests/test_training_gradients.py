"""``gradient_flow``, parameter groups and freezing: what reaches which part, and what is left alone."""

import builtins
import random

import pytest
import torch
from torch import nn

import fastflow
from fastflow.testing.cases import fresh_flow, training_batch
from fastflow.testing.counters import Counts, SavedTensors, current_module
from fastflow.training import freeze, gradient_flow, parameter_groups, unfreeze
from fastflow.training.parts import block_of, named_part_parameters, parts

TINY = ["tiny", "tiny2", "tiny3"]
PARTS = {
    "tiny": ["embedding", "encoder", "length_regulator", "speaker", "estimator"],
    "tiny2": ["embedding", "encoder", "speaker", "estimator"],
    "tiny3": ["embedding", "pre_lookahead", "speaker", "estimator"],
}


def loss_of(flow: nn.Module, batch: dict, seed: int = 0) -> torch.Tensor:
    random.seed(seed)
    torch.manual_seed(seed)
    return flow(batch, "cpu")["loss"]


def by_name(found: list) -> dict:
    return {entry.name: entry for entry in found}


# ------------------------------------------------------------------------------------------------ parts
@pytest.mark.parametrize("name", [*TINY, "cosyvoice", "cosyvoice2", "cosyvoice3"])
def test_parts_cover_every_parameter_once(name: str) -> None:
    with torch.device("meta"):
        flow = fastflow.from_preset(name)
    named = [entry for part in named_part_parameters(flow).values() for entry in part]
    assert sorted(named) == sorted(entry for entry, _ in flow.named_parameters())


@pytest.mark.parametrize("name", TINY)
def test_parts_are_in_the_order_of_the_data(name: str) -> None:
    assert list(parts(fresh_flow(name))) == PARTS[name]


@pytest.mark.parametrize(
    ("parameter", "block"),
    [
        ("encoder.encoders.3.self_attn.linear_q.weight", "encoder.encoders.3"),
        ("encoder.embed.out.0.bias", "encoder.embed"),
        ("encoder_proj.weight", "encoder_proj"),
        ("decoder.estimator.mid_blocks.11.1.2.attn1.to_q.weight", "decoder.estimator.mid_blocks.11"),
        ("decoder.estimator.final_proj.bias", "decoder.estimator.final_proj"),
        ("input_embedding.weight", "input_embedding"),
        ("length_regulator.model.4.weight", "length_regulator.model.4"),
    ],
)
def test_blocks_are_the_first_modules_below_a_part(parameter: str, block: str) -> None:
    assert block_of(parameter) == block


def test_what_is_no_flow_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a CosyVoice flow .* Linear: it has a parameter weight"):
        parts(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------ gradient_flow
@pytest.mark.parametrize("name", TINY)
def test_figures_are_those_of_backward(name: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name)
    random.seed(0)
    torch.manual_seed(0)
    found = gradient_flow(flow, batch)
    loss = loss_of(flow, batch)
    loss.backward()
    assert found.loss == loss.item()
    assert [part.name for part in found.parts] == PARTS[name]
    for part, named in named_part_parameters(flow).items():
        grads = torch.cat([p.grad.flatten() for p in named.values()])
        figure = by_name(found.parts)[part]
        assert figure.parameters == grads.numel()
        assert figure.norm == pytest.approx(grads.double().norm().item(), rel=1e-6)
        assert figure.without == pytest.approx((grads == 0).double().mean().item(), abs=1e-12)
    for part in found.parts:
        inside = [block for block in found.blocks if block.part == part.name]
        assert sum(block.parameters for block in inside) == part.parameters
        assert sum(block.norm**2 for block in inside) == pytest.approx(part.norm**2)


@pytest.mark.parametrize("name", TINY)
def test_everything_is_left_as_it_was(name: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name)
    loss_of(flow, batch).backward()
    grads = [p.grad.clone() for p in flow.parameters()]
    states = random.getstate(), torch.get_rng_state()
    gradient_flow(flow, batch)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(flow.parameters(), grads, strict=True))
    assert flow.training


@pytest.mark.parametrize("name", TINY)
def test_one_loss_trains_every_part_and_rows_without_condition_only_the_estimator(name: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name)
    flow.decoder.training_cfg_rate = 0.0
    assert all(part.norm > 0 for part in gradient_flow(flow, batch).parts)
    flow.decoder.training_cfg_rate = 1.0  # every row is dropped
    for part in gradient_flow(flow, batch).parts:
        assert (part.norm > 0) == (part.name == "estimator")


@pytest.mark.parametrize("name", TINY)
def test_only_tokens_of_the_batch_get_gradient(name: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name, rows=1)
    flow.decoder.training_cfg_rate = 0.0
    rows = batch["speech_token"].unique().numel()
    table = flow.input_embedding
    assert by_name(gradient_flow(flow, batch).parts)["embedding"].without == pytest.approx(
        1 - rows / table.num_embeddings
    )


@pytest.mark.parametrize("name", TINY)
def test_frames_of_the_condition_prefix_still_send_gradient_to_the_encoder(name: str, monkeypatch) -> None:
    flow, batch = fresh_flow(name), training_batch(name, rows=1)
    flow.decoder.training_cfg_rate = 0.0
    frames = batch["speech_feat"].shape[1]
    prefix = int(0.3 * frames)
    monkeypatch.setattr("random.random", lambda: 0.9)
    monkeypatch.setattr("random.randint", lambda low, high: high)
    last = flow.pre_lookahead_layer if name == "tiny3" else flow.encoder_proj
    last = flow.length_regulator if name == "tiny" else last
    kept = []

    def keep(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        x.retain_grad()
        kept.append(x)

    last.register_forward_hook(keep)
    flow(batch, "cpu")["loss"].backward()
    grad = kept[0].grad[0]
    revealed = prefix // (frames // len(grad))
    assert revealed > 0
    assert (grad[:revealed].norm(dim=1) > 0).all()


def test_weights_that_read_the_known_frames_get_gradient_only_from_a_prefix(monkeypatch) -> None:
    flow, batch = fresh_flow("tiny3"), training_batch("tiny3")
    flow.decoder.training_cfg_rate = 0.0
    share = 80 / flow.decoder.estimator.input_embed.proj.in_features

    def without() -> float:
        weight = flow.decoder.estimator.input_embed.proj.weight
        return (torch.autograd.grad(flow(batch, "cpu")["loss"], weight)[0] == 0).double().mean().item()

    monkeypatch.setattr("random.random", lambda: 0.0)
    assert without() == share
    monkeypatch.setattr("random.random", lambda: 0.9)
    monkeypatch.setattr("random.randint", lambda low, high: high)
    assert without() == 0


def test_table_and_plot_name_every_block(tmp_path, monkeypatch) -> None:
    found = gradient_flow(fresh_flow("tiny"), training_batch("tiny"))
    rich = found.table()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plain = found.table()
    assert rich != plain
    for text in (rich, plain):
        assert all(block.name in text for block in found.blocks if "." in block.name)
        assert all(part.name in text for part in found.parts)
    found.plot(tmp_path / "gradient.png")
    assert (tmp_path / "gradient.png").stat().st_size > 10_000


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch) -> None:
    found = gradient_flow(fresh_flow("tiny3"), training_batch("tiny3"))
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'fastflow\[demo\]'"):
        found.plot(tmp_path / "gradient.png")


# ------------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("name", TINY)
def test_groups_hold_every_parameter_once_and_decay_only_weights(name: str) -> None:
    flow = fresh_flow(name)
    groups = parameter_groups(flow, 1e-3, encoder_scale=0.1, weight_decay=0.05)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in flow.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for module in flow.modules():
        for key, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)) and key == "weight"
            assert (id(parameter) in decayed) == is_weight
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


@pytest.mark.parametrize("name", TINY)
def test_only_the_estimator_has_the_full_rate(name: str) -> None:
    flow = fresh_flow(name)
    rates = {id(p): g["lr"] for g in parameter_groups(flow, 1e-3, encoder_scale=0.1) for p in g["params"]}
    for part, named in named_part_parameters(flow).items():
        assert {rates[id(p)] for p in named.values()} == {1e-3 if part == "estimator" else 1e-4}


def test_frozen_parameters_are_in_no_group() -> None:
    flow = fresh_flow("tiny")
    freeze(flow, "embedding", "encoder", "length_regulator", "speaker")
    assert [g["name"] for g in parameter_groups(flow, 1e-3)] == ["estimator", "estimator, no decay"]
    freeze(flow, "estimator")
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        parameter_groups(flow, 1e-3)


@pytest.mark.parametrize("argument", ["lr", "encoder_scale", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_groups_refuse_negative_numbers(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be a number >= 0"):
        parameter_groups(fresh_flow("tiny3"), **{"lr": 1e-3, argument: value})


# ------------------------------------------------------------------------------------------------ freeze
@pytest.mark.parametrize("names", [(), ("encoder", "decoder")])
def test_freeze_lists_the_allowed_names(names: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"embedding, encoder, length_regulator, speaker, estimator; got (none|'decoder')"
    ):
        freeze(fresh_flow("tiny"), *names)


@pytest.mark.parametrize("name", TINY)
def test_a_frozen_part_does_not_move_and_the_others_do(name: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name)
    loss_of(flow, batch).backward()
    part = "pre_lookahead" if name == "tiny3" else "encoder"
    optimizer = torch.optim.AdamW(flow.parameters(), 1e-3)
    before = {key: p.detach().clone() for key, p in flow.named_parameters()}
    freeze(flow, part)  # the gradient of the step before must not act either
    optimizer.step()
    for owner, named in named_part_parameters(flow).items():
        same = all(torch.equal(p, before[key]) for key, p in named.items())
        assert same == (owner == part)
    unfreeze(flow, part)
    assert all(p.requires_grad for p in flow.parameters())


@pytest.mark.parametrize("name", TINY)
def test_nothing_is_saved_in_parts_that_are_frozen_up_to_mu(name: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name)

    def saved_by_module() -> dict[str, int]:
        with current_module(flow) as where, SavedTensors(flow.parameters(), where) as saved:
            loss_of(flow, batch)
        return dict(saved.by_name)

    condition = ("input_embedding", "encoder", "pre_lookahead_layer", "length_regulator", "spk_embed")
    before = saved_by_module()
    assert any(key.startswith(condition) for key in before)
    freeze(flow, *(part for part in PARTS[name] if part != "estimator"))
    after = saved_by_module()
    assert not any(key.startswith(condition) for key in after)
    assert sum(after.values()) < sum(before.values())
    loss_of(flow, batch).backward()
    assert flow.input_embedding.weight.grad is None


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("frozen", ["condition", "estimator"])
def test_gradients_of_frozen_weights_are_not_computed(name: str, frozen: str) -> None:
    def backward_flops(flow: nn.Module) -> int:
        loss = loss_of(flow, training_batch(name, tokens=60))
        with Counts() as counts:
            loss.backward()
        return counts.flops.total()

    whole, flow = backward_flops(fresh_flow(name)), fresh_flow(name)
    freeze(flow, *(part for part in PARTS[name] if (part == "estimator") == (frozen == "estimator")))
    assert backward_flops(flow) < 0.98 * whole


@pytest.mark.parametrize("name", TINY)
def test_the_estimators_gradient_does_not_depend_on_what_is_frozen(name: str) -> None:
    flow, batch = fresh_flow(name), training_batch(name)
    loss_of(flow, batch).backward()
    whole = [p.grad.clone() for p in flow.decoder.parameters()]
    flow.zero_grad()
    freeze(flow, *(part for part in PARTS[name] if part != "estimator"))
    loss_of(flow, batch).backward()
    for p, grad in zip(flow.decoder.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-7)


def test_dropout_of_a_frozen_part_stays_active() -> None:
    flow = fresh_flow("tiny")
    flow.encoder.embed.dropout.p = 0.5
    freeze(flow, "encoder")
    assert flow.encoder.training
    x = torch.ones(1, 8, 64)
    assert not torch.equal(flow.encoder.embed(x)[0], flow.encoder.embed(x)[0])
