"""``attention`` keeps its promises on every backend."""

import contextlib
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastflow import backend as _backend
from fastflow.ops import RelativePosition, attention, attention_ref
from fastflow.ops.attention import DTYPES, visible_keys
from fastflow.ops.dropout import dropout_mask
from fastflow.testing import poison
from fastflow.testing.tolerances import assert_parity

HALVES = (torch.float16, torch.bfloat16)
NAMES = ("q", "k", "v", "position", "bias_u", "bias_v")
SEED = 0x123456789ABCDEF0 - 2**63  # both words, and the sign, count

# The batch is 2 x 2 heads x 19 queries; a pattern may say otherwise.
PATTERNS = {
    "plain": {},
    "lengths": {"lengths": [11, 19]},
    "chunks": {"chunk_size": 7},
    "chunks and lengths": {"chunk_size": 4, "lengths": [19, 6]},
    "two chunks to the left": {"chunk_size": 3, "num_left_chunks": 2, "lengths": [19, 8]},
    "own chunk only": {"chunk_size": 5, "num_left_chunks": 0},
    "cached keys": {"keys": 30, "key_offset": 7, "lengths": [30, 12]},
    "cached keys in chunks": {"keys": 30, "key_offset": 11, "chunk_size": 4, "num_left_chunks": 3},
    "padded queries skipped": {"lengths": [5, 14], "padded_queries": False},
    "dropout": {"dropout_p": 0.3},
    "scale": {"scale": 0.7},
    "everything": {
        "keys": 27, "key_offset": 6, "chunk_size": 4, "num_left_chunks": 2, "lengths": [13, 27],
        "padded_queries": False, "dropout_p": 0.2, "scale": 0.3,
    },
}  # fmt: skip
relative_or_not = pytest.mark.parametrize("relative", [False, True], ids=["plain", "relative"])


def has_kernel(backend):
    key = torch.empty(0, device="cuda" if backend == "triton" and torch.cuda.is_available() else "cpu").device.type
    name = "attention_triton" if backend == "triton" else "attention"
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastflow::{name}", key.upper())


@pytest.fixture
def backend(backend):
    """The backends that attention knows."""
    if backend != "reference" and not has_kernel(backend):
        pytest.skip(f"not run: attention has no kernel for backend {backend}")
    return backend


@pytest.fixture
def kernel_backend(kernel_backend):
    if not has_kernel(kernel_backend):
        pytest.skip(f"not run: attention has no kernel for backend {kernel_backend}")
    return kernel_backend


@pytest.fixture
def tiles(monkeypatch):
    """Give the Triton kernels square tiles of one size."""

    def choose(size):
        from fastflow.kernels import attention as kernels

        def config(found):
            return {width: ((size, size) if isinstance(block, tuple) else size, *rest)
                    for width, (block, *rest) in found.items()}  # fmt: skip

        monkeypatch.setattr(kernels, "CONFIGS", {key: config(found) for key, found in kernels.CONFIGS.items()})

    return choose


@pytest.fixture
def shipped_tiles():
    """Leave the Triton kernels the tiles that they have on a GPU."""


@pytest.fixture(autouse=True)
def large_tiles_in_the_interpreter(request, tiles):
    """Whose time is that of the number of operations, whatever their size."""
    if "shipped_tiles" in request.fixturenames:
        return
    names = {"backend", "kernel_backend"} & set(request.fixturenames)
    if any(request.getfixturevalue(name) == "triton" for name in names) and _backend.triton_interprets:
        tiles(64)


def make(pattern, relative=False, dtype=torch.float32, device="cpu", batch=2, heads=2, queries=19, width=8):
    """Tensors by name, with the output's gradient, and the other arguments of a pattern."""
    rule = dict(PATTERNS.get(pattern, pattern) if isinstance(pattern, str) else pattern)
    keys = rule.pop("keys", queries)
    if "lengths" in rule:
        rule["lengths"] = torch.tensor(rule["lengths"], device=device)
    if rule.get("dropout_p"):
        rule["seed"] = torch.tensor([SEED], device=device)
    shapes = {"q": (batch, heads, queries, width), "k": (batch, heads, keys, width), "v": (batch, heads, keys, width)}
    if relative:
        shapes |= {"position": (heads, 2 * keys - 1, width), "bias_u": (heads, width), "bias_v": (heads, width)}
    tensors = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    return tensors, torch.randn(shapes["q"]).to(device, dtype), rule


