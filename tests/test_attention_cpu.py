"""What is special to ``attention`` on the CPU: instruction sets, threads, and checks of the registered ops."""

import pytest
import torch

from fastflow import backend
from fastflow.ops.attention import RelativePosition, attention, attention_ref
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

if backend.extension is None:
    pytest.skip(f"not run: {backend.extension_error}", allow_module_level=True)
native = backend.extension

CAPABILITIES = native.cpu_capabilities()
ops = torch.ops.fastflow

# Batch, heads, queries, keys, width and the rule: sizes that divide no tile, and tiles that masks cut or leave out.
CASES = {
    "full": (2, 1, 130, 130, 64, {}),
    "ragged": (3, 2, 101, 101, 24, {"lengths": [101, 50, 0]}),
    "ragged, skipped": (3, 2, 101, 101, 24, {"lengths": [101, 50, 0], "padded_queries": False}),
    "chunks": (1, 2, 211, 211, 40, {"lengths": [190], "chunk_size": 25}),
    "left chunks": (2, 1, 211, 211, 16, {"lengths": [190, 60], "chunk_size": 17, "num_left_chunks": 2}),
    "offset": (2, 1, 60, 250, 8, {"lengths": [250, 170], "key_offset": 190}),
    "wide": (1, 1, 50, 100, 256, {"dropout_p": 0.3}),
    "dropout": (1, 2, 99, 99, 72, {"lengths": [97], "dropout_p": 0.3}),
}
SEED = torch.tensor([0x123456789ABCDEF])


@pytest.fixture(autouse=True)
def _restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.set_cpu_capability(CAPABILITIES[-1])


def make(batch, heads, queries, keys, width, relative, dtype=torch.float32):
    """Inputs (q, k, v and the relative position) and the gradient of the output."""
    tensors = [torch.randn(batch, heads, frames, width) for frames in (queries, keys, keys)]
    if relative:
        tensors += [torch.randn(heads, n, width) for n in (2 * keys - 1, 1, 1)]
        tensors[4:] = [x[:, 0] for x in tensors[4:]]
    return [x.to(dtype) for x in tensors], torch.randn(batch, heads, queries, width).to(dtype)


