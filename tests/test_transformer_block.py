"""``transformer_block`` keeps its promise: it is projection, self_attention, projection, feed_forward."""

import pytest
import torch
import torch.nn as nn

from fastflow import from_preset, use_backend
from fastflow.ops import transformer_block, transformer_block_ref
from fastflow.ops.norm import Norm
from fastflow.ops.transformer_block import ADDED_FRAMES
from fastflow.testing import counters
from fastflow.testing.tolerances import assert_parity

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HEADS, WIDTH, CHANNELS, HIDDEN = 2, 8, 24, 40


def make(dtype=torch.float32, *, biased=False, modulated=False, packed=False, turned=False):
    """x, weights, biases and the other arguments; odd sizes and ragged rows."""
    inner, sizes = HEADS * WIDTH, [13, 7]
    shapes = [(inner, CHANNELS)] * 3 + [(CHANNELS, inner), (HIDDEN, CHANNELS), (CHANNELS, HIDDEN)]
    weights = [nn.Parameter((torch.randn(shape) / shape[1] ** 0.5).to(dtype)) for shape in shapes]
    biases = [nn.Parameter(torch.randn(n).to(dtype)) if biased else None for n, _ in shapes]
    x = torch.randn(1, sum(sizes), CHANNELS) if packed else torch.randn(2, 15, CHANNELS)
    vector = (len(sizes), CHANNELS) if modulated else (CHANNELS,)
    norms = tuple(Norm(torch.randn(vector).to(dtype), torch.randn(vector).to(dtype), 1e-5) for _ in range(2))
    gates = tuple(torch.randn(vector).to(dtype) if modulated else None for _ in range(2))
    rows = {"sizes": sizes} if packed else {"lengths": torch.tensor(sizes)}
    angle = torch.rand(2, 15, WIDTH // 2) if turned else None
    rule = {"norms": norms, "gates": gates, "heads": HEADS, "activation": "gelu", "chunk_size": 5, "rotary": angle}
    return x.to(dtype), weights, biases, {**rule, **rows}


FORMS = [
    {},
    {"biased": True, "modulated": True, "turned": True},
    {"packed": True, "biased": True},
]
PACKED_AND_MODULATED = {"packed": True, "modulated": True, "biased": True, "turned": True}
RATES = [(0.0, 0.0), (0.2, 0.3)]


def real_frames(y, rule):
    """Without the padding, which holds arbitrary values."""
    return y if "sizes" in rule else torch.cat([row[:n] for row, n in zip(y, rule["lengths"], strict=True)])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_four_ops_to_the_bit(dtype, form):
    x, weights, biases, rule = make(dtype, **form)
    with torch.no_grad():
        whole = transformer_block(x, weights, biases, **rule, backend="cpu")
        parts = transformer_block_ref(x, weights, biases, **rule, backend="cpu")
    assert torch.equal(real_frames(whole, rule), real_frames(parts, rule))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_is_as_near_to_float64_as_the_reference(form):
    x, weights, biases, rule = make(**form)

    def run(x, weights, biases, rule, backend):
        with torch.no_grad():
            return {"out": real_frames(transformer_block(x, weights, biases, **rule, backend=backend), rule)}

    norms = tuple(Norm(n.scale.double(), n.shift.double(), n.eps) for n in rule["norms"])
    wide = {**rule, "norms": norms, "gates": tuple(None if g is None else g.double() for g in rule["gates"])}
    doubled = x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases]
    got, eager = (run(x, weights, biases, rule, backend) for backend in ("cpu", "reference"))
    truth = run(*doubled, wide, "reference")
    assert_parity(got, eager, truth, case=f"transformer_block {form}", sums=(CHANNELS, HIDDEN, 15))


def test_it_sees_weights_that_change_in_place():
    x, weights, biases, rule = make()
    with torch.no_grad():
        before = transformer_block(x, weights, biases, **rule, backend="cpu")
        weights[4].mul_(2)
        after = transformer_block(x, weights, biases, **rule, backend="cpu")
        expected = transformer_block_ref(x, weights, biases, **rule, backend="cpu")
    assert not torch.equal(before, after)
    assert torch.equal(real_frames(after, rule), real_frames(expected, rule))