def call(function, tensors, rule, **kwargs):
    rel_pos = RelativePosition(*(tensors[name] for name in NAMES[3:])) if "position" in tensors else None
    return function(*(tensors[name] for name in NAMES[:3]), rel_pos=rel_pos, **rule, **kwargs)


def run(tensors, grad, rule, *, function=attention, **kwargs):
    """The output and the gradient of every tensor, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = call(function, leaves, rule, **kwargs)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def assert_right(tensors, grad, rule, backend, case=""):
    got = run(tensors, grad, rule, backend=backend)
    eager = run(tensors, grad, rule, function=attention_ref)
    truth = run({n: x.double() for n, x in tensors.items()}, grad.double(), rule, function=attention_ref)
    (batch, _, queries, width), keys = tensors["q"].shape, tensors["k"].shape[2]
    assert_parity(got, eager, truth, case=case, sums=(width, keys, batch * queries))


def assert_same(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


@relative_or_not
@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_the_reference(pattern, relative, backend, device):
    assert_right(*make(pattern, relative, device=device), backend, f"attention {backend} {pattern}")


@relative_or_not
@pytest.mark.parametrize("pattern", ["lengths", "two chunks to the left", "everything"])
def test_small_tiles(pattern, relative, backend, device, tiles):
    """Several tiles each way, some of them hidden."""
    if backend != "triton":
        pytest.skip(f"backend {backend} has no choice of tiles")
    tiles(16)
    assert_right(*make(pattern, relative, device=device, heads=1), backend, f"attention {backend} {pattern}")


@pytest.mark.parametrize(
    ("dtype", "width", "relative"),
    [(torch.float32, 32, True), (torch.bfloat16, 64, True), (torch.bfloat16, 256, False)],
)
def test_shipped_tiles(dtype, width, relative, shipped_tiles, backend, device):
    """The tiles of the kernels differ, also from those that the next kernel has."""
    if backend != "triton":
        pytest.skip(f"backend {backend} has no choice of tiles")
    pattern = {"lengths": [35], "chunk_size": 19, "num_left_chunks": 1, "dropout_p": 0.2}
    case = make(pattern, relative, dtype, device, batch=1, heads=1, queries=45, width=width)
    assert_right(*case, backend, f"attention {backend} shipped tiles {dtype} {width}")


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@relative_or_not
@pytest.mark.parametrize("pattern", ["chunks and lengths", "everything"])
def test_matches_the_reference_in_every_dtype(pattern, relative, dtype, backend, device):
    if dtype not in DTYPES.get(backend, (dtype,)):
        with pytest.raises(RuntimeError, match="does not support"):
            call(attention, *make(pattern, relative, dtype, device)[::2], backend=backend)
        return
    assert_right(*make(pattern, relative, dtype, device, heads=1), backend, f"attention {backend} {pattern} {dtype}")


@pytest.mark.parametrize(
    ("frames", "width", "relative"),
    [
        (1, 64, False),
        (1, 8, True),
        (2, 16, True),
        (15, 80, True),
        (17, 32, False),
        (63, 24, False),
        (65, 64, True),
        (129, 8, False),
        (2, 256, False),
    ],
)
def test_odd_sizes(frames, width, relative, backend, device):
    pattern = {"lengths": [frames - frames // 3]}
    tensors, grad, rule = make(pattern, relative, device=device, batch=1, heads=1, queries=frames, width=width)
    if frames == 1:  # one key: the probability is 1, and no score has a gradient
        got = run(tensors, grad, rule, backend=backend)
        torch.testing.assert_close(got["out"], tensors["v"])
        torch.testing.assert_close(got["grad_v"], grad)
        assert max(got[name].abs().max() for name in got if name not in ("out", "grad_v")) < 1e-5
    else:
        assert_right(tensors, grad, rule, backend, f"attention {backend} {frames} x {width}")


@relative_or_not
@pytest.mark.parametrize("pattern", ["chunks", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_use_cases_at_full_size(dtype, pattern, relative, kernel_backend, device, full_size):
    rule = {"chunks": {"chunk_size": 50, "lengths": [500, 333]}, "everything": {"dropout_p": 0.1, "lengths": [500, 77]}}
    case = make(rule[pattern], relative, dtype, device, queries=500, width=64)
    assert_right(*case, kernel_backend, f"attention {kernel_backend} full size")


# ------------------------------------------------------------------------------------------------ meaning
@pytest.mark.parametrize("padded_queries", [True, False])
@pytest.mark.parametrize("num_left_chunks", [-1, 0, 2, 99])
@pytest.mark.parametrize("chunk_size", [0, 1, 3, 99])
def test_which_keys_are_visible(chunk_size, num_left_chunks, padded_queries):
    lengths, offset = torch.tensor([0, 1, 9]), 2
    got = visible_keys(lengths, 7, 9, chunk_size, num_left_chunks, offset, padded_queries).expand(3, 7, 9)
    for b, length in enumerate(lengths.tolist()):
        for i in range(7):
            t = i + offset
            first, stop = 0, length
            if chunk_size:
                stop = min(stop, (t // chunk_size + 1) * chunk_size)
                if num_left_chunks >= 0:
                    first = (t // chunk_size - num_left_chunks) * chunk_size
            if not padded_queries and t >= length:
                stop = 0
            assert got[b, i].tolist() == [first <= j < stop for j in range(9)]


@pytest.mark.parametrize("pattern", ["lengths", "chunks and lengths"])
def test_equals_upstreams_bias(pattern, backend, device):
    """Upstream adds -1e10 to hidden scores: the same for every query that sees a key."""
    tensors, _, rule = make(pattern, device=device)
    got = call(attention, tensors, rule, backend=backend)
    q, k, v = tensors.values()
    visible = visible_keys(rule["lengths"], 19, 19, rule.get("chunk_size", 0))[:, None]
    bias = (1.0 - visible.float()) * -1.0e10
    want = (q @ k.transpose(2, 3) / math.sqrt(8) + bias).softmax(-1) @ v
    sees = visible.any(-1, keepdim=True)
    torch.testing.assert_close(got * sees, want * sees)
    assert not got.masked_select(~sees).any()


def test_large_scores_in_half_precision(kernel_backend, device):
    """Scores beyond 65504, which float16 does not have, as it does not have upstream's -1e10."""
    tensors, grad, rule = make("lengths", dtype=torch.float16, device=device)
    tensors["q"] *= 500
    tensors["k"] *= 100
    got = run(tensors, grad, rule, backend=kernel_backend)
    assert all(x.isfinite().all() for x in got.values())
    truth = call(attention_ref, {n: x.double() for n, x in tensors.items()}, rule)
    torch.testing.assert_close(got["out"].double(), truth, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outliers(dtype, backend, device):
    tensors, grad, rule = make("chunks and lengths", dtype=dtype, device=device)
    tensors["q"][0, 0, 3] *= 1e3
    tensors["v"][1, 1, 2] *= 1e3
    assert_right(tensors, grad, rule, backend, f"attention {backend} outliers {dtype}")


@relative_or_not
def test_a_row_in_a_batch_equals_the_row_alone(relative, backend, device):
    rule = {"lengths": [7, 19], "chunk_size": 6, "padded_queries": False}
    tensors, grad, rule = make(rule, relative, device=device)
    batch = run(tensors, grad, rule, backend=backend)
    for b, length in enumerate([7, 19]):
        alone = {name: tensors[name][b : b + 1, :, :length] for name in "qkv"}
        if relative:  # the distances of a shorter row lie in the middle of the table
            middle = tensors["position"][:, 19 - length : 19 + length - 1]
            alone |= {"position": middle, "bias_u": tensors["bias_u"], "bias_v": tensors["bias_v"]}
        got = run(alone, grad[b : b + 1, :, :length], {"chunk_size": 6}, backend=backend)
        for name in ("out", "grad_q", "grad_k", "grad_v"):
            torch.testing.assert_close(batch[name][b : b + 1, :, :length], got[name])
            assert not batch[name][b, :, length:].any()


@relative_or_not
def test_queries_without_a_key_are_zero(relative, backend, device):
    tensors, grad, rule = make({"lengths": [0, 1], "chunk_size": 4, "num_left_chunks": 0}, relative, device=device)
    got = run(tensors, grad, rule, backend=backend)
    assert all(x.isfinite().all() for x in got.values())
    assert not got["out"][0].any()
    assert not got["out"][1, :, 4:].any()
    torch.testing.assert_close(got["out"][1, :, :4], tensors["v"][1, :, :1].expand(2, 4, 8))
    for name in "qkv":
        assert not got[f"grad_{name}"][0].any()
    assert not got["grad_k"][1, :, 1:].any()
    assert not got["grad_v"][1, :, 1:].any()


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
@relative_or_not
def test_nothing_to_do(batch, queries, keys, relative, backend, device):
    if relative and keys == 0:
        pytest.skip("there is no table of positions without keys")
    tensors, grad, rule = make({"keys": keys}, relative, device=device, batch=batch, queries=queries)
    got = run(tensors, grad, rule, backend=backend)
    assert got["out"].shape == (batch, 2, queries, 8)
    if min(batch, queries, keys) == 0:
        for name, x in got.items():
            assert not x.any(), name


# ------------------------------------------------------------------------------------------------ dropout
@relative_or_not
def test_every_backend_drops_the_same(relative, backend, device):
    """With v = 1 the output shows which probabilities were kept; with the gradient 1 so does that of v."""
    queries, keys = 40, 72
    pattern = {"keys": keys, "key_offset": 9, "dropout_p": 0.4}
    tensors, _, rule = make(pattern, relative, device=device, batch=1, queries=queries, width=keys)
    tensors = {name: torch.zeros_like(x) for name, x in tensors.items()}
    tensors["v"] += torch.eye(keys, device=device)
    grad = torch.zeros_like(tensors["q"])
    grad[..., :queries] = torch.eye(queries, device=device)
    got = run(tensors, grad, rule, backend=backend)
    kept = dropout_mask(rule["seed"], 1, 2, queries, keys, 0.4)
    want = kept / (keys * 0.6)
    torch.testing.assert_close(got["out"], want)
    torch.testing.assert_close(got["grad_v"][..., :queries], want.transpose(2, 3))
    assert torch.equal(got["out"] > 0, kept)


def test_draws_a_seed_from_torchs_generator(backend, device):
    tensors, _, _ = make("plain", device=device, batch=1, heads=1, queries=5)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(call(attention, tensors, {"dropout_p": 0.5}, backend=backend))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(call(attention, tensors, {"seed": torch.tensor([3], device=device)}, backend=backend),
                       call(attention, tensors, {}, backend=backend))  # fmt: skip


# ------------------------------------------------------------------------------------------------ memory
@relative_or_not
def test_any_strides(relative, backend, device):
    """Also: nothing around the tensors is read, which is NaN."""
    tensors, grad, rule = make("chunks and lengths", relative, device=device)
    want = run(tensors, grad, rule, backend=backend)
    packed = torch.stack([tensors[name].transpose(1, 2) for name in "qkv"], 2).contiguous()  # [B, T, 3, H, D]
    layouts = {
        "heads split from one projection": dict(zip("qkv", packed.transpose(1, 3).unbind(2), strict=True)),
        "embedded in NaN, heads last": {n: poison.embedded(poison.permuted(x, *range(x.dim())[::-1]))
                                        for n, x in tensors.items()},
    }  # fmt: skip
    grads = poison.permuted(grad, 2, 0, 3, 1), poison.embedded(grad)
    for (layout, strided), strided_grad in zip(layouts.items(), grads, strict=True):
        got = run(tensors | strided, strided_grad, rule, backend=backend)
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, layout=layout: f"{layout}: {m}")


