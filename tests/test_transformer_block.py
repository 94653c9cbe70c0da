"""``transformer_block`` keeps its promise: it is projection, self_attention, projection and feed_forward."""

import pytest
import torch
import torch.nn as nn

from fastflow import from_preset, use_backend
from fastflow.ops import transformer_block, transformer_block_ref
from fastflow.ops.norm import Norm
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
    vector = (x.shape[0], CHANNELS) if modulated else (CHANNELS,)
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


def test_where_autograd_records_every_parameter_has_a_gradient():
    x, weights, biases, rule = make(biased=True)
    real_frames(transformer_block(x, weights, biases, **rule, backend="cpu"), rule).sum().backward()
    assert all(parameter.grad is not None for parameter in (*weights, *biases))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 5}, "weights and biases must be those of q, k, v, out, w1, w2"),
        ({"out": (3, 3)}, r"the weight out must have shape \[24, 16\], got \[3, 3\]"),
        ({"heads": 3}, "heads must divide the width 16 of q, got 3"),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, silu; got 'relu'"),
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
def test_an_estimator_uses_it_in_inference_alone(name):
    estimator = from_preset(name).eval().decoder.estimator
    recorded, ops = evaluate(estimator)
    assert not any("transformer_block" in op for op in ops)
    with torch.no_grad():
        inferred, ops = evaluate(estimator)
    assert any("transformer_block" in op for op in ops)
    assert torch.equal(recorded, inferred)


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