def gradients(x, weights, biases, rule, rates=(0.0, 0.0), **options):
    """The result and the gradient of everything that has one, by name."""
    norms, gates = rule["norms"], rule["gates"]
    named = {"x": x, **{f"weight {i}": w for i, w in enumerate(weights)}}
    named |= {f"bias {i}": b for i, b in enumerate(biases) if b is not None}
    named |= {f"{part} {i}": getattr(norm, part) for i, norm in enumerate(norms) for part in ("scale", "shift")}
    named |= {f"gate {i}": gate for i, gate in enumerate(gates) if gate is not None}
    for leaf in named.values():
        leaf.requires_grad_()
    seeds = torch.tensor([3]), torch.tensor([5])
    out = real_frames(transformer_block(x, weights, biases, **rule, rates=rates, seeds=seeds, **options), rule)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    found = torch.autograd.grad(out, list(named.values()), cotangent)
    return {"out": out.detach(), **{f"grad {name}": g for name, g in zip(named, found, strict=True)}}


def doubled(x, weights, biases, rule):
    norms = tuple(Norm(n.scale.detach().double(), n.shift.detach().double(), n.eps) for n in rule["norms"])
    gates = tuple(None if gate is None else gate.detach().double() for gate in rule["gates"])
    parameters = [w.detach().double() for w in weights], [None if b is None else b.detach().double() for b in biases]
    return x.detach().double(), *parameters, {**rule, "norms": norms, "gates": gates}


@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("form", [*FORMS, PACKED_AND_MODULATED], ids=str)
def test_its_gradients_are_as_near_to_float64_as_the_references(form, rates):
    given = make(**form)
    got, eager = (gradients(*given, rates, backend=backend) for backend in ("cpu", "reference"))
    truth = gradients(*doubled(*given), rates, backend="reference")
    if not form.get("turned"):
        for results in (eager, truth):
            results.pop("grad bias 1", None)  # of k, which adds the same to all scores of a query: it is zero
    assert_parity(got, eager, truth, case=f"transformer_block {form} {rates}", sums=(CHANNELS, HIDDEN, 30))