def test_expanded_gradient(backend, device):
    """The gradient of a sum is one element with strides 0."""
    tensors, grad, rule = make("lengths", device=device, heads=1)
    ones = torch.ones_like(grad)
    want = run(tensors, ones, rule, backend=backend)
    assert_same(run(tensors, ones[:1, :1, :1, :1].expand_as(grad), rule, backend=backend), want)


def test_lengths_of_any_integers(backend, device):
    tensors, grad, rule = make("lengths", device=device, heads=1)
    want = run(tensors, grad, rule, backend=backend)
    strided = torch.stack([rule["lengths"], rule["lengths"] * 0 - 5], 1)[:, 0]
    for lengths in (rule["lengths"].int(), strided):
        assert_same(run(tensors, grad, {"lengths": lengths}, backend=backend), want)
    beyond = {"lengths": torch.tensor([99, -3], device=device)}
    want = run(tensors, grad, {"lengths": torch.tensor([19, 0], device=device)}, backend=backend)
    assert_same(run(tensors, grad, beyond, backend=backend), want)


@pytest.mark.parametrize("padded_queries", [True, False])
@relative_or_not
def test_padding_is_never_read(relative, padded_queries, kernel_backend, device):
    rule = {"lengths": [0, 12], "padded_queries": padded_queries, "dropout_p": 0.2}
    tensors, grad, rule = make(rule, relative, device=device, heads=1)
    want = run(tensors, grad, rule, backend=kernel_backend)
    padding = (torch.arange(19, device=device) >= rule["lengths"][:, None])[:, None, :, None]
    dirty = tensors | {name: tensors[name].masked_fill(padding, math.nan) for name in "kv"}
    if not padded_queries:
        dirty["q"], grad = (x.masked_fill(padding, math.nan) for x in (tensors["q"], grad))
    assert_same(run(dirty, grad, rule, backend=kernel_backend), want)