def run(tensors, grad, rule, function=attention, **kwargs):
    """Output and every gradient, by name."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    rel_pos = RelativePosition(*tensors[3:]) if len(tensors) > 3 else None
    rule = {"seed": SEED if "dropout_p" in rule else None, **rule}
    if "lengths" in rule:
        rule["lengths"] = torch.tensor(rule["lengths"])
    out = function(*tensors[:3], rel_pos=rel_pos, **rule, **kwargs)
    names = ("q", "k", "v", "position", "bias_u", "bias_v")
    grads = torch.autograd.grad(out, tensors, grad)
    return {"out": out.detach(), **dict(zip(names, grads, strict=False))}


@pytest.mark.parametrize("dtype", sorted(backend.FLOATS, key=str), ids=str)
@pytest.mark.parametrize("relative", [False, True], ids=["plain", "relative"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_agrees_with_the_reference(capability, case, relative, dtype):
    """Also: no memory is read before it is written, be it a result or the workspace."""
    native.set_cpu_capability(capability)
    *sizes, rule = CASES[case]
    if relative and rule.get("key_offset", 0) + sizes[2] > sizes[3]:
        pytest.skip("positions beyond the table")
    tensors, grad = make(*sizes, relative, dtype)
    with poison.nan_memory():
        got = run(tensors, grad, rule, backend="cpu")
    truth = run([x.double() for x in tensors], grad.double(), rule, attention_ref)
    if dtype == torch.float64:
        torch.testing.assert_close(got, truth, rtol=1e-13, atol=2e-13)
    else:
        assert_parity(got, run(tensors, grad, rule, attention_ref), truth, sums=(sizes[3], sizes[4]))


@pytest.mark.parametrize("relative", [False, True], ids=["plain", "relative"])
@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_no_bit(case, relative):
    """Five threads are more than there are rows and heads: they share the queries of one."""
    *sizes, rule = CASES[case]
    tensors, grad = make(*sizes, relative)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(tensors, grad, rule, backend="cpu"))
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(result[name], value), name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dropout_is_the_same_on_every_capability(capability):
    """With one-hot values the output shows which probabilities were kept."""
    native.set_cpu_capability(capability)
    q = torch.zeros(1, 2, 120, 120)
    v = torch.eye(120).expand(1, 2, -1, -1)
    rule = {"dropout_p": 0.4, "seed": SEED}
    kept = attention(q, q, v, **rule, backend="cpu") > 0
    assert torch.equal(kept, attention_ref(q, q, v, **rule) > 0)


def test_extreme_scores_stay_exact():
    """exp over its whole range, where a probability underflows to 0 or one key takes everything."""
    q = torch.full((1, 1, 1, 8), 8**-0.5)
    score = torch.tensor([0.0, -1e-3, -20, -86, -87.5, -104, -1e4, -3e38])
    k = score[None, None, :, None].expand(1, 1, 8, 8) / 8**0.5
    got = attention(q, k, torch.eye(8)[None, None], scale=1.0, backend="cpu")[0, 0, 0]
    want = (q.double() @ k.double().mT).softmax(-1)[0, 0, 0]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-38)


def arguments(**changes):
    """Arguments of the registered op ``attention``, some of them replaced."""
    q = torch.randn(2, 2, 5, 8)
    values = {
        "q": q, "k": q, "v": q, "lengths": None, "chunk_size": 0, "num_left_chunks": -1, "key_offset": 0,
        "padded_queries": True, "scale": 0.3, "dropout_p": 0.0, "seed": None,
    }  # fmt: skip
    return list({**values, **changes}.values())


BAD = {
    "q must have shape": {"q": torch.randn(2, 5, 8)},
    "multiple of 8": {"q": torch.randn(2, 2, 5, 7)},
    "float32, float64": {"q": torch.zeros(2, 2, 5, 8, dtype=torch.int64)},
    "k must have shape": {"k": torch.randn(2, 3, 5, 8)},
    "v must have shape": {"v": torch.randn(2, 2, 4, 8)},
    "v must have the dtype": {"v": torch.randn(2, 2, 5, 8).double()},
    "lengths must be int32": {"lengths": torch.ones(2)},
    "lengths must have shape": {"lengths": torch.ones(3, dtype=torch.int64)},
    "chunk_size must be": {"chunk_size": -1},
    "num_left_chunks needs": {"num_left_chunks": 1},
    "key_offset must be": {"key_offset": -1},
    "dropout_p must lie": {"dropout_p": 1.0},
    "needs a seed": {"dropout_p": 0.5},
    "seed must be": {"dropout_p": 0.5, "seed": torch.ones(2, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", BAD)
def test_registered_op_checks_its_arguments(message):
    with pytest.raises(RuntimeError, match=message):
        ops.attention(*arguments(**BAD[message]))


def test_registered_backward_and_relative_ops_check_their_tensors():
    q, k, v, *rule = arguments()
    out, lse = ops.attention(q, k, v, *rule)
    position, bias = torch.randn(2, 9, 8), torch.randn(2, 8)
    for name, bad in {
        "grad": (out[:1], out, lse),
        "out": (out, out.double(), lse),
        "lse": (out, out, lse[..., :4]),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name} must have"):
            ops.attention_backward(*bad, q, k, v, *rule)
    for name, bad in {
        "position": (position[:, :8], bias, bias),
        "bias_u": (position, bias[0], bias),
        "bias_v": (position, bias, bias.half()),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name} must have"):
            ops.relative_attention(q, k, v, *bad, *rule)
        with pytest.raises(RuntimeError, match=f"{name} must have"):
            ops.relative_attention_backward(out, out, lse, q, k, v, *bad, *rule)
    with pytest.raises(RuntimeError, match=r"key_offset \+ Tq must be at most Tk"):
        ops.relative_attention(q, k, v, position, bias, bias, *arguments(key_offset=1)[3:])


def test_lengths_beyond_the_tensor_reach_nothing():
    q, k, v, *_ = arguments()
    want = attention(q, k, v, backend="cpu")
    lengths = torch.tensor([2**62, 6])
    assert torch.equal(attention(q, k, v, lengths=lengths, backend="cpu"), want)
    assert not attention(q, k, v, lengths=-lengths, backend="cpu").any()
    assert torch.equal(attention(q, k, v, chunk_size=2**62, backend="cpu"), want)