@pytest.mark.parametrize("frames", [ADDED_FRAMES, 0], ids=["few", "many"])
@pytest.mark.parametrize("keep", [(), ("inputs",), ("inputs", "qkv"), ("inputs", "hidden")], ids=str)
@pytest.mark.parametrize("form", [*FORMS, PACKED_AND_MODULATED], ids=str)
def test_what_is_kept_changes_no_bit(form, keep, frames):
    given = make(**form)
    if not frames:  # so many that the gates' gradients come from products of each row
        given = (given[0].repeat_interleave(ADDED_FRAMES // 14, 1), *given[1:])
        if "sizes" in given[3]:
            given[3]["sizes"] = [n * (ADDED_FRAMES // 14) for n in given[3]["sizes"]]
        else:
            given[3]["lengths"] = given[3]["lengths"] * (ADDED_FRAMES // 14)
        given[3]["rotary"] = None
    want = gradients(*given, RATES[1], backend="cpu")
    got = gradients(*given, RATES[1], keep=keep, backend="cpu")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_some_of_q_k_and_v_may_have_a_bias():
    x, weights, biases, rule = make(biased=True)
    biases[0] = None
    got, eager = (gradients(x, weights, biases, rule, backend=backend) for backend in ("cpu", "reference"))
    for name, value in eager.items():
        torch.testing.assert_close(got[name], value, msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, CHANNELS), (2, 0, CHANNELS)], ids=str)
def test_nothing_in_nothing_out(shape):
    _, weights, biases, rule = make(biased=True)
    x = torch.zeros(shape, requires_grad=True)
    out = transformer_block(x, weights, biases, **{**rule, "lengths": torch.zeros(shape[0], dtype=torch.int64)})
    out.sum().backward()
    assert out.shape == x.grad.shape == shape
    assert all(not weight.grad.any() for weight in weights)


@pytest.mark.parametrize("frozen", range(6))
def test_a_frozen_weight_has_no_gradient_and_the_others_the_same(frozen):
    x, weights, biases, rule = make(biased=True)

    def train():
        for weight in weights:
            weight.grad = None
        real_frames(transformer_block(x, weights, biases, **rule, backend="cpu"), rule).sum().backward()
        return [weight.grad for weight in weights]

    want = train()
    weights[frozen].requires_grad_(False)
    for i, (got, grad) in enumerate(zip(train(), want, strict=True)):
        assert got is None if i == frozen else torch.equal(got, grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 5}, "weights and biases must be those of q, k, v, out, w1, w2"),
        ({"out": (3, 3)}, r"the weight out must have shape \[24, 16\], got \[3, 3\]"),
        ({"heads": 3}, "heads must divide the width 16 of q, got 3"),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, silu; got 'relu'"),
        ({"rates": (0.1, 1.0)}, r"rates must lie in \[0, 1\), got \(0.1, 1.0\)"),
        ({"keep": ("all",)}, "keep may hold inputs, qkv, hidden; got all"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    x, weights, biases, rule = make()
    weights = weights[: change.pop("weights", 6)]
    if "out" in change:
        weights[3] = torch.randn(change.pop("out"))
    with pytest.raises(ValueError, match=message):
        transformer_block(x, weights, biases, **{**rule, **change})


ESTIMATORS = [("tiny", "mid_blocks"), ("tiny2", "mid_blocks"), ("tiny3", "transformer_blocks")]


def evaluate(estimator):
    torch.manual_seed(0)
    x, mu, cond = (torch.randn(2, 80, 21) for _ in range(3))
    with use_backend("cpu"), counters.Counts() as counted:
        y = estimator(x, torch.ones(2, 1, 21), mu, torch.tensor(0.3), torch.randn(2, 80), cond)
    return y, counted.ops


@pytest.mark.parametrize("name", [name for name, _ in ESTIMATORS])
def test_an_estimator_uses_it_in_training_and_in_inference(name):
    estimator = from_preset(name).eval().decoder.estimator
    recorded, ops = evaluate(estimator)
    assert "fastflow::transformer_block" in ops
    with torch.no_grad():
        inferred, ops = evaluate(estimator)
    assert "fastflow::transformer_block" in ops
    assert torch.equal(recorded, inferred)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_trained_by_the_four_ops(dtype):
    x, weights, biases, rule = make(dtype)
    with counters.Counts() as counted:
        gradients(x, weights, biases, rule, backend="cpu")
    assert not any("transformer_block" in op for op in counted.ops)


@pytest.mark.parametrize(("name", "blocks"), ESTIMATORS)
def test_hooks_of_the_parts_of_a_block_are_called_all_the_same(name, blocks):
    estimator = from_preset(name).eval().decoder.estimator
    called = []
    for part_name, part in estimator.get_submodule(blocks).named_modules():
        if type(part).__name__ in ("Attention", "FeedForward"):
            part.register_forward_hook(lambda *_, part_name=part_name: called.append(part_name))
    with torch.no_grad():
        evaluate(estimator)
    assert called
    assert len(called) == len(set(called))


@pytest.mark.parametrize("way", ["a class of its own", "a function in its place"])
@pytest.mark.parametrize(("name", "blocks"), ESTIMATORS)
def test_a_part_that_computes_something_else_is_called(name, blocks, way):
    estimator = from_preset(name).eval().decoder.estimator
    modules = [m for m in estimator.get_submodule(blocks).modules() if type(m).__name__ == "FeedForward"]
    for part in modules:
        original = part.forward

        class Without(type(part)):
            def forward(self, x, *_):
                return x

        if way == "a class of its own":
            part.__class__ = Without
        else:
            part.forward = lambda x, *_: x
        assert part.forward is not original
    recorded, _ = evaluate(estimator)
    with torch.no_grad():
        inferred, _ = evaluate(estimator)
    assert torch.equal(recorded, inferred)