@relative_or_not
@pytest.mark.parametrize("pattern", ["padded queries skipped", "cached keys in chunks"])
def test_writes_all_of_its_outputs_and_nothing_else(pattern, relative, kernel_backend, device):
    case = make(pattern, relative, device=device, heads=1)
    want = run(*case, backend=kernel_backend)
    guard = poison.guarded_allocations() if kernel_backend == "triton" else contextlib.nullcontext()
    with poison.nan_memory(), guard:
        got = run(*case, backend=kernel_backend)
    assert_same(got, want)


def test_results_merge_heads_without_a_copy(kernel_backend, device):
    got = run(*make("lengths", device=device), backend=kernel_backend)
    for name, x in got.items():
        assert x.transpose(1, 2).is_contiguous(), name


@relative_or_not
def test_saves_nothing_that_grows_with_the_square(relative, kernel_backend, device):
    def saved_bytes(frames):
        tensors, _, rule = make("dropout", relative, device=device, batch=1, heads=1, queries=frames)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            call(attention, {n: x.requires_grad_() for n, x in tensors.items()}, rule, backend=kernel_backend)
        return sum(sizes)

    assert saved_bytes(64) < 2.2 * saved_bytes(32)
    if not relative:  # q, k, v, the output, one number per query, the seed
        assert saved_bytes(32) == 32 * (4 * 8 + 1) * 4 + 8


# ------------------------------------------------------------------------------------------------ autograd and torch
@relative_or_not
@pytest.mark.parametrize("pattern", ["two chunks to the left", "everything"])
def test_gradcheck(pattern, relative, backend, device):
    if torch.float64 not in DTYPES.get(backend, (torch.float64,)):
        pytest.skip(f"backend {backend} has no float64")
    rule = PATTERNS[pattern] | {"lengths": [5], "keys": 6, "key_offset": 1}
    tensors, _, rule = make(rule, relative, torch.float64, device, batch=1, heads=1, queries=5)

    def function(*values):
        return call(attention, dict(zip(tensors, values, strict=True)), rule, backend=backend)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


@relative_or_not
def test_repeats_are_bitwise_equal(relative, backend, device):
    repeats = 50 if backend == "cpu" or device.type == "cuda" else 3
    case = make("everything", relative, device=device, heads=1, queries=19)
    first = run(*case, backend=backend)
    for _ in range(repeats - 1):
        assert_same(run(*case, backend=backend), first)


def test_second_derivative_is_refused(kernel_backend, device):
    tensors, _, rule = make("plain", device=device, batch=1, heads=1, queries=2)
    out = call(attention, {n: x.requires_grad_() for n, x in tensors.items()}, rule, backend=kernel_backend)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_the_gradients_asked_for(backend, device):
    tensors, grad, rule = make("lengths", True, device=device, batch=2, heads=1)
    want = run(tensors, grad, rule, backend=backend)
    tensors["position"].requires_grad_()
    out = call(attention, tensors, rule, backend=backend)
    assert torch.equal(torch.autograd.grad(out, tensors["position"], grad)[0], want["grad_position"])
    with torch.no_grad():
        assert not call(attention, tensors, rule, backend=backend).requires_grad


@relative_or_not
def test_opcheck(relative, kernel_backend, device):
    suffix = "_triton" if kernel_backend == "triton" else ""
    name = "relative_attention" if relative else "attention"
    pattern = {"lengths": [3], "keys": 4, "key_offset": 1}
    tensors, grad, rule = make(pattern, relative, device=device, batch=1, heads=1, queries=3)
    seed = torch.tensor([SEED], device=device)
    numbers = (rule["lengths"], 2, 1, 1, False, 0.5, 0.25, seed)
    forward = getattr(torch.ops.fastflow, name + suffix)
    backward = getattr(torch.ops.fastflow, f"{name}_backward{suffix}")
    out, lse = forward(*tensors.values(), *numbers)
    torch.library.opcheck(forward, (*tensors.values(), *numbers))
    torch.library.opcheck(backward, (grad, out, lse, *tensors.values(), *numbers))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@relative_or_not
def test_compiles_in_one_graph_and_not_again_for_new_lengths(relative, backend, device, fresh_dynamo):
    compiled = torch.compile(lambda t, rule: call(attention, t, rule, backend=backend), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    for n, frames in enumerate([5, 9, 13]):
        pattern = {"lengths": [frames, frames // 2], "chunk_size": 4}
        if backend != "reference":  # whose random numbers are a graph that takes a minute to trace
            pattern["dropout_p"] = 0.2
        tensors, grad, rule = make(pattern, relative, device=device, heads=1, queries=frames)
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        with torch._dynamo.config.patch(error_on_recompile=n > 1):
            out = compiled(leaves, rule)
        got = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
        want = run(tensors, grad, rule, backend=backend)
        torch.testing.assert_close(out.detach(), want["out"])
        for name, x in got.items():
            torch.testing.assert_close(x, want[f"grad_{name}"])


class Attention(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v, lengths):
        return attention(q, k, v, lengths=lengths, chunk_size=4, backend=self.backend)


def test_exports_as_one_node(kernel_backend, device):
    tensors, _, rule = make("lengths", device=device, heads=1)
    arguments = (*tensors.values(), rule["lengths"])
    program = torch.export.export(Attention(kernel_backend), arguments)
    assert sum("fastflow" in str(node.target) for node in program.graph.nodes) == 1
    assert torch.equal(program.module()(*arguments), Attention(kernel_backend)(*arguments))


def test_activation_checkpointing(backend, device):
    """Also with a seed that the op draws itself."""
    tensors, grad, rule = make({"lengths": [19, 8], "dropout_p": 0.3}, device=device, heads=1)
    del rule["seed"]
    leaves = [x.requires_grad_() for x in tensors.values()]

    def step(*values):
        return call(attention, dict(zip("qkv", values, strict=True)), rule, backend=backend)

    results = []
    for function in (step, lambda *values: checkpoint(step, *values, use_reentrant=False)):
        torch.manual_seed(5)
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_leaves_the_dtype(dtype, backend, device):
    """What autocast's linear layers hand over stays in their dtype."""
    tensors, grad, rule = make("lengths", dtype=dtype, device=device, heads=1)
    want = run(tensors, grad, rule, backend=backend)
    with torch.autocast(device.type, dtype):
        got = run(tensors, grad, rule, backend=backend)
    for name in want:
        assert got[name].dtype == dtype
        torch.testing.assert_close(got[name], want[name])


# ------------------------------------------------------------------------------------------------ bad input
X = torch.zeros(2, 3, 10, 16)
REL = RelativePosition(torch.zeros(3, 19, 16), torch.zeros(3, 16), torch.zeros(3, 16))
ONE = torch.zeros(1, dtype=torch.int64)
BAD_INPUT = {
    "three dimensions": ((X[0], X, X), {}, r"q must have shape \[B, H, Tq, D\].*got \[3, 10, 16\]"),
    "integers": ((X.long(), X, X), {}, "q must have .* a floating dtype, got .* torch.int64"),
    "head dim 12": ((X[..., :12],) * 3, {}, "the head dimension must be a multiple of 8 up to 256, got 12"),
    "head dim 264": ((torch.zeros(1, 1, 2, 264),) * 3, {}, "multiple of 8 up to 256, got 264"),
    "head dim 0": ((X[..., :0],) * 3, {}, "multiple of 8 up to 256, got 0"),
    "other heads": ((X, X[:, :2], X[:, :2]), {}, r"k must have shape \[2, 3, 'Tk', 16\], got \[2, 2, 10, 16\]"),
    "other rows": ((X, X[:1], X[:1]), {}, "k must have shape"),
    "other head dim": ((X, X[..., :8], X[..., :8]), {}, "k must have shape"),
    "v of another shape": ((X, X, X[:, :, :9]), {}, r"v must have the shape of k, \[2, 3, 10, 16\], got"),
    "v of another dtype": ((X, X, X.double()), {}, "v is torch.float64 on .* but q is torch.float32"),
    "k elsewhere": ((X, X.to("meta"), X), {}, "k is torch.float32 on meta but q is"),
    "lengths of other rows": ((X, X, X), {"lengths": torch.zeros(3, dtype=torch.int64)}, r"shape \[2\], got \[3\]"),
    "float lengths": ((X, X, X), {"lengths": torch.zeros(2)}, "lengths must be int32 or int64 .* torch.float32"),
    "lengths elsewhere": ((X, X, X), {"lengths": torch.zeros(2, dtype=torch.int64, device="meta")}, "lengths is on"),
    "negative chunk": ((X, X, X), {"chunk_size": -1}, "chunk_size must be >= 0, .* got -1"),
    "left chunks alone": ((X, X, X), {"num_left_chunks": 2}, "num_left_chunks 2 needs a chunk_size > 0"),
    "negative offset": ((X, X, X), {"key_offset": -1}, "key_offset must be >= 0, got -1"),
    "dropout 1": ((X, X, X), {"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\), got 1.0"),
    "negative dropout": ((X, X, X), {"dropout_p": -0.1}, "dropout_p must lie in"),
    "int seed": ((X, X, X), {"dropout_p": 0.1, "seed": ONE.int()}, "seed must be one int64 on"),
    "two seeds": ((X, X, X), {"dropout_p": 0.1, "seed": ONE.expand(2)}, "seed must be one int64 on"),
    "seed elsewhere": ((X, X, X), {"dropout_p": 0.1, "seed": ONE.to("meta")}, "seed must be one int64 on"),
    "short table": ((X, X, X), {"rel_pos": REL._replace(position=REL.position[:, 1:])},
                    r"rel_pos.position must have shape \[3, 19, 16\], got \[3, 18, 16\]"),
    "bias of other heads": ((X, X, X), {"rel_pos": REL._replace(bias_v=REL.bias_v[:2])},
                            r"rel_pos.bias_v must have shape \[3, 16\], got \[2, 16\]"),
    "bias of another dtype": ((X, X, X), {"rel_pos": REL._replace(bias_u=REL.bias_u.half())}, "is torch.float16"),
    "no key": ((X, X[:, :, :0], X[:, :, :0]), {"rel_pos": REL}, "k must hold at least one key, got none"),
    "beyond the table": ((X, X, X), {"rel_pos": REL, "key_offset": 1}, "must be at most Tk 10, got 11"),
}  # fmt: skip


def to_device(x, device):
    if isinstance(x, RelativePosition):
        return RelativePosition(*(to_device(t, device) for t in x))
    return x.to(device) if isinstance(x, torch.Tensor) and x.device.type != "meta" else x


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case, backend, device):
    tensors, rule, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        attention(
            *(to_device(x, device) for x in tensors),
            **{name: to_device(x, device) for name, x in rule.items()},
            backend=backend,
        )
